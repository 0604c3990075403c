"""A training's newest checkpoint in a place that outlives its host, brought there while it goes on.

    <home>/<training>/step_N/   a folder that a training goes on from: checkpoints/step_N, its curve,
                                the adapters of areas that are done; files.json names all of it

A folder has its name when all of it is here and like its digests; the one before is removed then. What
is interrupted goes on in the middle of its file. As a program, with a request as JSON on standard
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

from fastcpt.cluster.remote import ClusterError, ConnectionLost, Remote, ask_through
from fastcpt.cluster.transfer import receive, send
from fastcpt.files import flush, read_json, write_json

FILES = "files.json"
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


def send_back(remote: Remote, folder: str, home: Path) -> int | None:
    """Put the newest checkpoint of ``home`` into a training's ``folder`` on a host that has none as new.

    The step it goes on from then; None where nothing was to do. No job of the training may be running.
    """
    newest = newest_here(home)
    if newest is None:
        return None
    there = ask_through(remote, "newest_checkpoint", folder=folder, beyond=_step(newest))["step"]
    if there is not None and there >= _step(newest):
        return None
    send(remote, newest, f"{folder}/returned", read_json(newest / FILES))
    ask_through(remote, "take_in", folder=folder)
    return _step(newest)


def forget(home: Path) -> None:
    """Remove what was brought of a training whose model is in a place that stays."""
    shutil.rmtree(home, ignore_errors=True)


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """One process at a time brings a training's checkpoints: a killed triggerer's may go on."""
    with (home / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ClusterError(f"another process brings checkpoints to {home}") from None
        yield


def _complete(partial: Path, target: Path, files: list[dict[str, Any]]) -> None:
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
    try:
        answer = bring(Remote(**request["remote"]), request["folder"], Path(request["home"]))
    except (ClusterError, ConnectionLost, OSError) as error:
        sys.exit(str(error))
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
