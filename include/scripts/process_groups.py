"""The process groups that `make up` and `make run` start, and how only these are ended.

A pid alone does not identify a process, as pids are reused, at the latest after a reboot. So each entry
of ``stack.json`` also has its process's start time, and a group is signalled only if that process
still leads it, or if one of its processes has the stack's mark (``FASTCPT_STACK``, random for
each start) in its environment.
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
# Start times are computed from the boot time, which the kernel gives in whole seconds of the wall clock.
SAME_START_S = 2.0
# How long a group may take to end after SIGTERM, and again after SIGKILL.
GRACE_S = 6.0

Entry = dict[str, Any]


def entry(pid: int, command: str) -> Entry:
    """The entry for a process that was just started and leads its own group."""
    return {"pid": pid, "started": psutil.Process(pid).create_time(), "command": command}


def is_ours(started: Entry, mark: str) -> bool:
    """Whether the group is alive and is the one that was started, not one with a reused pid."""
    processes = _group(started["pid"])
    return _any_lives(processes) and any(_proves(one, started, mark) for one in processes)


def end_groups(entries: Sequence[Entry], mark: str) -> list[Entry]:
    """End our groups with SIGTERM, then SIGKILL. Returns groups of others, which are left alone."""
    ours = {one["pid"]: _group(one["pid"]) for one in entries if is_ours(one, mark)}
    strangers = [
        one for one in entries if one["pid"] not in ours and _any_lives(_group(one["pid"]))
    ]
    for number in (signal.SIGTERM, signal.SIGKILL):
        for group in ours:
            # macOS refuses if all remaining processes of a group are zombies
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(group, number)
        until = time.monotonic() + GRACE_S
        while ours and time.monotonic() < until:
            time.sleep(0.1)
            # the group id is not reused while one of these lives, even if the leader is gone
            ours = {group: _group(group) for group, known in ours.items() if _any_lives(known)}
    return strangers


def _group(group: int) -> list[psutil.Process]:
    """The processes of a group, including zombies."""
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
    """Whether this process of the group proves that the group is ours."""
    with suppress(psutil.Error):
        if process.environ().get(MARK) == mark:
            return True
    with suppress(psutil.Error):
        age = abs(process.create_time() - started["started"])
        return bool(process.pid == started["pid"] and age < SAME_START_S)
    return False
