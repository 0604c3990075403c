"""Processes of jobs, found by what they carry in their environment, and how they are ended.

A job's own processes carry its folder, so they are found wherever they fled to; they are looked for
in ``/proc``, and a host without it (no Linux) shows none.
"""

import contextlib
import os
import signal
import subprocess
import time
from typing import Callable, Dict, Iterator, List, Optional

HEARTBEAT_S = 5.0
# Training saves a checkpoint on SIGTERM; 20 s keep the promise that all has ended within 30.
GRACE_S = 20.0
# In the environment of what belongs to a job: its folder; of its own processes: who holds which locks.
MARK = "FASTCPT_JOB"
HOLDS = "FASTCPT_HOLDS"
# In a job's environment: when its host's money is spent, seconds since the epoch there; a training ends before.
DEADLINE = "FASTCPT_DEADLINE"


def boot_id() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""


def processes() -> Iterator[int]:
    """All but this one; none on a host without /proc."""
    if os.path.isdir("/proc/self"):
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) != os.getpid():
                yield int(entry)


def environment_of(pid: int) -> Dict[str, str]:
    """A process's environment at its start; empty where it has ended or is somebody else's."""
    try:
        with open(f"/proc/{pid:d}/environ", "rb") as file:
            entries = os.fsdecode(file.read()).split("\0")
    except OSError:
        return {}
    pairs = [entry.partition("=") for entry in entries]
    return {name: value for name, _, value in pairs}


def job_of(pid: int) -> str:
    """The folder of the job that a process belongs to; empty for any other.

    Not its name: another orchestrator's job with another root may have the same one.
    """
    return environment_of(pid).get(MARK, "")


def processes_of(folder: str) -> List[int]:
    return [pid for pid in processes() if job_of(pid) == folder]


def parent_of(pid: int) -> int:
    """The parent's pid; 0 where the process has ended."""
    try:
        with open(f"/proc/{pid:d}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def ranks_of(folder: str) -> List[int]:
    """The processes of a job's training that its launcher started; without their own children."""
    ranks = {pid for pid in processes_of(folder) if "RANK" in environment_of(pid)}
    return [pid for pid in ranks if parent_of(pid) not in ranks]


def stands_still(pid: Optional[int]) -> bool:
    """Whether a process was stopped (SIGSTOP)."""
    try:
        with open(f"/proc/{pid or 0:d}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False


def end_strays(folder: str) -> None:
    """Kill every other process that carries the job's mark: what outlived its supervisor or it."""
    for _ in range(50):
        alive = processes_of(folder)
        if not alive:
            return
        for pid in alive:
            signal_quietly(os.kill, pid, signal.SIGKILL)
        time.sleep(0.1)


def signal_quietly(send: Callable[[int, int], None], target: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        send(target, number)


def end_group(job: "subprocess.Popen[bytes]") -> None:
    """SIGTERM to a process group, SIGKILL to what is left of it after the grace."""
    until = time.monotonic() + GRACE_S
    signal_quietly(os.killpg, job.pid, signal.SIGTERM)
    # the shell that leads the group ends at once, its training when it has saved
    while (job.poll() is None or group_lives(job.pid)) and time.monotonic() < until:
        time.sleep(0.1)
    signal_quietly(os.killpg, job.pid, signal.SIGKILL)
    job.wait()


def group_lives(group: int) -> bool:
    """Whether a process group whose leader has ended still has processes."""
    try:
        # those that have become this process's children and have ended
        while os.waitpid(-group, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # macOS, where only ended ones are left
        return False
    return True
