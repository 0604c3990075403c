"""One host through OpenSSH's client: for commands, polls and rsync.

Everything uses the user's own ``ssh``: known_hosts, ``~/.ssh/config`` (jump hosts included) and
ssh-agent. Host keys are always verified. Connections are shared (ControlMaster), so a poll every few
seconds costs no new handshake.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import shlex
import stat
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcpt.cluster.agent import program
from fastcpt.files import digest_of

CONNECT_TIMEOUT_S = 20
# ssh gives up a silent connection after 4 x 15 s, for commands and transfers.
ALIVE_INTERVAL_S = 15
ALIVE_COUNT = 4
# A poll is answered at once; hashing a whole corpus may take hours.
ASK_TIMEOUT_S = {"poll": 60, "stop": 60, "watch": 60, "submit": 120, "check": 180}
LONGEST_ASK_S = 6 * 3600
# How long a task keeps asking a host that stopped answering, before it fails and is retried.
OUTAGE_S = 300.0
# The same for a host that refuses a login that worked before.
REFUSED_S = 1800.0

# A socket's path has at most 104 bytes on macOS (108 on Linux). ssh needs 34 of them for a temporary
# name, and expands some characters.
SOCKETS = re.compile(r"[A-Za-z0-9_/.+-]{1,68}")

FAST_CIPHERS = "aes128-gcm@openssh.com,aes256-gcm@openssh.com"

log = logging.getLogger(__name__)


class ClusterError(ValueError):
    """The cluster cannot be used as it is. Trying again does not help; the message says what to do."""


class LoginRefused(ClusterError):
    """The host refuses the key or gives it no shell. If the login worked before, this may pass."""


class ConnectionLost(OSError):
    """The cluster did not answer; trying again may help."""


@dataclass(frozen=True)
class Remote:
    """How to reach a host. Without ``key_file``, ssh-agent or the user's configuration decides."""

    host: str
    user: str | None = None
    port: int | None = None
    key_file: str | None = None
    known_hosts: str | None = None

    def __post_init__(self) -> None:
        for name in ("host", "user", "key_file", "known_hosts"):
            value = getattr(self, name)
            if value is not None and (
                value.startswith("-") or not value.isprintable() or not value
            ):
                raise ClusterError(f"the connection's {name} {value!r} is not one: correct it")
        for name in ("key_file", "known_hosts"):
            path = getattr(self, name)
            if path is not None and not Path(path).expanduser().is_file():
                raise ClusterError(f"the connection's {name} '{path}' is no file on this machine")

    def ssh(self, shared: bool = True) -> list[str]:
        """The ssh command without host and remote command; ``shared`` connections are reused."""
        options = {
            "BatchMode": "yes",
            "StrictHostKeyChecking": "yes",
            "ConnectTimeout": str(CONNECT_TIMEOUT_S),
            "ServerAliveInterval": str(ALIVE_INTERVAL_S),
            "ServerAliveCountMax": str(ALIVE_COUNT),
        }
        if self.known_hosts:
            options["UserKnownHostsFile"] = str(Path(self.known_hosts).expanduser())
        if self.key_file:
            options["IdentitiesOnly"] = "yes"
        if shared:
            options["ControlMaster"] = "auto"
            # a connection opened with one key or known_hosts must not serve another
            options["ControlPath"] = f"{_sockets()}/{digest_of(vars(self))}"
            options["ControlPersist"] = "60"
        command = ["ssh", "-T"]
        for name, value in options.items():
            command += ["-o", f'{name}="{value}"' if " " in value else f"{name}={value}"]
        if self.key_file:
            command += ["-i", str(Path(self.key_file).expanduser())]
        if self.user:
            command += ["-l", self.user]
        if self.port:
            command += ["-p", str(self.port)]
        return command


def _sockets() -> str:
    """The private folder of the control sockets, created if missing.

    Raises ``ClusterError`` if anyone else could write there: they could answer for the host.
    """
    name = f"fast_cpt-{os.getuid()}"
    folder = Path(tempfile.gettempdir()) / name
    if not SOCKETS.fullmatch(str(folder)):
        folder = Path("/tmp") / name
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    state = folder.lstat()
    if stat.S_ISLNK(state.st_mode):
        wrong = "is a symbolic link"
    elif not stat.S_ISDIR(state.st_mode):
        wrong = "is no folder"
    elif state.st_uid != os.getuid():
        wrong = f"belongs to another user (number {state.st_uid})"
    elif state.st_mode & 0o077:
        wrong = f"is open to other users (mode {stat.S_IMODE(state.st_mode):04o})"
    else:
        return str(folder)
    raise ClusterError(
        f"'{folder}', where ssh keeps its shared connections, {wrong}: remove it, or set TMPDIR to "
        "a folder of your own"
    )


def _request(do: str, values: dict[str, Any]) -> bytes:
    return program.request(do, json.dumps(values)).encode()


