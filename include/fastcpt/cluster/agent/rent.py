"""A rented host's own record: until when it may run, and when it was last asked for.

    ~/.fast_cpt/rent-<host>/   rent.json, asked, lock, watcher.py, watch.log

``watch`` starts the watcher (``watcher``), which gives the host back when nobody else does. Every
request updates ``asked`` and restarts the watcher if it is gone.

Times use the monotonic clock, which nobody can set; after a reboot, the wall clock. ``asked`` is
overwritten in place, which needs no free space.
"""

import json
import os
import subprocess
import sys
import time
from typing import Optional

from fastcpt.cluster.agent import program
from fastcpt.cluster.agent.files import Answer, expand, json_or_none, unlink, write_whole
from fastcpt.cluster.agent.job_folder import LOG_FLAGS, take_lock
from fastcpt.cluster.agent.processes import HOLDS, MARK, boot_id

SPENT = "the money for this host is spent (budget.money)"


def rent_folder() -> str:
    # several hosts may share a home
    return expand(f"~/.fast_cpt/rent-{os.uname().nodename}")


def watch(root: str, rent: Answer, now: float) -> Answer:
    """Watch this host, with its jobs under ``root``, as ``rent`` says; a later call replaces ``rent``.

    ``deadline_unix`` is when its money is spent, by the caller's clock, which shows ``now``. Jobs are
    ended ``reserve_seconds`` earlier; at the deadline the host is given back. It is also given back if
    nobody has asked for ``orphan_hours``, once its jobs have saved. ``release_command`` does that;
    without one the jobs are ended and the host stays. Without deadline and hours the watch ends.
    """
    folder = rent_folder()
    deadline, hours = rent.get("deadline_unix"), rent.get("orphan_hours")
    if deadline is None and hours is None:
        unlink(os.path.join(folder, "rent.json"))
        return {"watched": False}
    os.makedirs(folder, mode=0o700, exist_ok=True)
    left = None if deadline is None else deadline - now
    kept = {
        "root": expand(root),
        "boot_id": boot_id(),
        "deadline": None if left is None else time.monotonic() + left,
        "deadline_unix": None if left is None else time.time() + left,
        "reserve_s": rent.get("reserve_seconds") or 0.0,
        "orphan_s": None if hours is None else 3600 * hours,
        "command": rent.get("release_command"),
    }
    write_whole(os.path.join(folder, "watcher.py"), program.supervisor())
    note_asked()
    write_whole(os.path.join(folder, "rent.json"), json.dumps(kept))
    keep_watched()
    return {"watched": True}


def rent_here() -> Optional[Answer]:
    """What ``watch`` recorded about this host; None if it is not watched."""
    kept: Optional[Answer] = json_or_none(os.path.join(rent_folder(), "rent.json"), dict)
    return kept


def seconds_left(rent: Answer) -> Optional[float]:
    """Seconds until the host's money is spent; None if it has no deadline."""
    if rent["deadline"] is None:
        return None
    same_boot = rent["boot_id"] == boot_id()
    left: float = (
        rent["deadline"] - time.monotonic() if same_boot else rent["deadline_unix"] - time.time()
    )
    return left


def jobs_end_in(rent: Answer) -> Optional[float]:
    """Seconds until no job may run here any more; None if the host has no deadline."""
    left = seconds_left(rent)
    return None if left is None else left - float(rent["reserve_s"])


def note_asked() -> None:
    """Record that somebody asks for this host now."""
    try:
        asked = os.open(os.path.join(rent_folder(), "asked"), os.O_WRONLY | os.O_CREAT, 0o600)
    except OSError:
        return  # a full disk: an existing file can still be overwritten, only a new one cannot be created
    try:
        os.pwrite(asked, b"%032.3f" % time.monotonic(), 0)
    finally:
        os.close(asked)


def silence() -> float:
    """Seconds since somebody asked; 0 if unknown."""
    try:
        with open(os.path.join(rent_folder(), "asked"), "rb") as file:
            return max(0.0, time.monotonic() - float(file.read()))
    except (OSError, ValueError):
        return 0.0


def keep_watched() -> None:
    """Restart the watcher if this host is watched and the watcher is gone."""
    folder = rent_folder()
    if not os.path.exists(os.path.join(folder, "rent.json")):
        return
    lock = take_lock(folder)
    if lock is None:
        return
    complaints = os.open(os.path.join(folder, "watch.log"), LOG_FLAGS, 0o600)
    subprocess.Popen(
        [sys.executable, os.path.join(folder, "watcher.py"), "watch", str(lock)],
        stdin=subprocess.DEVNULL,
        stdout=complaints,
        stderr=complaints,
        start_new_session=True,
        pass_fds=[lock],
        # the watcher must not count as a process of the job that started it
        env={key: value for key, value in os.environ.items() if key not in (MARK, HOLDS)},
        cwd="/",
    )
    os.close(complaints)
    os.close(lock)
