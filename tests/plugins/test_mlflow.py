"""Runs and models as a real MLflow server has them, whatever becomes of it meanwhile."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import live
import tracking
from fastcpt import mlflow_server
from fastcpt.files import write_json
from fastcpt.held_out import HELD_OUT_SCHEMA, TEXTS_SCHEMA, write_ledger
from fastcpt.recipe import load_recipe
from fastcpt.registry.champion import add_model, promote, retire, rollback
from fastcpt.reporting.record import add, add_failure, add_text, close_record, open_record
from mlflow_process import PASSWORD, USER, MlflowServer

# making its environment takes minutes
pytestmark = pytest.mark.faults

RECIPE = load_recipe("sample")
NAME = "fast_cpt-sample"
MET = {"what": "bits", "value": 0.1, "low": 0.1, "high": 0.1, "bound": 0.0, "met": True}


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("mlflow") / "server")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def server(process: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowServer:
    """The server, empty of runs and models of this recipe, behind the connection."""
    set_connection(monkeypatch, process.url, PASSWORD)
    monkeypatch.setattr(tracking, "HOME", tmp_path)
    found = process.ask("GET", "registered-models/search").get("registered_models", [])
    for model in found:
        process.ask("DELETE", "registered-models/delete", name=model["name"])
    return process


def set_connection(monkeypatch: pytest.MonkeyPatch, url: str, password: str) -> None:
    values = {"conn_type": "mlflow", "host": url, "login": USER, "password": password}
    monkeypatch.setenv("AIRFLOW_CONN_FAST_CPT_MLFLOW", json.dumps(values))


def began(home: Path, run: str, **times: Any) -> Path:
    return open_record(home, run, "fast_cpt", RECIPE, **times)


def train(record: Path, *steps: int) -> None:
    rows = [
        {"step": step, "loss": 5.0 - step / 100, "learning_rate": 0.001, "cost": step / 10}
        for step in steps
    ]
    add_text(record, "train_cpt/metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def runs(server: MlflowServer, record: Path) -> list[dict[str, Any]]:
    """Its MLflow runs as a person finds them, the newest first."""
    wanted = {"filter": f"name = '{NAME}'", "max_results": 10}
    (experiment,) = server.ask("POST", "experiments/search", **wanted)["experiments"]
    found = server.ask(
        "POST",
        "runs/search",
        experiment_ids=[experiment["experiment_id"]],
        filter=f"tags.`fast_cpt.record` = '{record.name}'",
    )
    return list(found.get("runs", []))


def named(values: list[dict[str, Any]]) -> dict[str, Any]:
    return {value["key"]: value["value"] for value in values}


def history(server: MlflowServer, run: dict[str, Any], key: str) -> list[tuple[int, float]]:
    wanted = {"run_id": run["info"]["run_id"], "metric_key": key}
    found = server.ask("GET", "metrics/get-history", **wanted)["metrics"]
    return [(row["step"], row["value"]) for row in found]


def test_a_run_is_there_while_it_goes_on_and_when_it_has_ended(
    server: MlflowServer, tmp_path: Path
) -> None:
    record = began(tmp_path, "weekly__1")
    tracking.follow(record)
    (run,) = runs(server, record)
    assert run["info"]["run_name"] == "weekly__1"
    assert run["info"]["status"] == "RUNNING"
    params, tags = named(run["data"]["params"]), named(run["data"]["tags"])
    assert (params["training.max_steps"], params["training.learning_rate"]) == ("120", "0.005")
    assert params["cluster.connection"] == RECIPE.cluster.connection
    assert params["score.subjects.data protection"] == "1.0"
    assert tags["fast_cpt.link"].endswith("/dags/fast_cpt/runs/weekly__1")
    # the curve as it grows
    train(record, 20, 40)
    tracking.follow(record)
    train(record, 20, 40, 60)
    tracking.follow(record)
    assert history(server, run, "train_cpt/loss") == [(20, 4.8), (40, 4.6), (60, 4.4)]
    assert history(server, run, "train_cpt/cost")[-1] == (60, 6.0)
    # its figures and its end
    add(record, "outputs/build.json", {"digest": "c0", "path": "/c"})
    gate = {"passed": True, "value": 9.5, "base_value": 19.0, "threshold": 18.0}
    add(record, "gate.json", {**gate, "decision": "fine-tune", "validation_set": "random"})
    add_failure(tmp_path, "weekly__1", "fast_cpt", "sync", "no route to host")
    close_record(record, "success")
    tracking.follow(record)
    tracking.follow(record)
    (run,) = runs(server, record)
    assert run["info"]["status"] == "FINISHED"
    assert history(server, run, "perplexity") == [(0, 9.5)]
    assert history(server, run, "base_perplexity") == [(0, 19.0)]
    assert history(server, run, "train_cpt/loss") == [(20, 4.8), (40, 4.6), (60, 4.4)]
    tags = named(run["data"]["tags"])
    assert tags["fast_cpt.corpus"] == "c0"
    assert tags["fast_cpt.failures"] == "sync: no route to host"
    assert not list((tmp_path / "mlflow" / "behind").iterdir())


def test_a_curve_of_thousands_of_values_arrives_whole(server: MlflowServer, tmp_path: Path) -> None:
    record = began(tmp_path, "long")
    train(record, *range(1, 1201))  # 3,600 values: more than a request takes
    tracking.follow(record)
    (run,) = runs(server, record)
    latest = {metric["key"]: metric["step"] for metric in run["data"]["metrics"]}
    assert latest["train_cpt/loss"] == latest["train_cpt/cost"] == 1200
    wanted = {"run_id": run["info"]["run_id"], "metric_key": "train_cpt/loss"}
    found = server.ask("GET", "metrics/get-history", **wanted, max_results=5000)["metrics"]
    assert [row["step"] for row in found] == list(range(1, 1201))


def test_the_watching_of_a_job_tells_the_curve(server: MlflowServer, tmp_path: Path) -> None:
    record = began(tmp_path, "watched")
    train(record, 10)

    async def watch() -> None:
        news = live.Live(str(record), "train_cpt")
        await news.leave(None, {"state": "running"}, "step 10")  # type: ignore[arg-type]
        assert news.following is not None
        await news.following

    asyncio.run(watch())
    (run,) = runs(server, record)
    assert history(server, run, "train_cpt/loss") == [(10, 4.9)]


def test_a_run_that_was_cleared_is_another_one_and_the_first_is_ended(
    server: MlflowServer, tmp_path: Path
) -> None:
    record = began(tmp_path, "twice", started=datetime(2026, 1, 1, tzinfo=UTC))
    train(record, 10)
    tracking.follow(record)
    began(tmp_path, "twice", started=datetime(2026, 1, 2, tzinfo=UTC))
    tracking.follow(record)
    later, first = runs(server, record)
    assert (later["info"]["status"], first["info"]["status"]) == ("RUNNING", "KILLED")
    assert "metrics" not in later["data"]
    assert history(server, first, "train_cpt/loss") == [(10, 4.9)]


def publish(home: Path, run: str, against: str | None, met: bool) -> None:
    """A run that published ``sample-<run>``, recommended where it ``met`` its condition."""
    decision = {
        "recommended": met,
        "against": f"sample-{against}" if against else None,
        "conditions": [{**MET, "met": met}],
    }
    name = f"sample-{run}"
    (home / "models" / name).mkdir(parents=True)
    facts = {"run": run, "record": began(home, run).name, "path": str(home / "models" / name)}
    facts |= {"training": f"t-{run}", "corpus": "c"}
    add_model(home, "sample", name, {**facts, "decision": decision}, {"of": name})


def versions(server: MlflowServer) -> dict[str, dict[str, Any]]:
    found = server.ask("GET", "model-versions/search", filter=f"name = '{NAME}'")
    return {named(one["tags"])["fast_cpt.model"]: one for one in found["model_versions"]}


def aliases(server: MlflowServer) -> dict[str, str]:
    """Which model each alias leads to."""
    found = server.ask("GET", "registered-models/get", name=NAME)["registered_model"]
    of = {one["version"]: model for model, one in versions(server).items()}
    return {one["alias"]: of[one["version"]] for one in found.get("aliases", [])}


def test_versions_and_aliases_follow_the_champion(server: MlflowServer, tmp_path: Path) -> None:
    write_ledger(tmp_path, "c", TEXTS_SCHEMA.empty_table(), HELD_OUT_SCHEMA.empty_table())
    (tmp_path / "corpora" / "c" / "tokenizer").mkdir(parents=True)
    write_json(tmp_path / "corpora" / "c" / "corpus_manifest.json", {"selection": "s"})
    publish(tmp_path, "one", None, met=True)
    (record,) = (tmp_path / "runs").iterdir()
    tracking.follow(record)
    assert aliases(server) == {"champion": "sample-one"}
    publish(tmp_path, "two", "one", met=False)
    tracking.follow()
    assert aliases(server) == {"champion": "sample-one", "candidate": "sample-two"}
    promote(tmp_path, "sample", "sample-two", "ann", "approved")
    tracking.follow()
    tracking.follow()
    assert aliases(server) == {"champion": "sample-two", "candidate": "sample-one"}
    rollback(tmp_path, "sample", "ann", "wrong dates")
    tracking.follow()
    assert aliases(server) == {"champion": "sample-one", "candidate": "sample-two"}
    retire(tmp_path, "sample", "ann", "a new tokenizer")
    tracking.follow()
    assert aliases(server) == {"candidate": "sample-two"}
    both = versions(server)
    assert set(both) == {"sample-one", "sample-two"}
    assert both["sample-one"]["source"].startswith("ssh://")
    assert both["sample-one"]["source"].endswith("/models/sample-one")
    assert both["sample-one"]["run_id"] == runs(server, record)[0]["info"]["run_id"]
    assert "missed: bits" in both["sample-two"]["description"]
    assert named(both["sample-two"]["tags"])["fast_cpt.corpus"] == "c"


def test_what_a_server_that_was_away_missed_arrives_with_the_next_step(
    server: MlflowServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = began(tmp_path, "missed")
    server.stop()
    caplog.set_level(logging.WARNING)
    began_at = time.monotonic()
    for step in (10, 20):
        train(record, step)
        tracking.follow(record)
    close_record(record, "failed")
    tracking.follow(record)
    assert time.monotonic() - began_at < 3
    assert len(caplog.messages) == 1
    assert "MLflow is behind" in caplog.messages[0]
    assert PASSWORD not in caplog.text
    server.start()
    long_ago = time.time() - tracking.QUIET_S - 1
    os.utime(tmp_path / "mlflow" / "away", (long_ago, long_ago))
    tracking.follow(began(tmp_path, "next"))
    (run,) = runs(server, record)
    assert run["info"]["status"] == "FAILED"
    assert history(server, run, "train_cpt/loss") == [(20, 4.8)]
    assert [marker.name[:4] for marker in (tmp_path / "mlflow" / "behind").iterdir()] == ["next"]


def test_a_server_that_asks_for_a_login_takes_the_connection_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # it hashes the password for each request: seconds on a busy machine
    monkeypatch.setattr(mlflow_server, "REQUEST_S", 60.0)
    server = MlflowServer(tmp_path / "server", login=True)
    server.start()
    try:
        set_connection(monkeypatch, server.url, PASSWORD)
        assert tracking.MlflowHook().test_connection() == (True, f"{server.url} answers")
        set_connection(monkeypatch, server.url, "a wrong secret")
        right, why = tracking.MlflowHook().test_connection()
    finally:
        server.stop()
    assert not right
    assert "answered 401" in why
    assert "a wrong secret" not in why
