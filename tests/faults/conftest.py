"""A machine, a cluster, an Airflow (``machines``) for the tests that break them."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "include" / "scripts"))
import local_sshd

from faults.machines import Airflow, Host, Slurm, Training


@pytest.fixture
def training(tmp_path: Path) -> Training:
    return Training(tmp_path / "training")


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    (tmp_path / "host").mkdir()
    machine = Host(tmp_path / "host")
    yield machine
    machine.away()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """An SSH server on the loopback, as `make run` starts it."""
    facts = local_sshd.start(tmp_path / "sshd")
    yield facts
    with contextlib.suppress(ProcessLookupError):
        os.killpg(facts["pid"], signal.SIGTERM)
        os.waitpid(facts["pid"], 0)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    facts = local_sshd.start(tmp_path_factory.mktemp("sshd"))
    yield facts
    os.killpg(facts["pid"], signal.SIGTERM)
    os.waitpid(facts["pid"], 0)


@pytest.fixture(scope="module")
def airflow(tmp_path_factory: pytest.TempPathFactory, cluster: dict[str, Any]) -> Iterator[Airflow]:
    stack = Airflow(tmp_path_factory.mktemp("airflow"), cluster)
    yield stack
    stack.end()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    cluster = Slurm(tmp_path_factory.mktemp("slurm") / "cluster")
    yield cluster
    cluster.end()
