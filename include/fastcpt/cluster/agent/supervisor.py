"""The process that runs one job to its end and records how it ended."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import List, Optional

from fastcpt.cluster.agent.files import Answer, json_or_none, unlink, write_if_room
from fastcpt.cluster.agent.gpu_locks import wait_for
from fastcpt.cluster.agent.job_folder import LOG_FLAGS, Removed, forget_secrets, last_status
from fastcpt.cluster.agent.processes import (
    DEADLINE,
    HEARTBEAT_S,
    HOLDS,
    boot_id,
    end_group,
    end_strays,
    signal_quietly,
)
from fastcpt.cluster.agent.rent import keep_watched

PR_SET_CHILD_SUBREAPER = 36


def supervise(folder: str, lock: Optional[int]) -> None:
    """Run job.sh to its end, and write the final status once all its processes are gone.

    Without a ``lock`` it runs under Slurm, which may run it again (a requeue).
    """
    spec = json_or_none(os.path.join(folder, "spec.json"), dict)
    status: Answer = {"state": "starting", "started": (last_status(folder) or {}).get("started")}
    status.update(name=spec["name"], supervisor=os.getpid(), boot_id=boot_id())
    status.update(host=os.uname().nodename)
    ending: List[float] = []
    signal.signal(signal.SIGTERM, lambda number, frame: ending.append(time.monotonic()))
    if lock is not None:
        os.set_inheritable(lock, False)
    if sys.platform.startswith("linux"):
        # the job's orphans become children of this process, so it can reap them
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    locks = [wait_for(path, folder, status, ending) for path in spec["locks"]]
    began = time.monotonic()
    try:
        code = None if ending else run_job(folder, lock, spec, status, ending)
    except OSError as error:
        code = None
        status["why"] = f"it could not be started: {error}"
    else:
        status["why"] = "ended from outside"
    end_strays(folder)
    for shared in locks:
        if shared >= 0:
            os.close(shared)
    status.update(exit_code=code, ended=time.time(), seconds=round(time.monotonic() - began, 1))
    if code is None or (ending and code):
        # `stop` writes a file of its own; anything else may be a host going down
        status["state"] = "lost"
    else:
        status["state"] = "succeeded" if code == 0 else "failed"
        status.pop("why")
    if lock is not None or status["state"] != "lost":
        forget_secrets(folder)
    unlink(os.path.join(folder, "reserve"))
    removed = Removed(folder)
    while (
        not write_if_room(os.path.join(folder, "status.json"), status)
        and not ending
        and not removed()
    ):
        time.sleep(1)


def run_job(
    folder: str, lock: Optional[int], spec: Answer, status: Answer, ending: List[float]
) -> Optional[int]:
    """The exit code of job.sh; None if it was ended because this process was asked to end."""
    environment = {**os.environ, HOLDS: "\n".join([boot_id(), str(os.getpid()), *spec["locks"]])}
    if "ends" in spec:
        environment[DEADLINE] = str(spec["ends"])
    environment.update(json_or_none(os.path.join(folder, "secrets.json"), dict) or {})
    with open(os.open(os.path.join(folder, "job.log"), LOG_FLAGS, 0o600), "ab") as log:
        job = subprocess.Popen(
            ["bash", os.path.join(folder, "job.sh")],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
            cwd=folder,
        )
    if lock is not None:
        forget_secrets(folder)
    status.update(state="running", pid=job.pid, running_since=time.time())
    removed = Removed(folder)
    noted, tried, looked = False, -HEARTBEAT_S, 0.0
    while job.poll() is None and not ending:
        if not noted and time.monotonic() - tried > HEARTBEAT_S:
            tried = time.monotonic()
            noted = write_if_room(os.path.join(folder, "status.json"), status)
        if removed():
            ending.append(time.monotonic())
        if time.monotonic() - looked > HEARTBEAT_S:
            looked = time.monotonic()
            with suppress(OSError):
                keep_watched()
        time.sleep(0.2)
    code = job.poll()
    if code is None:
        end_group(job)
    # kill what the job left behind in its process group
    signal_quietly(os.killpg, job.pid, signal.SIGKILL)
    return code
