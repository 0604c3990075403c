"""The requests about jobs: start or find one, poll, end it."""

import base64
import os
import signal
import subprocess
import sys
import time
from functools import lru_cache
from typing import Callable, Dict, List, Optional

from fastcpt.cluster.agent.files import Answer, expand, json_or_none, write_if_room
from fastcpt.cluster.agent.gpu_locks import shared_locks
from fastcpt.cluster.agent.job_folder import (
    ACTIVE,
    LOG_FLAGS,
    Door,
    begin_folder,
    forget_secrets,
    job_folder,
    last_status,
    lock_held,
    owners,
    spec_of,
    supervisor_lives,
    supervisors,
    take_lock,
    touch_named,
)
from fastcpt.cluster.agent.processes import (
    GRACE_S,
    MARK,
    boot_id,
    end_strays,
    processes_of,
    signal_quietly,
    stands_still,
)
from fastcpt.cluster.agent.rent import SPENT, jobs_end_in, rent_here
from fastcpt.cluster.agent.slurm import (
    NO_CONTROLLER,
    Queue,
    run_slurm,
    sbatch,
    scancel,
    squeue,
    state_in_slurm,
)

LOG_PIECE = 1024 * 1024
ANSWER_PIECES = 8


def submit(
    root: str,
    name: str,
    script: str,
    digest: str,
    secrets: Dict[str, str],
    result: Optional[str],
    alone: str,
    owner: str = "",
    slurm: Optional[List[str]] = None,
    extra_lines: Optional[List[str]] = None,
) -> Answer:
    """Start a job, or find it running, or complete by its result file.

    ``digest`` identifies what the job does: a running job of the same name with another digest is
    ended first. ``alone`` (no, root, host) says which other jobs it excludes. ``owner`` is the try
    that asks; it may later end what it started or found, and nothing else. ``slurm`` are options of
    sbatch: with them Slurm runs the job and allocates the GPUs.
    """
    rent = rent_here()
    ends_in = jobs_end_in(rent) if rent else None
    if ends_in is not None and ends_in <= 0:
        return {"error": f"no time is left for job {name}: {SPENT}"}
    folder = job_folder(root, name)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    touch_named(root, script, folder)
    with Door(folder):
        status = job_state(folder)
        if status["state"] in ACTIVE:
            spec = spec_of(folder)
            if spec.get("digest") == digest:
                if not write_if_room(os.path.join(folder, "owners.json"), [*owners(folder), owner]):
                    return {"unavailable": f"no room in {folder} to note the owner of job {name}"}
                return {"found": "running", "folder": folder}
        if status["state"] in ACTIVE or processes_of(folder):
            answer = end_job(folder, owner)
            if "unavailable" in answer:
                return answer
            if not answer["ended"]:
                return {"error": f"job {name} is running and could not be ended"}
        if result and os.path.exists(expand(result)):
            return {"found": "complete", "folder": folder}
        lock = take_lock(folder)
        if lock is None:
            return {"error": f"a supervisor of job {name} is alive and could not be ended"}
        waiting = slurm is not None
        spec = {"name": name, "digest": digest, "locks": shared_locks(root, alone)}
        if ends_in is not None:
            spec["ends"] = time.time() + ends_in
        begin_folder(folder, owner, script, spec, secrets, waiting)
        if slurm is not None:
            os.close(lock)
            return sbatch(folder, spec, slurm, extra_lines or [])
        start_supervisor(folder, lock)
    return {"found": "started", "folder": folder}


