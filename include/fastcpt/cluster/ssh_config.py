"""The SSH configuration of a host as OpenSSH reads it (``ssh -G``)."""

from __future__ import annotations

import getpass
import os
import re
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

from fastcpt.cluster.remote import ClusterError, Remote

Config = Mapping[str, list[str]]


def config_of(remote: Remote) -> dict[str, list[str]]:
    """Every option that OpenSSH would use (``ssh -G``), by lower-case name."""
    command = [*remote.ssh(shared=False), "-G", "--", remote.host]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    if done.returncode:
        raise ClusterError(
            f"ssh does not take its configuration for {remote.host}: {text_of(done.stderr).strip()}"
        )
    config: dict[str, list[str]] = {}
    for line in text_of(done.stdout).splitlines():
        name, _, value = line.partition(" ")
        config.setdefault(name, []).append(value)
    return config


def where_of(remote: Remote, config: Config) -> str:
    hostname, port = config["hostname"][0], config["port"][0]
    if hostname == remote.host.lower():
        return f"{remote.host} port {port}"
    return f"{remote.host} ({hostname} port {port})"


def expanded(text: str, remote: Remote, config: Config) -> str:
    """Expand ssh_config's tokens for the host, the login and this user; others stay."""
    tokens = {
        "%": "%",
        "d": str(Path.home()),
        "h": config["hostname"][0],
        "k": config.get("hostkeyalias", [remote.host])[0],
        "L": socket.gethostname().partition(".")[0],
        "l": socket.gethostname(),
        "n": remote.host,
        "p": config["port"][0],
        "r": config["user"][0],
        "u": getpass.getuser(),
        "i": str(os.getuid()),
    }
    return re.sub("%(.)", lambda found: tokens.get(found[1], found[0]), text)


def text_of(said: bytes) -> str:
    return said.decode(errors="replace").replace("\r\n", "\n")
