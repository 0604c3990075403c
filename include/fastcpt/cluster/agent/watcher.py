"""The dead man's switch of a rented host: ends its jobs and gives it back when nobody else does.

A process in its own session, started before any job: it outlives jobs, supervisors, sshd and the
request that started it. It does not end Slurm's jobs.
"""

import os
import signal
import subprocess
import time
from contextlib import suppress
from typing import List, Optional, Set

from fastcpt.cluster.agent.files import Answer
from fastcpt.cluster.agent.job_folder import ACTIVE, supervisors
from fastcpt.cluster.agent.jobs import job_state
from fastcpt.cluster.agent.processes import processes_of, ranks_of, signal_quietly
from fastcpt.cluster.agent.rent import SPENT, jobs_end_in, rent_here, seconds_left, silence

TICK_S = 1.0
# How long a job may save after it was told to end: 840 GB at 1 GB/s take 14 minutes.
PATIENCE_S = 1800.0
# The release command is repeated after this time if the host is still there.
AGAIN_S = 60.0
COMMAND_S = 300.0


def attend() -> None:
    """Watch until the watch ends or the host is gone."""
    rent = rent_here()
    while rent is not None:
        if why := due(rent, jobs_end_in(rent)):
            if ended := end_jobs(rent):
                log_line(f"{why}: ended {', '.join(map(os.path.basename, ended))}")
            # somebody may have asked, or extended the deadline, while the jobs saved
            rent = rent_here()
            if rent and (why := due(rent, seconds_left(rent))):
                run_release_command(rent, why)
        time.sleep(TICK_S)
        rent = rent_here()


def due(rent: Answer, left: Optional[float]) -> str:
    """Why the host is due, with ``left`` seconds to its deadline; "" while it is not."""
    if left is not None and left <= 0:
        return SPENT
    if rent["orphan_s"] is not None and silence() >= rent["orphan_s"]:
        return f"nobody has asked for {rent['orphan_s'] / 3600:g} hours"
    return ""


def end_jobs(rent: Answer) -> List[str]:
    """Have each job save and end; at the deadline, kill them. The folders of the jobs that ran."""
    found: List[str] = []
    told: Set[str] = set()
    until = time.monotonic() + PATIENCE_S
    while True:
        active = active_jobs(rent)
        found += [folder for folder in active if folder not in found]
        if not active:
            return found
        left = seconds_left(rent)
        over = time.monotonic() > until or (left is not None and left <= 0)
        for folder in active:
            if over:
                for pid in {*processes_of(folder), *supervisors(folder)}:
                    signal_quietly(os.kill, pid, signal.SIGKILL)
            elif folder not in told and tell_to_end(folder):
                told.add(folder)
        if over:
            return found
        time.sleep(0.2)


def active_jobs(rent: Answer) -> List[str]:
    jobs = os.path.join(os.path.realpath(rent["root"]), "jobs")
    try:
        folders = [os.path.join(jobs, name) for name in os.listdir(jobs)]
    except OSError:
        return []
    # processes too: a training continues after its supervisor was killed
    return [one for one in folders if job_state(one)["state"] in ACTIVE or processes_of(one)]


def tell_to_end(folder: str) -> bool:
    """Send SIGTERM to a job; whether there was a process to tell.

    It goes to the ranks, not to their launcher, which would give them only 30 s for a checkpoint.
    """
    told = ranks_of(folder) or supervisors(folder) or processes_of(folder)
    for pid in told:
        signal_quietly(os.kill, pid, signal.SIGTERM)
    return bool(told)


def run_release_command(rent: Answer, why: str) -> None:
    """Run the release command, which should end this host."""
    command: Optional[List[str]] = rent["command"]
    if command:
        log_line(f"{why}: giving this host back")
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, timeout=COMMAND_S)
            log_line(
                f"the release command ended with {done.returncode}, and this host is still there"
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            log_line(f"the release command: {error}")
        time.sleep(AGAIN_S)


def log_line(line: str) -> None:
    """Print to watch.log; on a full disk, do nothing."""
    with suppress(OSError):
        print(time.strftime("%Y-%m-%d %H:%M:%S"), line, flush=True)
