"""Airflow's own processes die, or its user changes their mind, while a job runs on the cluster."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import local_sshd
import pytest

from faults.airflow_processes import SECRET, Airflow
from faults.machines import Host, Training, alive, eventually, sshd_sessions

pytestmark = pytest.mark.linux("network namespaces, mounts, Slurm, /proc")


@pytest.mark.slow
def test_a_killed_triggerer_loses_nothing(airflow: Airflow, training: Training) -> None:
    # what it has shown it has acknowledged when it is killed: it would show the rest again
    training.hold(16)
    run = airflow.train("anywhere", training, steps=60)
    training.wait_for_step(15)
    training.wait_until_shown()
    airflow.kill("triggerer")
    training.release()
    training.wait_for_step(30)
    airflow.start("triggerer")
    assert run.wait("success", "failed")["state"] == "success"
    assert training.numbers("starts") == [0]
    # in order, each once
    assert run.steps_in_log() == list(range(1, 61))
    assert run.task["try_number"] == 1


@pytest.mark.faults
def test_a_killed_scheduler_loses_nothing(airflow: Airflow, training: Training) -> None:
    training.hold(6)
    run = airflow.train("anywhere", training, steps=40)
    training.wait_for_step(5)
    run.wait("deferred")
    airflow.kill("scheduler")
    training.release()
    training.wait_for_step(25)
    airflow.start("scheduler")
    assert run.wait("success", "failed")["state"] == "success"
    assert training.numbers("starts") == [0]


@pytest.mark.faults
def test_a_killed_worker_leaves_the_job_to_the_next_try(
    airflow: Airflow, training: Training
) -> None:
    run = airflow.train("interrupted", training, steps=120)
    note = training.folder / "worker"
    eventually(note.exists, 180)
    training.wait_for_step(3)
    for pid in note.read_text().split():
        os.kill(int(pid), signal.SIGKILL)
    assert run.wait("success", "failed", seconds=240)["state"] == "success"
    assert run.task["try_number"] == 2
    # the retry came while the job still ran: it found it
    assert training.numbers("starts") == [0]
    assert training.never_twice


@pytest.mark.slow
def test_a_killed_training_resumes_from_its_last_checkpoint(
    airflow: Airflow, training: Training
) -> None:
    training.hold(19)
    run = airflow.train("anywhere", training, steps=40)
    training.wait_for_step(18)
    os.kill(training.numbers("pids")[0], signal.SIGKILL)
    training.release()
    assert run.wait("success", "failed")["state"] == "success"
    assert training.numbers("starts") == [0, 15]
    # what was trained twice is less than the interval of five
    assert training.numbers("steps") == [*range(1, 19), *range(16, 41)]
    assert training.never_twice


@pytest.mark.slow
@pytest.mark.parametrize("action", ["mark_failed", "delete"])
def test_ending_the_task_ends_the_job(airflow: Airflow, training: Training, action: str) -> None:
    training.hold(4)
    run = airflow.train("anywhere", training, steps=1000)
    training.wait_for_step(3)
    run.wait("deferred")
    training.wait_until_shown()
    (pid,) = training.numbers("pids")
    getattr(run, action)()
    eventually(lambda: not alive(pid), 30)
    time.sleep(5)
    assert training.numbers("starts") == [0]


@pytest.mark.faults
def test_a_task_marked_failed_while_sshd_is_down_ends_its_job(
    airflow: Airflow, server: dict[str, Any], training: Training
) -> None:
    airflow.connect("away", server)
    training.hold(4)
    run = airflow.train("anywhere", training, steps=1000, connection="away")
    training.wait_for_step(3)
    run.wait("deferred")
    training.wait_until_shown()
    (pid,) = training.numbers("pids")
    os.killpg(server["pid"], signal.SIGKILL)
    for session in sshd_sessions(server["port"]):
        os.kill(session, signal.SIGKILL)
    os.waitpid(server["pid"], 0)
    run.mark_failed()
    time.sleep(45)
    assert alive(pid)
    server.update(local_sshd.start_server(Path(server["key_file"]).parent, port=server["port"]))
    eventually(lambda: not alive(pid), 30)
    assert training.numbers("starts") == [0]


@pytest.mark.faults
def test_a_cleared_task_ends_its_job_and_starts_again(airflow: Airflow, training: Training) -> None:
    training.hold(13)
    run = airflow.train("anywhere", training, steps=60)
    training.wait_for_step(12)
    run.wait("deferred")
    training.wait_until_shown()
    (pid,) = training.numbers("pids")
    run.clear()
    eventually(lambda: not alive(pid), 30)
    training.release()
    assert run.wait("success")["state"] == "success"
    assert len(training.numbers("starts")) == 2
    assert training.never_twice


@pytest.mark.faults
def test_a_task_whose_time_is_over_ends_its_job(airflow: Airflow, training: Training) -> None:
    run = airflow.train("timed", training, steps=1000)
    training.wait_for_step(3)
    (pid,) = training.numbers("pids")[:1]
    eventually(lambda: not alive(pid), 30 + 30)
    eventually(lambda: any("took longer than the task may" in line for line in run.log(1)), 60)
    run.mark_failed()


@pytest.mark.faults
def test_a_rebooted_host_is_trained_on_again_by_retry(
    airflow: Airflow, host: Host, training: Training
) -> None:
    airflow.connect("rebooted", host.facts)
    training.hold(14)
    run = airflow.train("anywhere", training, steps=40, connection="rebooted")
    training.wait_for_step(13)
    run.wait("deferred")
    training.wait_until_shown()
    host.power_off()
    training.release()
    time.sleep(3)
    host.boot()
    assert run.wait("success", "failed")["state"] == "success"
    assert run.task["try_number"] == 2
    assert any("the host was rebooted" in line for line in run.log(1))
    # less than one interval of five steps is trained twice
    assert training.numbers("starts") == [0, 10]
    assert training.never_twice


@pytest.mark.faults
def test_of_two_runs_the_second_waits(airflow: Airflow, training: Training) -> None:
    others = Training(training.folder.parent / "other")
    # one GPU: both tell when the other one runs at the same time
    (others.folder / "gpu").symlink_to(training.folder / "gpu")
    root = training.folder.parent / "cluster"
    for one in (training, others):
        one.hold(6)
    runs = {one: airflow.train("training", one, steps=20, root=root) for one in (training, others)}
    eventually(lambda: any(max(one.numbers("steps"), default=0) >= 5 for one in runs), 180)
    (waiting,) = [one for one in runs if not one.numbers("starts")]
    # not even a job: it waits in the triggerer, without a worker
    runs[waiting].wait("deferred", seconds=60)
    (going,) = [runs[one].run for one in runs if one is not waiting]
    said = f"run {going} of training has them since"
    eventually(lambda: any(said in line for line in runs[waiting].log()), 60)
    assert len(list((root / "jobs").iterdir())) == 1
    for one in runs:
        one.release()
    for run in runs.values():
        assert run.wait("success", "failed")["state"] == "success"
    assert training.never_twice
    assert others.never_twice


@pytest.mark.slow
def test_a_secret_is_in_no_command_line_no_log_no_xcom_and_no_file(
    airflow: Airflow, training: Training
) -> None:
    program = "import os, sys, time; print(len(os.environ['HF_TOKEN'])); time.sleep(5); open(sys.argv[1], 'w').write('{}')"
    conf = {
        "root": str(training.folder.parent / "cluster"),
        "commands": [["python3", "-c", program, training.result]],
        "result": training.result,
    }
    run = airflow.trigger("anywhere", conf)
    seen: set[str] = set()
    while run.task["state"] not in ("success", "failed"):
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                seen.add(entry.read_bytes().decode(errors="replace"))
        time.sleep(0.1)
    assert run.task["state"] == "success"
    assert "43" in run.log()
    assert any(training.result in words for words in seen)
    assert not [words for words in seen if SECRET in words]
    # the database has XComs and rendered templates, the job's folder what was sent there
    kept = [airflow.home / "airflow" / "airflow.db"]
    for folder in (airflow.home, training.folder.parent):
        kept += [path for path in folder.rglob("*") if path.is_file()]
    assert [path for path in kept if path.name == "job.sh"]
    for path in kept:
        assert SECRET.encode() not in path.read_bytes(), path
