"""An OpenSSH server of its own on the loopback: what plays the GPU host for `make run` and the tests.

It runs as whoever starts it, lets in that user alone, with a key and a host key made for it, and
leaves the machine's own SSH configuration alone.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict


class Server(TypedDict):
    """A server that runs, and how to reach it."""

    pid: int
    port: int
    host: str
    user: str
    key_file: str
    known_hosts: str


def start(
    folder: Path,
    environment: dict[str, str] | None = None,
    address: str = "127.0.0.1",
    port: int | None = None,
    inside: Sequence[str] = (),
    more: Mapping[str, object] | None = None,
) -> Server:
    """Start the server; the process leads a group of its own.

    Keys stay in ``folder`` from one start to the next. ``environment`` is what a login has besides
    the usual. ``inside`` is a command that runs the server somewhere else (``ip netns exec ...``);
    ``more`` are settings of sshd_config besides these, or instead.
    """
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if sshd is None:
        raise RuntimeError("no sshd on this machine: install the package openssh-server")
    _make_keys(folder)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    if port is None:
        with socket.socket(family) as probe:
            probe.bind((address, 0))
            port = int(probe.getsockname()[1])
    key = (folder / "host_key.pub").read_text().split()
    (folder / "known_hosts").write_text(f"[{address}]:{port} {key[0]} {key[1]}\n")
    settings = {"Port": port, "ListenAddress": address, **_settings(folder), **(more or {})}
    lines = [f"{name} {value}" for name, value in settings.items()]
    passed = {**_environment(), **(environment or {})}
    lines.append("SetEnv " + " ".join(f'"{name}={value}"' for name, value in passed.items()))
    (folder / "sshd_config").write_text("\n".join(lines) + "\n")
    if os.getuid() == 0 and sys.platform == "linux":
        # where root's sshd drops its rights; absent in a bare container
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    log = folder / "sshd.log"
    process = subprocess.Popen(
        [*inside, sshd, "-D", "-f", str(folder / "sshd_config"), "-E", str(log)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=log.open("ab"),
        start_new_session=True,
    )
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        with socket.socket(family) as probe:
            if probe.connect_ex((address, port)) == 0:
                return {
                    "pid": process.pid,
                    "port": port,
                    "host": address,
                    "user": getpass.getuser(),
                    "key_file": str(folder / "client_key"),
                    "known_hosts": str(folder / "known_hosts"),
                }
        time.sleep(0.05)
    process.kill()
    raise RuntimeError(f"sshd did not start: {log.read_text()[-1000:]}")


def _make_keys(folder: Path) -> None:
    """The host's key, and the one key that it lets in, where they are missing."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    for name in ("host_key", "client_key"):
        if not (folder / name).exists():
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    shutil.copyfile(folder / "client_key.pub", folder / "authorized_keys")
    (folder / "authorized_keys").chmod(0o600)


def _settings(folder: Path) -> dict[str, object]:
    return {
        "HostKey": f'"{folder / "host_key"}"',
        "AuthorizedKeysFile": f'"{folder / "authorized_keys"}"',
        "PidFile": "none",
        "AllowUsers": getpass.getuser(),
        "PasswordAuthentication": "no",
        "KbdInteractiveAuthentication": "no",
        "PermitRootLogin": "prohibit-password",
        "UsePAM": "no",  # Apple's default asks what only root may
        "StrictModes": "no",  # a folder under /tmp is writable by others, the files are not
        "MaxStartups": "100",
        "MaxSessions": "200",
    }


def _environment() -> dict[str, str]:
    """A login starts with a clean environment; these are what an unpacked rsync needs."""
    # the interpreter itself comes before any shim of a version manager: a shim that is killed may leave
    # a lock behind, for which every later one waits a minute
    passed = {"PATH": f"{Path(sys.base_prefix, 'bin')}:{os.environ['PATH']}"}
    # below the first level a bash that sshd runs reads no ~/.bashrc, where version managers are
    # started: each command would take a second more, and hit the same lock
    passed["SHLVL"] = "1"
    for name in ("LD_LIBRARY_PATH", "LANG"):
        if name in os.environ:
            passed[name] = os.environ[name]
    return passed
