"""A separate OpenSSH server on the loopback, which acts as the GPU host for `make run` and the tests.

It runs as the user who starts it and accepts only that user, with its own key and host key. It does not
change the machine's SSH configuration.
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
    """A running server, and how to reach it."""

    pid: int
    port: int
    host: str
    user: str
    key_file: str
    known_hosts: str


def start_server(
    folder: Path,
    environment: dict[str, str] | None = None,
    address: str = "127.0.0.1",
    port: int | None = None,
    inside: Sequence[str] = (),
    more: Mapping[str, object] | None = None,
) -> Server:
    """Start the server; the process leads its own process group.

    Keys stay in ``folder`` from one start to the next. ``environment`` is added to the usual environment
    of a login. ``inside`` is a prefix that runs the server elsewhere (``ip netns exec ...``);
    ``more`` are further settings of sshd_config, which override these.
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
        # privilege separation directory of root's sshd; absent in a bare container
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
    """Make the host key and the one accepted client key, if they are missing."""
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
        "UsePAM": "no",  # Apple's default needs root
        "StrictModes": "no",  # a folder under /tmp is writable by others, the files are not
        "MaxStartups": "100",
        "MaxSessions": "200",
    }


def _environment() -> dict[str, str]:
    """The variables that an unpacked rsync needs, as a login starts with a clean environment."""
    # the interpreter comes before any shim of a version manager: a killed shim may leave
    # a lock behind, and every later one waits a minute for it
    passed = {"PATH": f"{Path(sys.base_prefix, 'bin')}:{os.environ['PATH']}"}
    # with SHLVL above 0, a bash started by sshd does not read ~/.bashrc, where version managers are
    # started: each command would take a second longer and wait for the same lock
    passed["SHLVL"] = "1"
    for name in ("LD_LIBRARY_PATH", "LANG"):
        if name in os.environ:
            passed[name] = os.environ[name]
    return passed
