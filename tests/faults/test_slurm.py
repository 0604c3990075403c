"""The same protocol with Slurm as the launcher, on a real two-node cluster."""

from __future__ import annotations

import base64
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fastcpt.cluster import jobs
from fastcpt.cluster.remote import ClusterError, ConnectionLost, Remote, ask
from fastcpt.recipe import load_recipe
from fastcpt.training import commands
from faults.machines import (
    RANK,
    REPOSITORY,
    Training,
    Watch,
    alive,
    eventually,
    free_port,
)
from faults.slurm_cluster import Slurm

pytestmark = [pytest.mark.faults, pytest.mark.linux("network namespaces, mounts, Slurm, /proc")]


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
    lines = ["--comment=typed"]
    training.hold(12)
    job = job_of("a", training, 12, account="law", time_limit="00:10:00", extra_lines=lines)
    assert jobs.submit(slurm.remote, str(tmp_path), job, "one") == "started"
    # the recipe's options have reached Slurm
    facts = slurm.call("scontrol", "show", "job", slurm_id(tmp_path, "a"))
    for wanted in ("Account=law", "Partition=main", "TimeLimit=00:10:00", "Comment=typed"):
        assert wanted in facts
    training.wait_for_step(2)
    assert jobs.submit(slurm.remote, str(tmp_path), job, "two") == "running"
    training.release()
    eventually(lambda: state(slurm.remote, tmp_path, "a") == "succeeded", 120)
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
    slurm: Slurm, training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of("c", training, 3, extra_lines=["--begin=now+60"])
    jobs.submit(slurm.remote, str(tmp_path), job)
    watch = Watch(monkeypatch, slurm.remote, tmp_path, "c")
    # the task's log says why, once
    eventually(lambda: "waiting: Slurm: PENDING, BeginTime" in watch.lines, 50)
    assert jobs.submit(slurm.remote, str(tmp_path), job) == "running"
    assert not training.numbers("starts")
    assert watch.wait(240)["status"]["state"] == "succeeded"
    assert watch.lines.count("waiting: Slurm: PENDING, BeginTime") == 1
    assert watch.steps == [1, 2, 3]
    assert training.numbers("starts") == [0]


def test_a_requeued_job_goes_on_from_its_checkpoint(
    slurm: Slurm, training: Training, tmp_path: Path
) -> None:
    training.hold(13)
    jobs.submit(slurm.remote, str(tmp_path), job_of("d", training, 30))
    training.wait_for_step(12)
    number = slurm_id(tmp_path, "d")
    slurm.call("scontrol", "requeue", number)
    eventually(lambda: state(slurm.remote, tmp_path, "d") == "waiting", 90)
    training.release()
    # Slurm itself waits two minutes; within a second the node still refuses the old credential
    start = ("scontrol", "update", f"JobId={number}", "StartTime=now+3")
    eventually(lambda: "requeued" not in slurm.call(*start), 30)
    eventually(lambda: state(slurm.remote, tmp_path, "d") == "succeeded", 240, 1)
    assert training.numbers("starts") == [0, 10]
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
    # Slurm's shortest limit is a minute, and it looks twice a minute
    job = job_of("f", training, 1000, time_limit="1")
    jobs.submit(slurm.remote, str(tmp_path), job)
    eventually(lambda: state(slurm.remote, tmp_path, "f") == "lost", 240, 1)
    reached, saved = max(training.numbers("steps")), training.checkpoint
    with pytest.raises(jobs.JobLost, match="at its time limit"):
        jobs.outcome(slurm.remote, "f", poll(slurm.remote, tmp_path, "f")["status"], [])
    assert jobs.submit(slurm.remote, str(tmp_path), job) == "started"
    training.wait_for_step(reached + 3)
    assert training.numbers("starts") == [0, saved]
    assert training.never_twice
    jobs.stop(slurm.remote, str(tmp_path), "f")


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


def test_stopping_a_job_that_is_pending_says_for_whom(
    slurm: Slurm, training: Training, tmp_path: Path
) -> None:
    job = job_of("j", training, 3, extra_lines=["--begin=now+600"])
    jobs.submit(slurm.remote, str(tmp_path), job, "one")
    jobs.stop(slurm.remote, str(tmp_path), "j", "one")
    status = poll(slurm.remote, tmp_path, "j")["status"]
    assert (status["state"], status["stopped_for"]) == ("cancelled", "one")
    assert not (tmp_path / "jobs" / "j" / "secrets.json").exists()


def test_a_stop_while_the_controller_is_down_is_asked_again(
    slurm: Slurm, training: Training, tmp_path: Path
) -> None:
    jobs.submit(slurm.remote, str(tmp_path), job_of("i", training, 1000), "one")
    training.wait_for_step(3)
    (pid,) = training.numbers("pids")
    secrets = tmp_path / "jobs" / "i" / "secrets.json"
    slurm.end_controller()
    try:
        with pytest.raises(ConnectionLost, match="Slurm's controller does not answer"):
            ask(slurm.remote, "stop", root=str(tmp_path), name="i", owner="one")
        # Slurm may still start it again: it runs on, and has what it needs
        assert alive(pid)
        assert secrets.exists()
        assert state(slurm.remote, tmp_path, "i") == "running"
        stopping = threading.Thread(
            target=jobs.stop, args=(slurm.remote, str(tmp_path), "i", "one")
        )
        stopping.start()
        time.sleep(10)
        assert stopping.is_alive()
    finally:
        slurm.start_controller()
    stopping.join(120)
    assert not stopping.is_alive()
    eventually(lambda: not alive(pid), 5)
    assert not secrets.exists()
    status = poll(slurm.remote, tmp_path, "i")["status"]
    assert (status["state"], status["stopped_for"]) == ("cancelled", "one")


def test_two_nodes_run_one_training_together(slurm: Slurm, tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    overrides = {"cluster.gpus": 4, "cluster.launcher": "slurm", "cluster.cpu_only": True}
    recipe = load_recipe("sample", overrides)
    at = commands.Host(str(REPOSITORY / ".env/cluster/bin/python"), str(REPOSITORY), "recipe.yaml")
    command = [*commands.launch(recipe, at, free_port()), str(tmp_path / "rank.py"), str(tmp_path)]
    environment = {**commands.environment(recipe, at), "NOTE": "there", "BEATS": "1"}
    options = jobs.SlurmOptions(extra_lines=["--nodes=2"])
    jobs.submit(slurm.remote, str(tmp_path), jobs.Job("h", [command], environment, slurm=options))
    eventually(lambda: state(slurm.remote, tmp_path, "h") not in jobs.ACTIVE, 400)
    answer = poll(slurm.remote, tmp_path, "h")
    log = base64.b64decode(answer["log"]).decode()
    assert answer["status"]["state"] == "succeeded", log
    told = sorted(line for line in log.splitlines() if line.startswith("rank "))
    assert told == [f"rank {rank} of 4 at 127.0.0.1 there" for rank in range(4)]
    assert (tmp_path / "jobs" / "h" / "hostfile").read_text().split() == [
        *("127.0.0.1", "slots=2", "127.0.0.2", "slots=2")
    ]