def ask(remote: Remote, do: str, **values: Any) -> dict[str, Any]:
    """Send one request (of ``agent.main.REQUESTS``) to the agent and return its answer.

    Raises ``LoginRefused`` for a refused key or a login without a shell, ``ClusterError`` for a
    wrong host key or an error of the agent, ``ConnectionLost`` if there is no answer.
    """
    command = [*remote.ssh(), "--", remote.host, "exec python3 -"]
    patience = ASK_TIMEOUT_S.get(do, LONGEST_ASK_S)
    try:
        done = subprocess.run(
            command, input=_request(do, values), capture_output=True, timeout=patience
        )
    except subprocess.TimeoutExpired:
        raise ConnectionLost(f"{remote.host} did not answer '{do}' in {patience} s") from None
    return _answer(remote, do, done.returncode, done.stdout, done.stderr)


def ask_through(remote: Remote, do: str, **values: Any) -> dict[str, Any]:
    """``ask`` that survives a broken connection or a restarted sshd: it retries for ``patience``."""
    began = time.monotonic()
    while True:
        try:
            return ask(remote, do, **values)
        except (ConnectionLost, LoginRefused) as error:
            if time.monotonic() - began >= patience(remote, error):
                raise
            log.warning("%s; asking again", error)
            time.sleep(5)


async def ask_async(remote: Remote, do: str, **values: Any) -> dict[str, Any]:
    """``ask`` for the triggerer: it holds no thread."""
    process = await asyncio.create_subprocess_exec(
        *remote.ssh(),
        "--",
        remote.host,
        "exec python3 -",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    patience = ASK_TIMEOUT_S.get(do, LONGEST_ASK_S)
    try:
        async with asyncio.timeout(patience):
            output, errors = await process.communicate(_request(do, values))
    except TimeoutError:
        raise ConnectionLost(f"{remote.host} did not answer '{do}' in {patience} s") from None
    finally:
        if process.returncode is None:
            # do not wait: the shared connection also holds its pipes open
            process.kill()
    return _answer(remote, do, process.returncode or 0, output, errors)


def _answer(remote: Remote, do: str, code: int, output: bytes, errors: bytes) -> dict[str, Any]:
    said = errors.decode(errors="replace").strip()
    if code == 255:
        raise connection_error(remote, said)
    if code == 127:
        raise ClusterError(f"{remote.host} has no python3: install Python 3.8 or newer there")
    # a login may print text before the answer
    last = output.decode(errors="replace").strip().rpartition("\n")[2]
    try:
        answer = json.loads(last)
    except json.JSONDecodeError:
        words = f"it ended with {code} and said: {said[-1000:] or last or 'nothing'}"
        if code > 128:
            raise ConnectionLost(f"{remote.host}: '{do}' was killed there: {words}") from None
        raise LoginRefused(
            f"{remote.host} takes the login but does not run our program ('{do}'); {words}. The login "
            "needs a plain shell there, and Python 3.8 or newer as python3"
        ) from None
    if "unavailable" in answer:
        raise ConnectionLost(f"{remote.host}: {answer['unavailable']}")
    if "error" in answer:
        raise ClusterError(f"{remote.host}: {answer['error']}")
    _mark_of(remote).touch(mode=0o600)
    return dict(answer)


def _mark_of(remote: Remote) -> Path:
    """A file that exists if this login has worked from here."""
    return Path(_sockets()) / f"worked-{digest_of(vars(remote))}"


def patience(remote: Remote, error: ConnectionLost | LoginRefused) -> float:
    """How many seconds to retry after ``error`` before the task fails.

    A booting host refuses every login until the users' homes are mounted. So a login that has worked
    before is retried, one that never has is not.
    """
    if isinstance(error, ConnectionLost):
        return OUTAGE_S
    return REFUSED_S if _mark_of(remote).exists() else 0.0


def connection_error(remote: Remote, said: str) -> Exception:
    """The exception for an error message of ssh (exit code 255)."""
    where = remote.host + (f" port {remote.port}" if remote.port else "")
    known_hosts = remote.known_hosts or "~/.ssh/known_hosts"
    if "HOST IDENTIFICATION HAS CHANGED" in said or "Host key verification failed" in said:
        return ClusterError(
            f"the host key of {where} is not the one in {known_hosts}: somebody else may be answering. "
            "Compare it with what the host's owner tells you (ssh-keygen -lf), then correct the file"
        )
    # ssh prints "Permission denied" after these, so test them first
    if "Bad owner or permissions" in said or "UNPROTECTED PRIVATE KEY" in said:
        return ClusterError(f"ssh does not take the key file: {said}")
    if "Unable to negotiate" in said:
        return ClusterError(f"{where} and this machine have no algorithm in common: {said}")
    if "Permission denied" in said:
        return LoginRefused(
            f"{where} refused the login of {remote.user or 'this user'} with "
            f"{remote.key_file or 'the keys of ssh-agent'}: check the connection's login and key_file, "
            "and that the key is in authorized_keys there"
        )
    reason = said.splitlines()[-1] if said else "no reason given"
    return ConnectionLost(f"no connection to {where}: {reason}")


def quoted_ssh(remote: Remote) -> str:
    """The ssh command for rsync's ``-e``, with one connection per process.

    AES-GCM comes first: with the CPU's AES instructions it is faster than OpenSSH's default.
    """
    command = [*remote.ssh(shared=False), "-o", f"Ciphers=^{FAST_CIPHERS}"]
    return shlex.join(command)
