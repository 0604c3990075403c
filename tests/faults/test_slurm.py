"""The same protocol with Slurm as the launcher, on a real two-node cluster."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path
from typing import Any

import pytest

from fastcpt.cluster import jobs
from fastcpt.cluster.remote import ClusterError, Remote, ask
from faults.machines import Slurm, Training, alive, eventually

pytestmark = pytest.mark.faults


def poll(to: Remote, root: Path, name: str) -> dict[str, Any]:
    asked = [{"name": name, "seen": 0}]
    return dict(ask(to, "poll", root=str(root), jobs=asked)["jobs"][0])


def state(to: Remote, root: Path, name: str) -> str:
    return str(poll(to, root, name)["status"]["state"])


def slurm_id(root: Path, name: str) -> str:
    return str(json.loads((root / "jobs" / name / "spec.json").read_text())["slurm_id"])


def job_of(name: str, training: Training, steps: int, **options: Any) -> jobs.Job:
    return jobs.Job(
        name,
        [training.command(steps, 0.5)],
        result=training.result,
        secrets={"HF_TOKEN": "hf_secret"},
        slurm=jobs.SlurmOptions(**{"partition": "main", **options}),
    )


def test_a_job_runs_and_is_found_again(slurm: Slurm, training: Training, tmp_path: Path) -> None:
    job = job_of("a", training, 12)
    assert jobs.submit(slurm.remote, str(tmp_path), job, "one") == "started"
    training.wait_for_step(2)
    assert jobs.submit(slurm.remote, str(tmp_path), job, "two") == "running"
    eventually(lambda: state(slurm.remote, tmp_path, "a") == "succeeded", 60)
    log = base64.b64decode(poll(slurm.remote, tmp_path, "a")["log"]).decode()
    assert log.splitlines() == [f"step {step}" for step in range(1, 13)]
    assert training.numbers("starts") == [0]
    assert jobs.submit(slurm.remote, str(tmp_path), job, "three") == "complete"
    assert not [
        path for path in tmp_path.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()
    ]


def test_options_that_slurm_refuses_are_told(
    slurm: Slurm, training: Training, tmp_path: Path
) -> None:
    with pytest.raises(ClusterError, match=r"sbatch refused the job: .*partition"):
        jobs.submit(slurm.remote, str(tmp_path), job_of("b", training, 1, partition="gpus"))


def test_a_job_that_is_pending_for_long_waits(
    slurm: Slurm, training: Training, tmp_path: Path
) -> None:
    job = job_of("c", training, 3, extra_lines=["--begin=now+30"])
    jobs.submit(slurm.remote, str(tmp_path), job)
    time.sleep(5)
    status = poll(slurm.remote, tmp_path, "c")["status"]
    assert (status["state"], status["why"]) == ("waiting", "Slurm: PENDING, BeginTime")
    assert jobs.submit(slurm.remote, str(tmp_path), job) == "running"
    eventually(lambda: state(slurm.remote, tmp_path, "c") == "succeeded", 90)
    assert training.numbers("starts") == [0]


def test_a_requeued_job_goes_on_from_its_checkpoint(
    slurm: Slurm, training: Training, tmp_path: Path
) -> None:
    jobs.submit(slurm.remote, str(tmp_path), job_of("d", training, 30))
    training.wait_for_step(12)
    number = slurm_id(tmp_path, "d")
    slurm.call("scontrol", "requeue", number)
    eventually(lambda: state(slurm.remote, tmp_path, "d") == "waiting", 30)
    # Slurm itself waits two minutes before it starts a requeued job
    eventually(
        lambda: (
            "requeued" not in slurm.call("scontrol", "update", f"JobId={number}", "StartTime=now")
        ),
        5,
    )
    eventually(lambda: state(slurm.remote, tmp_path, "d") == "succeeded", 240, 1)
    starts = training.numbers("starts")
    assert len(starts) == 2
    assert starts[1] >= 10
    assert training.never_twice


def test_scancel_is_final(slurm: Slurm, training: Training, tmp_path: Path) -> None:
    jobs.submit(slurm.remote, str(tmp_path), job_of("e", training, 1000))
    training.wait_for_step(3)
    slurm.call("scancel", slurm_id(tmp_path, "e"))
    eventually(lambda: state(slurm.remote, tmp_path, "e") == "cancelled", 60)
    answer = poll(slurm.remote, tmp_path, "e")
    with pytest.raises(jobs.JobCancelled, match="clear the task to start it again"):
        jobs.outcome(slurm.remote, "e", answer["status"], [])
    (pid,) = training.numbers("pids")
    eventually(lambda: not alive(pid), 30)


def test_a_job_killed_for_time_goes_on_by_retry(
    slurm: Slurm, training: Training, tmp_path: Path
) -> None:
    # Slurm's shortest limit is a minute
    job = job_of("f", training, 150, time_limit="1")
    jobs.submit(slurm.remote, str(tmp_path), job)
    eventually(lambda: state(slurm.remote, tmp_path, "f") == "lost", 240, 1)
    with pytest.raises(jobs.JobLost, match="at its time limit"):
        jobs.outcome(slurm.remote, "f", poll(slurm.remote, tmp_path, "f")["status"], [])
    assert jobs.submit(slurm.remote, str(tmp_path), job) == "started"
    training.wait_for_step(150, 120)
    assert training.numbers("starts")[1] >= 80
    assert training.never_twice


def test_stopping_ends_the_job_in_slurm(slurm: Slurm, training: Training, tmp_path: Path) -> None:
    jobs.submit(slurm.remote, str(tmp_path), job_of("g", training, 1000), "one")
    training.wait_for_step(3)
    (pid,) = training.numbers("pids")
    jobs.stop(slurm.remote, str(tmp_path), "g", "somebody else")
    assert alive(pid)
    began = time.monotonic()
    jobs.stop(slurm.remote, str(tmp_path), "g", "one")
    assert time.monotonic() - began < 30
    assert not alive(pid)
    status = poll(slurm.remote, tmp_path, "g")["status"]
    assert (status["state"], status["stopped_for"]) == ("cancelled", "one")


def test_two_nodes_run_one_training_together(slurm: Slurm, tmp_path: Path) -> None:
    program = "import sys; print(*sys.argv[1:], open(sys.argv[3]).read().split(), flush=True)"
    command = [
        *("python3", "supervisor.py", "on-hosts", "2", ""),
        *("python3", "-c", program, "{node_rank}", "{master_addr}", "{hostfile}"),
    ]
    options = jobs.SlurmOptions(extra_lines=["--nodes=2"])
    jobs.submit(slurm.remote, str(tmp_path), jobs.Job("h", [command], slurm=options))
    eventually(lambda: state(slurm.remote, tmp_path, "h") == "succeeded", 60)
    lines = base64.b64decode(poll(slurm.remote, tmp_path, "h")["log"]).decode().splitlines()
    hostfile = tmp_path / "jobs" / "h" / "hostfile"
    slots = ["n1", "slots=1", "n2", "slots=1"]
    assert sorted(lines) == [f"{rank} n1 {hostfile} {slots}" for rank in (0, 1)]
