"""What a run has to do with MLflow where no server answers: next to nothing."""

from __future__ import annotations

import json
import logging
import socket
import time
from pathlib import Path

import pytest

import tracking
from fastcpt import mlflow_server
from fastcpt.recipe import load_recipe
from fastcpt.reporting.record import open_record


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tracking, "HOME", tmp_path)
    return open_record(tmp_path, "run", "fast_cpt", load_recipe("sample"))


def set_url(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    values = {"conn_type": "mlflow", "host": url, "password": "a secret token"}
    monkeypatch.setenv("AIRFLOW_CONN_FAST_CPT_MLFLOW", json.dumps(values))


def test_without_a_connection_nothing_is_left(
    record: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    tracking.follow(record)
    assert not (tmp_path / "mlflow").exists()
    assert not caplog.messages


def test_a_server_that_is_silent_costs_one_request_s_time_and_a_line(
    record: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mlflow_server, "REQUEST_S", 0.5)
    caplog.set_level(logging.WARNING)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        set_url(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        for _ in range(3):
            tracking.follow(record)
        assert time.monotonic() - began < 2
    assert len(caplog.messages) == 1
    assert "does not answer as MLflow does" in caplog.messages[0]
    assert "secret" not in caplog.text


@pytest.mark.parametrize("url", ["mlflow.example.org", "https://ann:secret@mlflow.example.org"])
def test_a_url_that_is_none_or_has_a_login_is_refused_without_being_shown(
    record: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, url: str
) -> None:
    set_url(monkeypatch, url)
    caplog.set_level(logging.WARNING)
    tracking.follow(record)
    assert "has to begin with https://" in caplog.messages[0]
    assert "secret" not in caplog.text
