"""Compares a host's key with its entries in known_hosts (``ssh-keygen -F``)."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import paramiko

from fastcpt.cluster.remote import ClusterError, Remote
from fastcpt.cluster.ssh_config import Config, text_of, where_of


@dataclass(frozen=True)
class KnownKey:
    """A line of known_hosts that matches the host; ``marker`` is empty, CA or REVOKED."""

    place: str
    marker: str
    kind: str
    key: str
    # the line names the host without its port
    portless: bool


def algorithms(kind: str) -> list[str]:
    return ["rsa-sha2-512", "rsa-sha2-256"] if kind == "ssh-rsa" else [kind]


def _known_hosts_files(remote: Remote, config: Config) -> list[Path]:
    of_user = config.get("userknownhostsfile", [""])[0].split()
    if remote.known_hosts:
        of_user = [remote.known_hosts]
    named = [*of_user, *config.get("globalknownhostsfile", [""])[0].split()]
    return [Path(name).expanduser() for name in named if Path(name).expanduser().is_file()]


def known_keys(remote: Remote, config: Config) -> Iterator[KnownKey]:
    """The lines that match the host, from ``ssh-keygen -F``, which reads hashed names and patterns."""
    hostname, port = config["hostname"][0], config["port"][0]
    names = {hostname: False}
    if alias := config.get("hostkeyalias"):
        names = {alias[0]: False}
    elif port != "22":
        names = {f"[{hostname}]:{port}": False, hostname: True}
    for name, portless in names.items():
        for file in _known_hosts_files(remote, config):
            command = ["ssh-keygen", "-F", name, "-f", str(file)]
            found = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
            place = marker = ""
            for line in text_of(found.stdout).splitlines():
                if told := re.fullmatch(r"# Host .* found: line (\d+)\s*(\w*)\s*", line):
                    place, marker = f"{file} line {told[1]}", told[2]
                    continue
                fields = line.split()[1:] if line.startswith("@") else line.split()
                if len(fields) >= 3:
                    yield KnownKey(place, marker, fields[1], fields[2], portless)


def verify_host_key(
    key: paramiko.PKey, known: list[KnownKey], remote: Remote, config: Config
) -> None:
    """Raise ``ClusterError`` if the host's key is unknown, revoked, or another than known_hosts has."""
    where, mine = where_of(remote, config), (key.get_name(), key.get_base64())
    shown = f"It shows {key.get_name()} {key.fingerprint}"
    compare = "Compare it with what the host's owner tells you (ssh-keygen -lf there)"
    for entry in known:
        if entry.marker == "REVOKED" and (entry.kind, entry.key) == mine:
            raise ClusterError(
                f"the host key of {where} is marked as revoked in {entry.place}: do not use this host"
            )
    plain = [entry for entry in known if not entry.marker]
    if any((entry.kind, entry.key) == mine for entry in plain):
        return
    files = ", ".join(map(str, _known_hosts_files(remote, config))) or "any known_hosts file"
    others = [entry for entry in plain if entry.kind == key.get_name() and not entry.portless]
    if others:
        raise ClusterError(
            f"the host key of {where} is not the one in {others[0].place}: somebody else may be "
            f"answering. {shown}. {compare}, then correct that line"
        )
    name = config.get("hostkeyalias", [""])[0] or (
        config["hostname"][0]
        if config["port"][0] == "22"
        else f"[{config['hostname'][0]}]:{config['port'][0]}"
    )
    raise ClusterError(
        f"the host key of {where} is unknown: {files} has none for {name}. {shown}. {compare}, then "
        f"add the line '{name} {key.get_name()} {key.get_base64()}'"
    )
