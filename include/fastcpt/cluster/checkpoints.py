"""Copies a training's newest checkpoint off its host while the training runs.

    <home>/<training>/step_N/   all that a training resumes from: checkpoints/step_N, its metrics,
                                the adapters of finished areas; files.json lists the files

A folder gets its final name once all files are here and match their digests; then the previous one is
removed. An interrupted transfer resumes in the middle of a file. From here the folder may also go to a
URL (``checkpoint_urls``). Run as a program, with a request as JSON on standard input, this module
copies once, at low priority on both sides.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastcpt.cluster import checkpoint_urls
from fastcpt.cluster.checkpoint_urls import FILES
from fastcpt.cluster.remote import ClusterError, ConnectionLost, Remote, ask_through
from fastcpt.cluster.transfer import differing_files, receive, send
from fastcpt.exit_codes import STOPPED
from fastcpt.files import flush, read_json, write_json
from fastcpt.manifests import FileEntry

NO_STEP = -1

log = logging.getLogger(__name__)


def newest_here(home: Path) -> Path | None:
    """The newest complete folder under a training's ``home``; None if there is none."""
    found = [path for path in home.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return max(found, key=_step, default=None)


def _step(folder: Path | None) -> int:
    return NO_STEP if folder is None else int(folder.name.removeprefix("step_"))


def bring(remote: Remote, folder: str, home: Path) -> dict[str, Any] | None:
    """Fetch the newest checkpoint of the training in the remote ``folder`` to ``home``; None if it is here.

    Returns ``{step, bytes, seconds, age_s, from_its_beginning}``: ``age_s`` is how long before the
    transfer it was saved, the last is False if an interrupted transfer was resumed. Raises
    ``ClusterError`` if this disk is too small or another process is fetching the same training; ``ConnectionLost`` if the host does not answer.
    """
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _alone(home):
        began, before = time.monotonic(), newest_here(home)
        state = ask_through(remote, "newest_checkpoint", folder=folder, beyond=_step(before))
        if not state["files"]:
            return None
        name, files = f"step_{state['step']}", state["files"]
        partial = home / f".{name}.partial"
        for other in home.glob(".*.partial"):
            if other != partial:
                shutil.rmtree(other)
        fresh = not partial.exists()
        total = sum(int(file["bytes"]) for file in files)
        free = shutil.disk_usage(home).free + _size(partial)
        if total > free:
            raise ClusterError(
                f"{total / 1e9:.2f} GB to bring, {free / 1e9:.2f} GB free in {home}: free some, or set "
                "checkpoints.to to another folder"
            )
        moved = receive(remote, state["path"], files, partial, gently=True)
        _complete(partial, home / name, files)
        if before:
            _remove(before)
        # releases the hard links that the host kept for this transfer
        ask_through(remote, "newest_checkpoint", folder=folder, beyond=state["step"])
        seconds = round(time.monotonic() - began, 2)
        return {
            "step": state["step"],
            "bytes": moved["bytes"],
            "seconds": seconds,
            "age_s": state["age_s"],
            "from_its_beginning": fresh,
        }


def send_back(remote: Remote, folder: str, home: Path, url: str | None = None) -> int | None:
    """Put the newest checkpoint of ``home`` into a training's ``folder`` if the host has none as new.

    If ``url`` has a newer one, it is fetched first. Returns the step to resume from, or None if there
    was nothing to do. No job of the training may be running.
    """
    if url:
        _fetch_newer(url, home)
    newest = newest_here(home)
    if newest is None:
        return None
    there = ask_through(remote, "newest_checkpoint", folder=folder, beyond=_step(newest))["step"]
    if there is not None and there >= _step(newest):
        return None
    send(remote, newest, f"{folder}/returned/{newest.name}", read_json(newest / FILES))
    ask_through(remote, "take_in", folder=folder, step=_step(newest))
    return _step(newest)


def _fetch_newer(url: str, home: Path) -> None:
    """Download the checkpoint at ``url`` if it is newer than ``home``'s: Airflow's machine may be new."""
    found, before = checkpoint_urls.newest_at(url), newest_here(home)
    if found is None or found[0] <= _step(before):
        return
    step, files = found
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = home / f".step_{step}.partial"
    checkpoint_urls.download(url, step, files, partial)
    if damaged := differing_files(partial, files):
        shutil.rmtree(partial)
        raise ClusterError(f"{url}: {', '.join(damaged[:3])} arrived damaged; clear this task")
    _complete(partial, home / f"step_{step}", files)
    if before:
        _remove(before)


def forget(home: Path, url: str | None = None) -> None:
    """Remove a training's copied checkpoints once its model is published."""
    shutil.rmtree(home, ignore_errors=True)
    if url:
        checkpoint_urls.remove(url)


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """Let one process at a time fetch: one that a killed triggerer started may still be running."""
    with (home / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ClusterError(f"another process brings checkpoints to {home}") from None
        yield


def _complete(partial: Path, target: Path, files: list[FileEntry]) -> None:
    """Flush an arrived folder to disk, then give it its final name."""
    for left in list(partial.rglob(".rsync-partial")):
        shutil.rmtree(left)
    write_json(partial / FILES, files)
    for path in [*partial.rglob("*"), partial]:
        flush(path)
    partial.rename(target)
    flush(target.parent)


def _remove(old: Path) -> None:
    gone = old.with_name(f".{old.name}.partial")
    old.rename(gone)
    shutil.rmtree(gone)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Fetch once; the last line printed is the answer, or the reason why there is none."""
    os.nice(10)
    # exit through `finally`, so that the rsyncs end with this process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))
    request = json.load(sys.stdin)
    home, url = Path(request["home"]), request["url"]
    try:
        answer = bring(Remote(**request["remote"]), request["folder"], home)
        newest = newest_here(home)
        if url and newest:
            checkpoint_urls.upload(newest, url)
    except (ClusterError, ConnectionLost, OSError) as error:
        sys.exit(str(error))
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
