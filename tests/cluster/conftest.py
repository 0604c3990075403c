"""A real OpenSSH server on the loopback, and how to reach it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastcpt.cluster import first_contact
from fastcpt.cluster.remote import Remote

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "include" / "scripts"))
import local_sshd

from cluster.servers import remote_of


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    facts = local_sshd.start_server(tmp_path_factory.mktemp("sshd"))
    yield facts
    os.killpg(facts["pid"], signal.SIGTERM)
    os.waitpid(facts["pid"], 0)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Remote]]:
    """Starts a server with settings of its own and says how to reach it."""
    running = []

    def begin(name: str = "sshd", **more: object) -> Remote:
        facts = local_sshd.start_server(tmp_path / name, more=more)
        running.append(facts["pid"])
        return remote_of(facts)

    yield begin
    for pid in running:
        os.killpg(pid, signal.SIGTERM)
        os.waitpid(pid, 0)


@pytest.fixture(scope="session")
def remote(server: dict[str, Any]) -> Remote:
    return remote_of(server)


@pytest.fixture
def ssh_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Gives OpenSSH a configuration: it looks for its own in the home of the user database alone."""

    def write(text: str) -> Path:
        config, programs = tmp_path / "ssh_config", tmp_path / "programs"
        config.write_text(text)
        programs.mkdir()
        (programs / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {config} "$@"\n')
        (programs / "ssh").chmod(0o755)
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        return config

    return write


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    path = str(tmp_path / "agent")
    process = subprocess.Popen(["ssh-agent", "-D", "-a", path], stdout=subprocess.DEVNULL)
    monkeypatch.setenv("SSH_AUTH_SOCK", path)
    while not os.path.exists(path):
        assert process.poll() is None
    yield path
    process.terminate()
    process.wait()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_contact, "CONNECT_TIMEOUT_S", 2)
    monkeypatch.setattr("fastcpt.cluster.remote.CONNECT_TIMEOUT_S", 2)
