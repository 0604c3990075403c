"""A machine, a cluster, an Airflow (``machines``, ``airflow_processes``, ``slurm_cluster``) for the tests that break them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "include" / "scripts"))
import local_sshd

from faults.airflow_processes import Airflow
from faults.machines import Host, Training
from faults.slurm_cluster import Slurm


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
    facts = local_sshd.start_server(tmp_path / "sshd")
    yield facts
    with contextlib.suppress(ProcessLookupError):
        os.killpg(facts["pid"], signal.SIGTERM)
        os.waitpid(facts["pid"], 0)


@pytest.fixture
def disk_of(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a disk of a size (as mount has it: ``2m``); it is gone when the test has ended."""
    disk = tmp_path / "disk"

    def mounted(size: str) -> Path:
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        done = subprocess.run(mount, capture_output=True, text=True)
        if done.returncode:
            pytest.fail(f"a disk of its own needs root: {done.stderr.strip()}", pytrace=False)
        return disk

    yield mounted
    if disk.is_mount():
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    facts = local_sshd.start_server(tmp_path_factory.mktemp("sshd"))
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
