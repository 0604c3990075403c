"""How to reach the test servers, and restrictions on their logins."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from fastcpt.cluster import first_contact as module
from fastcpt.cluster.remote import Remote


def remote_of(facts: dict[str, Any]) -> Remote:
    return Remote(
        facts["host"], facts["user"], facts["port"], facts["key_file"], facts["known_hosts"]
    )


def force(remote: Remote, command: str) -> None:
    """The key's login gets ``command`` instead of what it asks for ($SSH_ORIGINAL_COMMAND)."""
    keys = Path(str(remote.key_file)).with_name("authorized_keys")
    escaped = command.replace('"', '\\"')
    keys.write_text(f'command="{escaped}" {keys.read_text()}')


def make_key(path: Path, kind: str = "ed25519", passphrase: str = "") -> Path:
    command = ["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-f", str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return path


def openssh_takes(remote: Remote) -> bool:
    """Whether OpenSSH itself, asked by the command line, gets through."""
    command = [*remote.ssh(shared=False), "--", remote.host, "true"]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0


def known_line(remote: Remote, names: str, key: str = "host_key") -> None:
    kind, text = Path(str(remote.key_file)).with_name(f"{key}.pub").read_text().split()[:2]
    Path(str(remote.known_hosts)).write_text(f"{names} {kind} {text}\n")


def only_paramiko(monkeypatch: pytest.MonkeyPatch) -> None:
    """A detour by OpenSSH fails the test."""

    def no(remote: Remote) -> None:
        raise AssertionError("OpenSSH was asked")

    monkeypatch.setattr(module, "_by_openssh", no)
