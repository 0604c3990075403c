"""Files to the cluster and back: rsync moves them, digests decide which.

Files are compared by SHA-256: rsync's quick check would accept a damaged file of the right size. Only
files that are absent or differ are sent, by several rsync processes in parallel, as one SSH stream is
limited by one core. The remote shell changes into the quoted target folder, as versions of rsync
differ in how they treat a space in a path. A READY file comes last. Interrupted transfers resume
(``--partial-dir``).
"""

from __future__ import annotations

import logging
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from subprocess import PIPE
from tempfile import TemporaryFile
from typing import IO, Any

from fastcpt.cluster.remote import (
    ClusterError,
    ConnectionLost,
    LoginRefused,
    Remote,
    ask,
    ask_through,
    connection_error,
    patience,
    quoted_ssh,
)
from fastcpt.files import BASE_MODELS, digest_of, sha256_of_file
from fastcpt.gguf import base_folder
from fastcpt.manifests import FileEntry
from fastcpt.progress import Progress

log = logging.getLogger(__name__)

STREAMS = 4
ROUNDS = 3  # a file that differs after being sent is sent again, twice
IDLE_TIMEOUT_S = 120
ASKED_EVERY_S = 60.0


def files_of(folder: Path, names: Sequence[str] | None = None) -> list[FileEntry]:
    """The files ``names`` of ``folder``, or all files below it, as ``{file, bytes, sha256}``."""
    paths = sorted(folder.rglob("*")) if names is None else [folder / name for name in names]
    return [
        {
            "file": str(path.relative_to(folder)),
            "bytes": path.stat().st_size,
            "sha256": sha256_of_file(path),
        }
        for path in paths
        if path.is_file()
    ]


def send_base_model(remote: Remote, name: str | None, root: str) -> str | None:
    """Send a base model that was converted here from a GGUF file; returns its folder on the cluster.

    None for any other model: its ``name`` is a hub name or a folder on the cluster.
    """
    folder = Path(base_folder(name or ""))
    if not (folder / "gguf.json").is_file():
        return None
    target = f"{root}/{BASE_MODELS}/{folder.name}"
    return str(send(remote, folder, target, files_of(folder))["path"])


def send(
    remote: Remote, local: Path, folder: str, files: Sequence[FileEntry], streams: int = STREAMS
) -> dict[str, Any]:
    """Send ``files`` of ``local`` to ``folder`` on the cluster and verify their digests there.

    Returns ``{path, sent, bytes, seconds, reused}``. Raises ``ClusterError`` if the disk there is too
    small or a file keeps arriving damaged, ``ConnectionLost`` if the connection stays broken.
    """
    began = time.monotonic()
    listed = [{key: file[key] for key in ("file", "bytes", "sha256")} for file in files]
    state = ask_through(remote, "verify", folder=folder, files=listed)
    sizes = {file["file"]: int(file["bytes"]) for file in files}
    differ, sent = state["differ"], list(state["differ"])
    total = sum(sizes[name] for name in differ)
    if total > state["free"]:
        raise ClusterError(
            f"{remote.host}: {total / 1e9:.2f} GB to send, {state['free'] / 1e9:.2f} GB free in "
            f"{state['path']}: free some there, or choose another cluster.root"
        )
    by_name = {file["file"]: file for file in listed}

    def still_differ(names: Sequence[str]) -> list[str]:
        asked = [by_name[name] for name in names]
        return list(ask_through(remote, "verify", folder=folder, files=asked)["differ"])

    move = partial(_send, remote, local, state["path"])
    differ = _move(remote, move, differ, sizes, streams, still_differ)
    if differ:
        raise ClusterError(
            f"{remote.host}: {', '.join(differ[:3])} differ there after {ROUNDS} transfers: "
            "check that host's disk and memory"
        )
    ask_through(remote, "ready", folder=folder, digest=digest_of(listed))
    seconds = time.monotonic() - began
    log.info("%s holds %d files; sent %d in %.1f s", state["path"], len(files), len(sent), seconds)
    return {
        "path": state["path"],
        "sent": len(sent),
        "bytes": total,
        "seconds": round(seconds, 2),
        "reused": not sent,
    }


