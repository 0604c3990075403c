"""A real OpenSSH server on the loopback, and how to reach it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastcpt.cluster.remote import Remote

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "include" / "scripts"))
import local_sshd


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, object]]:
    facts = local_sshd.start(tmp_path_factory.mktemp("sshd"))
    yield facts
    os.killpg(facts["pid"], signal.SIGTERM)
    os.waitpid(facts["pid"], 0)


@pytest.fixture(scope="session")
def remote(server: dict[str, object]) -> Remote:
    return Remote(
        str(server["host"]),
        str(server["user"]),
        int(str(server["port"])),
        str(server["key_file"]),
        str(server["known_hosts"]),
    )
