"""Jobs under Slurm: the same supervisor runs in the allocation, and the queue knows what it cannot."""

import json
import os
import subprocess
import time
from typing import Dict, List, Optional

from fastcpt.cluster.agent.files import Answer, write_whole
from fastcpt.cluster.agent.job_folder import forget_secrets
from fastcpt.cluster.agent.processes import GRACE_S, MARK

# State and reason of Slurm's jobs by id; None if its controller does not answer
Queue = Optional[Dict[str, List[str]]]
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")
RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "STAGE_OUT", "SIGNALING", "RESIZING")
ENDED = {
    "TIMEOUT": "Slurm ended it at its time limit (cluster.slurm.time_limit)",
    "NODE_FAIL": "its node failed",
    "PREEMPTED": "Slurm preempted it",
    "OUT_OF_MEMORY": "it took more memory than Slurm gave it",
    "BOOT_FAIL": "its node did not start",
    "DEADLINE": "Slurm ended it at its deadline",
}
NO_CONTROLLER = "Slurm's controller does not answer"


def sbatch(folder: str, spec: Answer, options: List[str], extra_lines: List[str]) -> Answer:
    # singleton: Slurm runs one job of a name at a time
    fixed = [
        *("--parsable", "--requeue", "--open-mode=append", "--dependency=singleton"),
        *("--job-name=" + spec["name"], "--chdir=" + folder, "--output=slurm.log"),
    ]
    lines = ["#!/bin/bash"] + ["#SBATCH " + line for line in extra_lines]
    lines.append("exec python3 ./supervisor.py . slurm")
    write_whole(os.path.join(folder, "batch.sh"), "\n".join(lines) + "\n")
    command = ["sbatch", *fixed, *options, os.path.join(folder, "batch.sh")]
    done = run_slurm(command, {MARK: folder}, 60)
    if done.returncode:
        answer = done.stderr.decode(errors="replace").strip()
        if "ontact" in answer or "imed out" in answer:
            return {"unavailable": f"{NO_CONTROLLER}: {answer}"}
        forget_secrets(folder)
        return {"error": "sbatch refused the job: " + answer}
    spec["slurm_id"] = done.stdout.decode().strip().split(";")[0]
    write_whole(os.path.join(folder, "spec.json"), json.dumps(spec))
    return {"found": "started", "folder": folder, "slurm_id": spec["slurm_id"]}


def run_slurm(
    command: List[str], mark: Dict[str, str], patience: float = 15
) -> "subprocess.CompletedProcess[bytes]":
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={**os.environ, **mark},
            timeout=patience,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, b"", b"timed out")


def squeue() -> Queue:
    command = [
        "squeue",
        "--noheader",
        "--states=all",
        f"--user={os.getuid()}",
        "--format=%A|%T|%r",
    ]
    done = run_slurm(command, {})
    if done.returncode:
        return None
    rows = [line.split("|") for line in done.stdout.decode().splitlines()]
    return {row[0]: row[1:] for row in rows}


def state_in_slurm(status: Answer, slurm_id: str, queue: Queue) -> Answer:
    if status["state"] in ("succeeded", "failed"):
        return status
    if queue is None:
        return {**status, "state": "running", "why": NO_CONTROLLER}
    state, reason = queue.get(slurm_id, ["", ""])
    if state in WAITING:
        return {**status, "state": "waiting", "why": f"Slurm: {state}, {reason}"}
    if state in RUNNING:
        return {**status, "state": "running"}
    if state == "CANCELLED":
        return {**status, "state": "cancelled"}
    why = ENDED.get(state, "Slurm: " + (state or "it is not in the queue any more"))
    return {**status, "state": "lost", "why": why}


def scancel(slurm_id: str) -> Optional[bool]:
    """Wait for the end of a job that was sent SIGTERM; cancel it after ``GRACE_S``.

    True if the job has left Slurm's queue, None if the controller does not answer.
    """
    asked = time.monotonic()
    while True:
        queue = squeue()
        if queue is None:
            return None
        state = queue.get(slurm_id, ["gone"])[0]
        waited = time.monotonic() - asked
        if state not in WAITING + RUNNING or waited > GRACE_S + 7:
            return state not in WAITING + RUNNING
        if state in WAITING or waited > GRACE_S:
            run_slurm(["scancel", slurm_id], {})
        time.sleep(0.5)
