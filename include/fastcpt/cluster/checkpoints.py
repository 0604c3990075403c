"""A training's newest checkpoint in a place that outlives its host, brought there while it goes on.

    <home>/<training>/step_N/   a folder that a training goes on from: checkpoints/step_N, its curve,
                                the adapters of areas that are done; files.json names all of it

A folder has its name when all of it is here and like its digests; the one before is removed then. What
is interrupted goes on in the middle of its file. From here it may go on to a URL (``checkpoint_urls``). As a program, with a request as JSON on standard
input, it brings once, at a low priority here and there.
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
from fastcpt.cluster.transfer import differing, receive, send
from fastcpt.files import flush, read_json, write_json
from fastcpt.manifests import FileEntry

NO_STEP = -1

log = logging.getLogger(__name__)


def newest_here(home: Path) -> Path | None:
    """The newest whole folder under a training's ``home``; None where there is none."""
    found = [path for path in home.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return max(found, key=_step, default=None)


def _step(folder: Path | None) -> int:
    return NO_STEP if folder is None else int(folder.name.removeprefix("step_"))


def bring(remote: Remote, folder: str, home: Path) -> dict[str, Any] | None:
    """Bring the newest checkpoint of the training in ``folder`` there to ``home``; None: it is here.

    Returns ``{step, bytes, seconds, from_its_beginning}``; the last is whether nothing of it was here
    before. Raises ``ClusterError`` where this disk is too small, or another
    process brings the same; ``ConnectionLost`` where the host does not answer.
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
        # what was held there for this is let go
        ask_through(remote, "newest_checkpoint", folder=folder, beyond=state["step"])
        seconds = round(time.monotonic() - began, 2)
        return {
            "step": state["step"],
            "bytes": moved["bytes"],
            "seconds": seconds,
            "from_its_beginning": fresh,
        }


def send_back(remote: Remote, folder: str, home: Path, url: str | None = None) -> int | None:
    """Put the newest checkpoint of ``home`` into a training's ``folder`` on a host that has none as new.

    Where ``url`` has a newer one it is fetched from there first. The step it goes on from then; None where
    nothing was to do. No job of the training may be running.
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
    """Bring what is newer at ``url`` than in ``home``, as this machine may be another one."""
    found, before = checkpoint_urls.newest_at(url), newest_here(home)
    if found is None or found[0] <= _step(before):
        return
    step, files = found
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = home / f".step_{step}.partial"
    checkpoint_urls.download(url, step, files, partial)
    if damaged := differing(partial, files):
        shutil.rmtree(partial)
        raise ClusterError(f"{url}: {', '.join(damaged[:3])} arrived damaged; clear this task")
    _complete(partial, home / f"step_{step}", files)
    if before:
        _remove(before)


def forget(home: Path, url: str | None = None) -> None:
    """Remove what was brought of a training whose model is in a place that stays."""
    shutil.rmtree(home, ignore_errors=True)
    if url:
        checkpoint_urls.remove(url)


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """One process at a time brings a training's checkpoints: a killed triggerer's may go on."""
    with (home / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ClusterError(f"another process brings checkpoints to {home}") from None
        yield


def _complete(partial: Path, target: Path, files: list[FileEntry]) -> None:
    """Name a folder that has arrived when all of it is on the disk."""
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
    """Bring once; the last line of what is printed is its answer, or why there is none."""
    os.nice(10)
    # so that the rsyncs end with this process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
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
