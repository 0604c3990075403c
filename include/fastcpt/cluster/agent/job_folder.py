"""A job's folder: its files, its locks and its supervisor."""

import fcntl
import json
import os
import time
from contextlib import contextmanager, suppress
from typing import Dict, Iterator, List, Optional

from fastcpt.cluster.agent import program
from fastcpt.cluster.agent.files import Answer, expand, json_or_none, unlink, write_whole
from fastcpt.cluster.agent.processes import (
    HOLDS,
    MARK,
    boot_id,
    job_folder_of,
    process_environment,
    processes,
)

LOG_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND
# Removed when a job ends, so that its last status can be written on a full disk.
RESERVE = 64 * 1024
# A folder that is missing for longer than this was removed; a shorter gap may be a remount.
GONE_S = 10.0
ACTIVE = ("starting", "waiting", "running")
# The folders below the root whose content jobs name in their scripts.
NAMED = (
    *("code", "environments", "corpora", "instructions"),
    *("base_models", "models", "published", "runs"),
)


def job_folder(root: str, name: str) -> str:
    return os.path.realpath(os.path.join(expand(root), "jobs", name))


@contextmanager
def cleaning_lock(root: str, kind: int) -> Iterator[None]:
    """Held shared (``fcntl.LOCK_SH``) while a job touches what it uses, exclusively while a folder is renamed."""
    lock = os.open(os.path.join(expand(root), "cleaning.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, kind)
        yield
    finally:
        os.close(lock)


def touch_named(root: str, script: str, folder: str) -> None:
    """Renew the age of a job's ``folder`` and of all that its script names: ``cleaning`` goes by it."""
    # a full disk may have no room for the lock: then a job that runs is still kept by its script
    with suppress(OSError), cleaning_lock(root, fcntl.LOCK_SH):
        os.utime(folder)
        for kind in NAMED:
            with suppress(OSError):  # no folder of this kind, or another user's
                for name in os.listdir(os.path.join(expand(root), kind)):
                    if f"/{kind}/{name}" in script:
                        os.utime(os.path.join(expand(root), kind, name))


class Door:
    """A lock held while a job is started or ended, so that two requests for it run one after the other."""

    def __init__(self, folder: str) -> None:
        self.folder, self.lock = folder, -1

    def __enter__(self) -> None:
        try:
            self.lock = os.open(os.path.join(self.folder, "door"), os.O_RDWR | os.O_CREAT, 0o600)
        except OSError:
            return  # a full or read-only disk, or no folder: a job must still be endable
        fcntl.flock(self.lock, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        if self.lock >= 0:
            os.close(self.lock)


def take_lock(folder: str) -> Optional[int]:
    """The job lock's descriptor, or None while a supervisor holds it."""
    lock = os.open(os.path.join(folder, "lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


def lock_held(folder: str) -> bool:
    """Whether a supervisor holds the job's lock; False if the lock cannot be opened."""
    try:
        lock = take_lock(folder)
    except OSError:
        return False
    if lock is not None:
        os.close(lock)
    return lock is None


def begin_folder(
    folder: str, owner: str, script: str, spec: Answer, secrets: Dict[str, str], waiting: bool
) -> None:
    """Write the files of a new start: an empty log, and no request to stop."""
    log = os.path.join(folder, "job.log")
    if os.path.exists(log):
        os.replace(log, log + ".1")
    for name in ("stopped.json", "status.json"):
        unlink(os.path.join(folder, name))
    status = {"state": "waiting" if waiting else "starting", "started": time.time()}
    if not waiting:
        status["boot_id"] = boot_id()
    files = {
        "reserve": os.urandom(RESERVE // 2).hex(),
        "seen": "0",
        "owners.json": json.dumps([owner]),
        "job.sh": script,
        "supervisor.py": program.supervisor(),
        "spec.json": json.dumps(spec),
        "status.json": json.dumps(status),
        "secrets.json": json.dumps(secrets),
    }
    for name, content in files.items():
        write_whole(os.path.join(folder, name), content)


def owners(folder: str) -> List[str]:
    return json_or_none(os.path.join(folder, "owners.json"), list) or []


def last_status(folder: str) -> Optional[Answer]:
    """The last status that the job's supervisor wrote; None if it is missing or damaged."""
    status: Optional[Answer] = json_or_none(os.path.join(folder, "status.json"), dict)
    return status if status and isinstance(status.get("state"), str) else None


def spec_of(folder: str) -> Answer:
    """What the job was started with; empty if the file is missing or damaged."""
    return json_or_none(os.path.join(folder, "spec.json"), dict) or {}


def forget_secrets(folder: str) -> None:
    unlink(os.path.join(folder, "secrets.json"))


class Removed:
    """Whether a running job's folder was removed, that is, missing for longer than ``GONE_S``."""

    def __init__(self, folder: str) -> None:
        self.spec, self.missed = os.path.join(folder, "spec.json"), 0.0

    def __call__(self) -> bool:
        try:
            os.stat(self.spec)
        except FileNotFoundError:
            self.missed = self.missed or time.monotonic()
            return time.monotonic() - self.missed > GONE_S
        except OSError:
            pass
        self.missed = 0.0
        return False


def supervisors(folder: str) -> List[int]:
    """Pids of a job's supervisor: processes that carry its folder but no record of locks (``HOLDS``)."""
    if not os.path.isdir("/proc/self"):
        pid = (last_status(folder) or {}).get("supervisor")
        return [pid] if pid and lock_held(folder) else []
    found = [(pid, process_environment(pid)) for pid in processes()]
    return [pid for pid, its in found if its.get(MARK) == folder and HOLDS not in its]


def supervisor_lives(folder: str, status: Answer) -> bool:
    """Whether a job's supervisor is alive; until it has written its pid, whether the lock is held."""
    if status.get("boot_id") != boot_id():
        return False
    if status.get("supervisor") and os.path.isdir("/proc/self"):
        return job_folder_of(status["supervisor"]) == folder
    return lock_held(folder)
