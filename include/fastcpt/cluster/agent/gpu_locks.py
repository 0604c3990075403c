"""Locks on the GPUs: jobs that exclude each other take turns."""

import fcntl
import os
import signal
import time
from typing import List

from fastcpt.cluster.agent.files import Answer, expand, write_if_room
from fastcpt.cluster.agent.job_folder import Removed
from fastcpt.cluster.agent.processes import (
    HOLDS,
    MARK,
    boot_id,
    job_folder_of,
    process_environment,
    processes,
    signal_quietly,
)


def shared_locks(root: str, alone: str) -> List[str]:
    """The lock files that a job holds while it runs: for its root, and for all roots on this host."""
    of_root = os.path.join(os.path.realpath(expand(root)), "gpus.lock")
    # several hosts may share a home
    of_host = expand(f"~/.fast_cpt/gpus-{os.uname().nodename}.lock")
    return {"no": [], "root": [of_root], "host": [of_root, of_host]}[alone]


def same_file(lock: int, path: str) -> bool:
    """Whether the lock's descriptor is the file at its path: somebody may have removed the file."""
    try:
        there = os.stat(path)
    except OSError:
        return False
    return os.path.samestat(there, os.fstat(lock))


def write_holder(lock: int, name: str) -> None:
    """Write the holder's name into the lock, for the jobs that wait; skipped on a full disk."""
    try:
        os.ftruncate(lock, 0)
        os.pwrite(lock, name.encode(), 0)
    except OSError:
        pass


def wait_for(path: str, folder: str, status: Answer, ending: List[float]) -> int:
    """Wait until a shared lock is taken or the job is asked to end; the lock's descriptor."""
    lock, told = -1, ""
    removed = Removed(folder)
    while not ending:
        try:
            if lock < 0:
                os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
                lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not same_file(lock, path):
                os.close(lock)
                lock = -1
                continue
            holder = os.path.basename(other_holder(path, folder))
            if not holder:
                write_holder(lock, status["name"])
                break
            why = f"job {holder} has the GPUs ({path})"
        except BlockingIOError:
            holder = os.pread(lock, 1024, 0).decode(errors="replace")
            why = f"job {holder} has the GPUs ({path})"
        except OSError as error:
            why = str(error)
        status.update(state="waiting", why=why)
        if why != told and write_if_room(os.path.join(folder, "status.json"), status):
            told = why
        if removed():
            ending.append(time.monotonic())
        time.sleep(0.5)
    status.pop("why", None)
    return lock


def other_holder(lock: str, folder: str) -> str:
    """The folder of another job that runs under a lock, even if the lock's file was removed; or "".

    A process without a supervisor is killed: it holds the GPUs and nobody else would end it.
    """
    for pid in processes():
        environment = process_environment(pid)
        boot, supervisor, *locks = environment.get(HOLDS, "\n").split("\n")
        other = environment.get(MARK, "")
        if lock in locks and other != folder:
            if boot == boot_id() and job_folder_of(int(supervisor)) != other:
                signal_quietly(os.kill, pid, signal.SIGKILL)
            return other
    return ""