def fetch(remote: Remote, folder: str, local: Path, streams: int = STREAMS) -> dict[str, Any]:
    """Fetch a folder from the cluster, with the same guarantees as ``send``; digests are verified here."""
    state = ask_through(remote, "listing", folder=folder)
    return receive(remote, state["path"], state["files"], local, streams)


def receive(
    remote: Remote,
    there: str,
    files: Sequence[FileEntry],
    local: Path,
    streams: int = STREAMS,
    gently: bool = False,
) -> dict[str, Any]:
    """Fetch ``files`` of the folder ``there`` to ``local``; ``gently``: one at a time, at low priority."""
    began = time.monotonic()
    local.mkdir(parents=True, exist_ok=True)
    differ = differing_files(local, files)
    sizes = {file["file"]: int(file["bytes"]) for file in files}
    fetched = list(differ)
    by_name = {file["file"]: file for file in files}
    move = partial(_fetch, remote, there, local, gently)
    differ = _move(
        remote,
        move,
        differ,
        sizes,
        1 if gently else streams,
        lambda names: differing_files(local, [by_name[name] for name in names]),
    )
    if differ:
        raise ClusterError(
            f"{', '.join(differ[:3])} differ here after {ROUNDS} transfers: check the disk"
        )
    return {
        "path": str(local),
        "fetched": len(fetched),
        "bytes": sum(sizes[name] for name in fetched),
        "seconds": round(time.monotonic() - began, 2),
        "reused": not fetched,
    }


def _move(
    remote: Remote,
    move: Callable[[list[list[str]], dict[str, int]], None],
    differ: list[str],
    sizes: dict[str, int],
    streams: int,
    still_differ: Callable[[Sequence[str]], list[str]],
) -> list[str]:
    """Transfer the files ``differ`` until none differs; returns those that are damaged every time.

    After a broken connection it retries, for ``patience`` seconds without a new file.
    """
    rounds, moved_last = 0, time.monotonic()
    while differ and rounds < ROUNDS:
        log.info(
            "%d files to transfer, %.1f MB", len(differ), sum(map(sizes.__getitem__, differ)) / 1e6
        )
        lost, waits = None, 0.0
        try:
            move(_shares(differ, sizes, streams), sizes)
            rounds += 1
        except (ConnectionLost, LoginRefused) as error:
            lost, waits = error, patience(remote, error)
            if not waits:
                raise
        before, differ = differ, still_differ(differ)
        if len(differ) < len(before):
            moved_last = time.monotonic()
        elif lost and time.monotonic() - moved_last > waits:
            raise lost
        if lost:
            log.warning("%s; going on", lost)
            time.sleep(2)
    return differ


def differing_files(local: Path, files: Sequence[FileEntry]) -> list[str]:
    def same(file: FileEntry) -> bool:
        path = local / file["file"]
        right_size = path.is_file() and path.stat().st_size == file["bytes"]
        return bool(right_size and sha256_of_file(path) == file["sha256"])

    return [file["file"] for file in files if not same(file)]


def _shares(names: Sequence[str], sizes: dict[str, int], streams: int) -> list[list[str]]:
    """Split ``names`` into at most ``streams`` transfers of about equal bytes, largest first."""
    shares: list[list[str]] = [[] for _ in range(min(streams, len(names)))]
    for name in sorted(names, key=lambda name: -sizes[name]):
        min(shares, key=lambda share: sum(sizes[one] for one in share)).append(name)
    return shares


def _send(
    remote: Remote, local: Path, there: str, shares: list[list[str]], sizes: dict[str, int]
) -> None:
    """Send the files of ``shares`` from ``local`` to the existing folder ``there``."""
    full = f"{remote.host}: the disk there is full; free some, then clear this task"
    _rsync(remote, there, [f"{local.absolute()}/", _place(remote)], shares, sizes, full)


def _fetch(
    remote: Remote,
    there: str,
    local: Path,
    gently: bool,
    shares: list[list[str]],
    sizes: dict[str, int],
) -> None:
    """Fetch the files of ``shares`` from the folder ``there`` to ``local``."""
    full = f"the disk of this machine is full, at {local}; free some, then clear this task"
    ends = [_place(remote), f"{local.absolute()}/"]
    _rsync(remote, there, ends, shares, sizes, full, "nice -n 19 rsync" if gently else "rsync")


