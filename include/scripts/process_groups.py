"""The process groups that `make up` and `make run` start, and how they are ended: only they.

A number alone does not name a process: it is given to another one later, after a reboot at the
latest. So each entry of ``stack.json`` says when its process started as well, and a group is
signalled only where that process still leads it, or where one of its processes carries the stack's
mark (``FASTCPT_STACK``, drawn at random at each start) in its environment.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import psutil

MARK = "FASTCPT_STACK"
# A start is reckoned from the time of boot, which the kernel tells in whole seconds as the clock has it.
SAME_START_S = 2.0
# So long a group has to end itself, and then to be gone after SIGKILL.
GRACE_S = 6.0

Entry = dict[str, Any]


def entry(pid: int, command: str) -> Entry:
    """What is noted of a process that was just started and leads a group of its own."""
    return {"pid": pid, "started": psutil.Process(pid).create_time(), "command": command}


def is_ours(started: Entry, mark: str) -> bool:
    """Whether the group lives and is the one that was started, not one of a number used again."""
    processes = _group(started["pid"])
    return _any_lives(processes) and any(_proves(one, started, mark) for one in processes)


def end(entries: Sequence[Entry], mark: str) -> list[Entry]:
    """End the groups that are ours: politely, then for sure. Returns those of strangers, left alone."""
    ours = {one["pid"]: _group(one["pid"]) for one in entries if is_ours(one, mark)}
    strangers = [
        one for one in entries if one["pid"] not in ours and _any_lives(_group(one["pid"]))
    ]
    for number in (signal.SIGTERM, signal.SIGKILL):
        for group in ours:
            # macOS refuses where all that is left of a group waits to be reaped
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(group, number)
        until = time.monotonic() + GRACE_S
        while ours and time.monotonic() < until:
            time.sleep(0.1)
            # the number is not given away while one of these lives, whatever became of the leader
            ours = {group: _group(group) for group, known in ours.items() if _any_lives(known)}
    return strangers


def _group(group: int) -> list[psutil.Process]:
    """The processes of a group, those included that have ended and were not reaped yet."""
    with suppress(ChildProcessError):
        os.waitpid(group, os.WNOHANG)
    found = []
    for process in psutil.process_iter():
        with suppress(OSError):
            if os.getpgid(process.pid) == group:
                found.append(process)
    return found


def _any_lives(processes: Sequence[psutil.Process]) -> bool:
    for process in processes:
        with suppress(psutil.Error):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def _proves(process: psutil.Process, started: Entry, mark: str) -> bool:
    """Whether a process of the group shows that the group is ours."""
    with suppress(psutil.Error):
        if process.environ().get(MARK) == mark:
            return True
    with suppress(psutil.Error):
        age = abs(process.create_time() - started["started"])
        return bool(process.pid == started["pid"] and age < SAME_START_S)
    return False
