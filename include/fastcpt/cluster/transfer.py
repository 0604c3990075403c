"""Files to the cluster and back: rsync moves them, digests decide.

What the other side has is told by SHA-256 alone: rsync's own quick check takes a damaged file of
the right size for good. Only files that are absent or differ are sent, by several rsync side by
side (one SSH stream is bound by one core), each with options that GNU rsync and Apple's have. The
folder there is entered by the remote shell, quoted: rsyncs differ in what they make of a space in it. A
READY file comes last. Interrupted transfers go on where they stopped (``--partial-dir``).
"""

from __future__ import annotations

import logging
import re
import shlex
import subprocess
import threading
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
from fastcpt.files import digest_of, sha256_of_file
from fastcpt.gguf import FOLDERS, base_folder
from fastcpt.manifests import FileEntry

log = logging.getLogger(__name__)

STREAMS = 4
ROUNDS = 3  # a file that differs after being sent is sent again, twice
IDLE_TIMEOUT_S = 120
TOLD_EVERY_S = 5.0
ASKED_EVERY_S = 60.0


def files_of(folder: Path, names: Sequence[str] | None = None) -> list[FileEntry]:
    """The files ``names`` of ``folder`` (all below it without) as ``{file, bytes, sha256}``."""
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
    """Bring a base model that was made here from a GGUF file to the cluster; its folder there.

    None for every other model: its ``name`` is a hub name or a folder on the cluster.
    """
    folder = Path(base_folder(name or ""))
    if not (folder / "gguf.json").is_file():
        return None
    target = f"{root}/{FOLDERS}/{folder.name}"
    return str(send(remote, folder, target, files_of(folder))["path"])


def send(
    remote: Remote, local: Path, folder: str, files: Sequence[FileEntry], streams: int = STREAMS
) -> dict[str, Any]:
    """Bring ``files`` of ``local`` to ``folder`` on the cluster, digests verified there.

    Returns ``{path, sent, bytes, seconds, reused}``. Raises ``ClusterError`` where the disk there
    is too small or a file keeps arriving damaged, ``ConnectionLost`` where the line breaks.
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
    """Bring a folder back from the cluster; the same promises as ``send``, digests verified here."""
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
    """Bring ``files`` of the folder ``there`` to ``local``; ``gently``: beside a training, one at a time."""
    began = time.monotonic()
    local.mkdir(parents=True, exist_ok=True)
    differ = differing(local, files)
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
        lambda names: differing(local, [by_name[name] for name in names]),
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
    """Transfer the files ``differ`` until none does; returns those that arrive damaged each time.

    A line that breaks is waited for (its ``patience`` without a file arriving), then it goes on.
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


def differing(local: Path, files: Sequence[FileEntry]) -> list[str]:
    def same(file: FileEntry) -> bool:
        path = local / file["file"]
        right_size = path.is_file() and path.stat().st_size == file["bytes"]
        return bool(right_size and sha256_of_file(path) == file["sha256"])

    return [file["file"] for file in files if not same(file)]


def _shares(names: Sequence[str], sizes: dict[str, int], streams: int) -> list[list[str]]:
    """``names`` dealt to at most ``streams`` transfers of about equal bytes, the largest first."""
    shares: list[list[str]] = [[] for _ in range(min(streams, len(names)))]
    for name in sorted(names, key=lambda name: -sizes[name]):
        min(shares, key=lambda share: sum(sizes[one] for one in share)).append(name)
    return shares


def _send(
    remote: Remote, local: Path, there: str, shares: list[list[str]], sizes: dict[str, int]
) -> None:
    """The files of ``shares`` from ``local`` to the folder ``there``, which exists."""
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
    """The files of ``shares`` from the folder ``there`` to ``local``."""
    full = f"the disk of this machine is full, at {local}; free some, then clear this task"
    ends = [_place(remote), f"{local.absolute()}/"]
    _rsync(remote, there, ends, shares, sizes, full, "nice -n 19 rsync" if gently else "rsync")


def _place(remote: Remote) -> str:
    """The folder that the remote shell entered, as rsync names it: an IPv6 address in brackets."""
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
    """Both ``ends`` are rsync's; ``full`` is what it means that the receiving disk is; ``far`` runs there."""
    progress = _Progress(sum(sizes[name] for share in shares for name in share))
    command = [
        *("rsync", "-tLI", f"--timeout={IDLE_TIMEOUT_S}", "--partial-dir=.rsync-partial"),
        *("--files-from=-", "-0", "--out-format=%n", "--progress"),
        # what it makes there is its owner's alone
        *("--rsync-path", f"umask 077 && cd {shlex.quote(there)} && {far}"),
        *("-e", quoted_ssh(remote), *ends),
    ]

    def transfer(share: list[str], process: subprocess.Popen[str], complaints: IO[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended: its exit code says why
            process.stdin.write("".join(f"{_listed(name)}\0" for name in share))
            process.stdin.close()
        name = ""
        # a name as its file begins, then, rewriting their line, the bytes of it so far
        for line in process.stdout:
            if line.strip() in sizes:
                name = line.strip()
            elif so_far := re.match(r" *([\d,]+) +\d+%", line):
                progress.tell(name, int(so_far[1].replace(",", "")))
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
            # one failed, or the task is ended: the others go no further
            for process in running:
                process.terminate()
            raise


def _ask_for(remote: Remote) -> None:
    """Let a rented host know that somebody wants it: rsync is no request to its agent."""
    with suppress(ConnectionLost, ClusterError):  # the transfer itself tells what is wrong
        ask(remote, "poll", root="", jobs=[])


def _listed(name: str) -> str:
    """A file's name in a list for rsync, which takes ``#x`` and ``;x`` for comments, with -0 too."""
    return f"./{name}" if name.startswith(("#", ";")) else name


class _Progress:
    """What has arrived of all streams together: bytes, rate and time left."""

    def __init__(self, total: int) -> None:
        self.total, self.bytes_of = total, dict[str, int]()
        self.began = self.last = time.monotonic()
        self.lock = threading.Lock()

    def tell(self, name: str, so_far: int) -> None:
        with self.lock:
            self.bytes_of[name] = so_far
            done, now = sum(self.bytes_of.values()), time.monotonic()
            if now - self.last < TOLD_EVERY_S or not done:
                return
            self.last = now
        rate = done / (now - self.began)
        log.info(
            "%.1f of %.1f MB, %.1f MB/s, %.0f s left",
            *(done / 1e6, self.total / 1e6, rate / 1e6, (self.total - done) / rate),
        )


def _rsync_error(remote: Remote, full: str, code: int, said: str) -> Exception:
    if "No space left" in said or "Disk quota exceeded" in said:
        return ClusterError(full)
    if code == 127 or "rsync: command not found" in said or "rsync: not found" in said:
        return ClusterError(f"{remote.host} has no rsync: install the package rsync there")
    if code == 2:  # protocol incompatibility
        return ClusterError(
            f"rsync does not understand what {remote.host} answers: most often the login's start-up "
            f"files there print text (let them do so for interactive shells alone). rsync says: {said.strip()}"
        )
    # ssh failed: rsync passes its code on, or sees a broken stream (12); (13) is a file's own error
    if code in (12, 255) and "(13)" not in said:
        return connection_error(remote, said)
    last = said.strip().splitlines()[-1] if said.strip() else "no reason given"
    return ConnectionLost(f"rsync to {remote.host} ended with {code}: {last}")