def _place(remote: Remote) -> str:
    """The remote shell's current folder in rsync's notation; an IPv6 address needs brackets."""
    return f"[{remote.host}]:./" if ":" in remote.host else f"{remote.host}:./"


def _rsync(
    remote: Remote,
    there: str,
    ends: list[str],
    shares: list[list[str]],
    sizes: dict[str, int],
    full: str,
    far: str = "rsync",
) -> None:
    """Run one rsync per share between ``ends``; ``full`` is the error for a full disk, ``far`` the remote rsync."""
    total = sum(sizes[name] for share in shares for name in share)
    progress = Progress("transfer", "MB", total / 1e6)
    command = [
        *("rsync", "-tLI", f"--timeout={IDLE_TIMEOUT_S}", "--partial-dir=.rsync-partial"),
        *("--files-from=-", "-0", "--out-format=%n", "--progress"),
        # files made there are readable by their owner only
        *("--rsync-path", f"umask 077 && cd {shlex.quote(there)} && {far}"),
        *("-e", quoted_ssh(remote), *ends),
    ]

    def transfer(share: list[str], process: subprocess.Popen[str], complaints: IO[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):  # rsync has ended: its exit code says why
            process.stdin.write("".join(f"{_listed(name)}\0" for name in share))
            process.stdin.close()
        name, seen = "", dict[str, int]()
        # rsync prints a file's name, then its bytes so far, again and again on one line
        for line in process.stdout:
            if line.strip() in sizes:
                name = line.strip()
            elif so_far := re.match(r" *([\d,]+) +\d+%", line):
                before, seen[name] = seen.get(name, 0), int(so_far[1].replace(",", ""))
                progress.add((seen[name] - before) / 1e6)
        if process.wait():
            complaints.seek(0)
            raise _rsync_error(remote, full, process.returncode, complaints.read())

    with ExitStack() as files, ThreadPoolExecutor(len(shares)) as streams:
        running, transfers = [], []
        for share in shares:
            complaints = files.enter_context(TemporaryFile("w+", errors="replace"))
            process = subprocess.Popen(
                command, stdin=PIPE, stdout=PIPE, stderr=complaints, errors="replace"
            )
            running.append(process)
            transfers.append(streams.submit(transfer, share, process, complaints))
        try:
            under_way = set(transfers)
            while under_way:
                ended, under_way = wait(under_way, ASKED_EVERY_S, FIRST_COMPLETED)
                for one in ended:
                    one.result()
                if under_way:
                    _ask_for(remote)
        except BaseException:
            # one failed, or the task is being ended: stop the others
            for process in running:
                process.terminate()
            raise


def _ask_for(remote: Remote) -> None:
    """Tell a rented host that it is in use: rsync makes no request to its agent."""
    with suppress(ConnectionLost, ClusterError):  # the transfer itself reports what is wrong
        ask(remote, "poll", root="", jobs=[])


def _listed(name: str) -> str:
    """A file's name in rsync's list, which treats ``#x`` and ``;x`` as comments, even with -0."""
    return f"./{name}" if name.startswith(("#", ";")) else name


def _rsync_error(remote: Remote, full: str, code: int, said: str) -> Exception:
    if "No space left" in said or "Disk quota exceeded" in said:
        return ClusterError(full)
    if code == 127 or "rsync: command not found" in said or "rsync: not found" in said:
        return ClusterError(f"{remote.host} has no rsync: install the package rsync there")
    if code == 2:  # protocol incompatibility
        return ClusterError(
            f"rsync does not understand what {remote.host} answers: most often the login's start-up "
            f"files there print text (let them do so in interactive shells only). rsync says: {said.strip()}"
        )
    # ssh failed: rsync passes on its 255, or sees a broken stream (12); "(13)" is a file's permission error
    if code in (12, 255) and "(13)" not in said:
        return connection_error(remote, said)
    last = said.strip().splitlines()[-1] if said.strip() else "no reason given"
    return ConnectionLost(f"rsync to {remote.host} ended with {code}: {last}")
