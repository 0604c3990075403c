"""Turns on the GPUs: one run at a time, in the order of their requests, however often each asks."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "include" / "scripts"))
import local_sshd

import gpu_turns
from receivers import receivers

CLUSTER, DAG = "host:22", "fast_cpt"
PLUGINS = Path(gpu_turns.__file__).parent


class Runs:
    """The runs that go on, and what each hears when it asks."""

    def __init__(self, *runs: str) -> None:
        self.going_on = set(runs)

    def ask(self, run: str, cluster: str = CLUSTER) -> str | None:
        """None when the GPUs are the run's, else the run that has them."""
        first = gpu_turns.take(cluster, DAG, run, lambda dag, run: run in self.going_on)
        return first and first["run"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gpu_turns, "HOME", tmp_path)
    return tmp_path


def test_a_run_keeps_the_gpus_from_step_to_step_until_its_end() -> None:
    runs = Runs("a", "b")
    assert runs.ask("a") is None
    assert runs.ask("b") == "a"
    # its next step, while another run waits
    assert runs.ask("a") is None
    gpu_turns.give_back(DAG, "a")
    assert runs.ask("b") is None
    # a step of the finished run is cleared: it takes a turn again
    assert runs.ask("a") == "b"


def test_those_who_wait_go_in_the_order_in_which_they_asked() -> None:
    runs = Runs("a", "b", "c")
    assert [runs.ask(run) for run in "abc"] == [None, "a", "a"]
    assert [runs.ask(run) for run in "cba"] == ["a", "a", None]
    gpu_turns.give_back(DAG, "a")
    assert [runs.ask(run) for run in "cb"] == ["b", None]


def test_a_run_that_was_deleted_or_ended_unnoticed_blocks_nobody() -> None:
    runs = Runs("a", "b", "c")
    assert [runs.ask(run) for run in "abc"] == [None, "a", "a"]
    runs.going_on -= {"a", "b"}
    assert runs.ask("c") is None


def test_it_is_told_since_when(home: Path) -> None:
    gpu_turns.take(CLUSTER, DAG, "a", lambda *_: True)
    first = gpu_turns.take(CLUSTER, DAG, "b", lambda *_: True)
    again = gpu_turns.take(CLUSTER, DAG, "b", lambda *_: True)
    assert first == again
    assert first is not None
    assert first["since"].endswith(" UTC")


def test_two_clusters_have_a_turn_each() -> None:
    runs = Runs("a", "b")
    assert runs.ask("a") is None
    assert runs.ask("b", "other:22") is None


