"""A real OpenSSH server on the loopback, and how to reach it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastcpt.cluster.remote import Remote

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "include" / "scripts"))
import local_sshd

from cluster.servers import remote_of


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    facts = local_sshd.start(tmp_path_factory.mktemp("sshd"))
    yield facts
    os.killpg(facts["pid"], signal.SIGTERM)
    os.waitpid(facts["pid"], 0)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Remote]]:
    """Starts a server with settings of its own and says how to reach it."""
    running = []

    def begin(name: str = "sshd", **more: object) -> Remote:
        facts = local_sshd.start(tmp_path / name, more=more)
        running.append(facts["pid"])
        return remote_of(facts)

    yield begin
    for pid in running:
        os.killpg(pid, signal.SIGTERM)
        os.waitpid(pid, 0)


@pytest.fixture(scope="session")
def remote(server: dict[str, Any]) -> Remote:
    return remote_of(server)