def start_supervisor(folder: str, lock: int) -> None:
    """Start a job's supervisor in its own session; it inherits the job's ``lock``."""
    complaints = os.open(os.path.join(folder, "supervisor.log"), LOG_FLAGS, 0o600)
    subprocess.Popen(
        [sys.executable, os.path.join(folder, "supervisor.py"), folder, str(lock)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=complaints,
        start_new_session=True,
        pass_fds=[lock],
        env={**os.environ, MARK: folder},
        cwd=folder,
    )


def job_state(folder: str, queue: Callable[[], Queue] = lambda: squeue()) -> Answer:
    """The job's status: what its supervisor wrote, checked against the processes that exist."""
    status = last_status(folder)
    spec = spec_of(folder)
    if spec.get("slurm_id"):
        status = state_in_slurm(status or {"state": "waiting"}, spec["slurm_id"], queue())
    elif status is None:
        if not lock_held(folder):
            return {"state": "absent", "why": "there is no status of it any more"}
        status = {"state": "running", "why": "its status.json is damaged"}
    elif status["state"] in ACTIVE and not supervisor_lives(folder, status):
        # it may have ended in between: read again
        status = last_status(folder) or status
        if status["state"] in ACTIVE:
            rebooted = status.get("boot_id") != boot_id()
            status["state"] = "lost"
            status["why"] = "the host was rebooted" if rebooted else "its supervisor is gone"
    elif status["state"] in ACTIVE and stands_still(status.get("supervisor")):
        again = f"kill -CONT {status['supervisor']:d}"
        status["why"] = "its supervisor is stopped and sees nothing; go on with: " + again
    stopped = json_or_none(os.path.join(folder, "stopped.json"), dict)
    if stopped and status["state"] in ("lost", "cancelled"):
        status.update(stopped)
    return status


def poll(root: str, jobs: List[Answer]) -> Answer:
    """Status and next piece of log for each of ``jobs`` ({name, seen}); ``error`` for an unreadable one.

    ``seen`` is how many bytes of the log the reader has. It is stored here, so a restarted reader
    passes None and continues where the last one stopped. ``cut`` says that the log is now shorter
    than ``seen``; it is then read from its start.
    """
    queue = lru_cache(maxsize=None)(squeue)
    answers: List[Answer] = []
    budget = ANSWER_PIECES * LOG_PIECE
    for job in jobs:
        folder = job_folder(root, job["name"])
        try:
            # the state before the log: so the log of an ended job is complete
            status = job_state(folder, queue)
            answer = next_piece(folder, job["seen"], budget)
        except (OSError, ValueError, TypeError, KeyError) as error:
            # one job's damaged files must not hide the others
            answers.append({"error": f"{type(error).__name__} in {folder}: {error}"})
            continue
        piece = answer["log"]
        budget -= len(piece)
        answers.append({**answer, "status": status, "log": base64.b64encode(piece).decode()})
    return {"jobs": answers}


def next_piece(folder: str, seen: Optional[int], most: int) -> Answer:
    """The next bytes of a job's log, at most ``most``, as ``{log, seen, size}``."""
    kept, log = os.path.join(folder, "seen"), os.path.join(folder, "job.log")
    before = max(0, json_or_none(kept, int) or 0)
    if seen is None:
        seen = before
    size = os.path.getsize(log) if os.path.exists(log) else 0
    answer: Answer = {"size": size}
    if size < seen:
        answer["cut"], seen = seen, 0
    if seen != before and os.path.isdir(folder):
        write_if_room(kept, seen)
    piece = b""
    if size:
        with open(log, "rb") as file:
            file.seek(seen)
            piece = file.read(min(LOG_PIECE, most))
    return {**answer, "seen": seen, "log": piece}


def stop(root: str, name: str, owner: Optional[str] = None) -> Answer:
    """End a job and all its processes: ``{ended, was}``, whether it ended and its state before.

    A job that ``owner`` neither started nor found is left alone: it belongs to a later try. A job
    without a folder is ended through its processes' environment.
    """
    folder = job_folder(root, name)
    with Door(folder):
        if owner is not None and os.path.isdir(folder) and owner not in owners(folder):
            return {"ended": True, "left_alone": True}
        return end_job(folder, owner or "")


def end_job(folder: str, owner: str) -> Answer:
    """Signal first, then write notes if the disk has room."""
    status = job_state(folder)
    active = status["state"] in ACTIVE
    stopped = {"state": "cancelled", "stopped_for": owner}
    spec = spec_of(folder)
    if spec.get("slurm_id"):
        run_slurm(["scancel", "--batch", "--signal=TERM", spec["slurm_id"]], {})
        if active and squeue() is not None:
            write_if_room(os.path.join(folder, "stopped.json"), stopped)
        gone = scancel(spec["slurm_id"])
        if gone is None:
            return {"unavailable": NO_CONTROLLER}
        if gone:
            end_strays(folder)
            forget_secrets(folder)
        return {"ended": gone, "was": status["state"]}
    told: List[int] = []
    noted = not active
    until = time.monotonic() + GRACE_S + 2
    while time.monotonic() < until:
        there = supervisors(folder)
        for pid in there:
            if pid not in told:
                signal_quietly(os.kill, pid, signal.SIGTERM)
                signal_quietly(os.kill, pid, signal.SIGCONT)
                told.append(pid)
        if told and not noted:
            noted = write_if_room(os.path.join(folder, "stopped.json"), stopped)
        # a held lock without a supervisor: it is just starting
        if not there and not lock_held(folder):
            break
        time.sleep(0.1)
    end_strays(folder)
    if processes_of(folder) or lock_held(folder):
        return {"ended": False, "was": status["state"]}
    forget_secrets(folder)
    if not noted:
        write_if_room(os.path.join(folder, "stopped.json"), stopped)
    left = last_status(folder)
    if active and left and left["state"] in ACTIVE:
        write_if_room(os.path.join(folder, "status.json"), {**left, **stopped})
    return {"ended": True, "was": status["state"]}