def test_of_many_that_ask_at_the_same_time_one_has_the_gpus(home: Path) -> None:
    program = (
        "import sys, gpu_turns\n"
        "first = gpu_turns.take('host:22', 'fast_cpt', sys.argv[1], lambda dag, run: True)\n"
        "print(first['run'] if first else sys.argv[1])"
    )
    environment = {
        "FASTCPT_HOME": str(home),
        "PYTHONPATH": f"{PLUGINS}:{PLUGINS.parent / 'include'}",
    }
    asking = [
        subprocess.Popen(
            [sys.executable, "-c", program, f"run {number}"],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(6)
    ]
    said = [process.communicate(timeout=120)[0].strip().splitlines()[-1] for process in asking]
    assert len(set(said)) == 1
    assert said[0] in {f"run {number}" for number in range(6)}


def test_the_trigger_tells_how_it_is_made_again() -> None:
    trigger = gpu_turns.TurnTrigger(CLUSTER, DAG, "a", 12.5)
    path, values = trigger.serialize()
    assert path == "gpu_turns.TurnTrigger"
    assert gpu_turns.TurnTrigger(**values).serialize() == trigger.serialize()


def test_a_database_that_does_not_answer_ends_no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([OSError("no answer"), None])
    pauses: list[float] = []

    def take(*asked: str) -> None:
        answer = next(answers)
        if answer:
            raise answer

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(gpu_turns, "take", take)
    monkeypatch.setattr(gpu_turns.asyncio, "sleep", sleep)

    async def events() -> list[object]:
        return [event async for event in gpu_turns.TurnTrigger(CLUSTER, DAG, "a").run()]

    assert len(asyncio.run(events())) == 1
    assert pauses == [60]


WAITING_DAG = """
import os
from airflow.sdk import dag
from remote_job import RemoteJob, RemoteJobOperator

def job(context):
    # found done when it is asked for
    folder = os.environ["FOLDER"]
    done = folder + "/result.json"
    return RemoteJob("cluster", folder + "/root", [["false"]], result=done, waiting_hours=0.001)

@dag(schedule=None)
def waiting():
    RemoteJobOperator(task_id="train", job=job, in_turn=True)

waiting = waiting()
"""
WAIT = """
import os, sys, threading, time
from datetime import UTC, datetime
sys.path.insert(0, os.environ["FOLDER"] + "/dags")
from airflow.models.dagrun import DagRun
from airflow.utils.session import create_session
from sqlalchemy import select
import gpu_turns
from waiting_dag import waiting

values = dict(dag_id="waiting", run_id="first", run_type="manual", state="running")
with create_session() as session:
    session.add(DagRun(**values, logical_date=None, run_after=datetime.now(UTC)))
queue = sys.argv[1]
assert gpu_turns.take(queue, "waiting", "first", lambda *_: True) is None

def end_the_first():
    # when the second has asked: it has to wait
    while len(gpu_turns.read_json(gpu_turns._file(queue))) < 2:
        time.sleep(0.2)
    time.sleep(12)
    with create_session() as session:
        session.scalar(select(DagRun).where(DagRun.run_id == "first")).state = "success"
    print("the first has ended", flush=True)

threading.Thread(target=end_the_first).start()
print("the second:", waiting.test().state, flush=True)
"""


@pytest.mark.slow
def test_a_task_waits_for_the_run_that_has_the_gpus_and_says_for_which(tmp_path: Path) -> None:
    """A real Airflow in one process: its database, its tasks, its triggers. A long wait is told."""
    facts = local_sshd.start_server(tmp_path / "sshd")
    connection = {
        "conn_type": "ssh",
        "host": "127.0.0.1",
        "login": facts["user"],
        "port": facts["port"],
        "extra": {"key_file": facts["key_file"], "known_hosts": facts["known_hosts"]},
    }
    (tmp_path / "result.json").write_text("{}")
    (tmp_path / "dags").mkdir()
    (tmp_path / "dags" / "waiting_dag.py").write_text(WAITING_DAG)
    environment = {
        **os.environ,
        "FOLDER": str(tmp_path),
        "FASTCPT_HOME": str(tmp_path / "home"),
        "PYTHONPATH": f"{PLUGINS}:{PLUGINS.parent / 'include'}",
        "AIRFLOW_HOME": str(tmp_path / "airflow"),
        "AIRFLOW_CONN_CLUSTER": json.dumps(connection),
        "AIRFLOW__CORE__DAGS_FOLDER": str(tmp_path / "dags"),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(PLUGINS),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "false",
    }
    airflow = Path(sys.executable).with_name("airflow")
    try:
        subprocess.run(
            [airflow, "db", "migrate"],
            env=environment,
            check=True,
            capture_output=True,
            timeout=200,
        )
        with receivers() as (_, web):
            done = subprocess.run(
                [sys.executable, "-c", WAIT, f"127.0.0.1:{facts['port']}"],
                env={**environment, "AIRFLOW_CONN_FAST_CPT_WEBHOOK": web.connection},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=200,
            )
    finally:
        os.killpg(facts["pid"], signal.SIGTERM)
    said = f"waiting for the GPUs of 127.0.0.1:{facts['port']}: run first of waiting has them since"
    waited, ended, second = (
        done.stdout.find(text) for text in (said, "the first has ended", "the second: success")
    )
    assert 0 < waited < ended < second, done.stdout[-5000:]
    # said again when the wait goes on after it was told
    assert done.stdout.count(said) == 2
    (told,) = [post["text"].split("\n") for post in web.received]
    assert told[0].startswith("*Fast CPT: waiting for GPUs: train of waiting, ")
    assert "budget.waiting_hours: run first of waiting has them since 20" in told[1]
