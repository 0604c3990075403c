"""Finds a job's processes by their environment, and ends them.

They carry the job's folder, so they are found even outside its process group. The search reads
``/proc``; a host without it (not Linux) shows none.
"""

import contextlib
import os
import signal
import subprocess
import time
from typing import Callable, Dict, Iterator, List, Optional

HEARTBEAT_S = 5.0
# Training saves a checkpoint on SIGTERM; with 20 s for it, everything has ended within 30.
GRACE_S = 20.0
# Environment variables: a job's folder; in the job's own processes also who holds which locks.
MARK = "FASTCPT_JOB"
HOLDS = "FASTCPT_HOLDS"
# When the host's money is spent, in seconds since the epoch by its clock; a training ends before.
DEADLINE = "FASTCPT_DEADLINE"


def boot_id() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""


def processes() -> Iterator[int]:
    """All pids but this process's; none on a host without /proc."""
    if os.path.isdir("/proc/self"):
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) != os.getpid():
                yield int(entry)


def process_environment(pid: int) -> Dict[str, str]:
    """A process's environment at its start; empty if it has ended or belongs to another user."""
    try:
        with open(f"/proc/{pid:d}/environ", "rb") as file:
            entries = os.fsdecode(file.read()).split("\0")
    except OSError:
        return {}
    pairs = [entry.partition("=") for entry in entries]
    return {name: value for name, _, value in pairs}


def job_folder_of(pid: int) -> str:
    """The folder of the job that a process belongs to, or "".

    Not the job's name: another orchestrator with another root may use the same one.
    """
    return process_environment(pid).get(MARK, "")


def processes_of(folder: str) -> List[int]:
    return [pid for pid in processes() if job_folder_of(pid) == folder]


def parent_of(pid: int) -> int:
    """The parent's pid; 0 if the process has ended."""
    try:
        with open(f"/proc/{pid:d}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def ranks_of(folder: str) -> List[int]:
    """The training processes that the job's launcher started, without their children."""
    ranks = {pid for pid in processes_of(folder) if "RANK" in process_environment(pid)}
    return [pid for pid in ranks if parent_of(pid) not in ranks]


def stands_still(pid: Optional[int]) -> bool:
    """Whether a process was stopped (SIGSTOP)."""
    try:
        with open(f"/proc/{pid or 0:d}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False


def end_strays(folder: str) -> None:
    """Kill every other process that carries the job's folder, such as those that outlived its supervisor."""
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
    """Send SIGTERM to a process group, and SIGKILL to what is left of it after ``GRACE_S``."""
    until = time.monotonic() + GRACE_S
    signal_quietly(os.killpg, job.pid, signal.SIGTERM)
    # the shell that leads the group ends at once, its training once it has saved
    while (job.poll() is None or group_lives(job.pid)) and time.monotonic() < until:
        time.sleep(0.1)
    signal_quietly(os.killpg, job.pid, signal.SIGKILL)
    job.wait()


def group_lives(group: int) -> bool:
    """Whether a process group still has processes after its leader ended."""
    try:
        # reap those that became this process's children
        while os.waitpid(-group, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # what macOS raises for zombies
        return False
    return True
