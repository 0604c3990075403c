"""An Airflow whose processes can be killed one by one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx

from faults.machines import REPOSITORY, Training, descendants, eventually
from stack_module import load_local_stack

# a process that is gone is missed within seconds, not minutes
SEEN_SOON = {
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "15",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "5",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_SEC": "3",
    "AIRFLOW__TRIGGERER__JOB_HEARTBEAT_SEC": "2",
    "AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "10",
    "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "10",
    "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": "10",
}
SECRET = "hf_" + "k7" * 20
DAGS = '''
import os, time
from datetime import timedelta
from airflow.sdk import dag
from remote_job import RemoteJob, RemoteJobOperator
from steps.cluster import secrets

def job(context):
    conf = context["dag_run"].conf
    return RemoteJob(
        conf.get("connection", "local_cluster"), conf["root"], conf["commands"],
        result=conf["result"],
    )

class DiesBeforeItWaits(RemoteJobOperator):
    """Gives a test the time to kill the worker between starting the job and waiting for it."""
    def defer(self, **options):
        note = os.path.join(os.path.dirname(self.result), "worker")
        if not os.path.exists(note):
            with open(note + ".new", "w") as file:
                file.write(f"{os.getpid()} {os.getppid()}")
            os.rename(note + ".new", note)
            time.sleep(300)
        super().defer(**options)
    def execute(self, context):
        self.result = context["dag_run"].conf["result"]
        return super().execute(context)

def one(dag_id, operator=RemoteJobOperator, **options):
    @dag(dag_id=dag_id, schedule=None, max_active_runs=16)
    def build():
        operator(task_id="train", job=job, secrets=secrets, retries=3,
                 retry_delay=timedelta(seconds=2), **options)
    return build()

one("training", in_turn=True)
one("anywhere")
one("timed", execution_timeout=timedelta(seconds=30))
one("interrupted", DiesBeforeItWaits)
'''


class Airflow:
    """The four processes on SQLite, each of which can be killed and started again."""

    names = ("api-server", "scheduler", "dag-processor", "triggerer")

    def __init__(self, home: Path, cluster: dict[str, Any]) -> None:
        stack = load_local_stack(home)
        self.home, self.stack = home, stack
        (home / "dags").mkdir(parents=True)
        (home / "logs").mkdir()
        (home / "dags" / "faults.py").write_text(DAGS)
        (home / "passwords.json").write_text(json.dumps({"admin": "admin"}))
        self.url = f"http://127.0.0.1:{(port := stack.free_port())}"
        self.settings = stack.airflow_environment(cluster, port) | {
            "AIRFLOW__CORE__DAGS_FOLDER": str(home / "dags"),
            "AIRFLOW_VAR_HF_TOKEN": SECRET,
            **SEEN_SOON,
        }
        self.program = str(REPOSITORY / ".env/airflow/bin/airflow")
        subprocess.run(
            [self.program, "db", "migrate"], env=self.settings, check=True, capture_output=True
        )
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        for name in self.names:
            self.start(name)
        self.client = httpx.Client(base_url=self.url, timeout=60)
        eventually(self._ready, 400, 0.5)

    def _ready(self) -> bool:
        try:
            health = self.client.get("/api/v2/monitor/health").json()
            if any(
                health[part]["status"] != "healthy"
                for part in ("scheduler", "triggerer", "dag_processor")
            ):
                return False
            answer = self.client.post(
                "/auth/token", json={"username": "admin", "password": "admin"}
            )
            self.client.headers["Authorization"] = f"Bearer {answer.json()['access_token']}"
            return bool(self.client.get("/api/v2/dags/interrupted").status_code == 200)
        except (httpx.HTTPError, KeyError):
            return False

    def start(self, name: str) -> None:
        with (self.home / "logs" / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [self.program, name],
                env=self.settings,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self.home,
            )

    def kill(self, name: str) -> None:
        """SIGKILL to the process and all that it started: the machine it ran on is gone."""
        process = self.processes[name]
        for pid in [process.pid, *descendants(process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()

    def end(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in self.processes.values():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
            time.sleep(3 if number == signal.SIGTERM else 0)
        for process in self.processes.values():
            process.wait()
        self.client.close()

    def trigger(self, dag: str, conf: dict[str, Any]) -> Run:
        answer = self.client.post(
            f"/api/v2/dags/{dag}/dagRuns", json={"logical_date": None, "conf": conf}
        )
        answer.raise_for_status()
        return Run(self, dag, answer.json()["dag_run_id"])

    def connect(self, name: str, facts: dict[str, Any]) -> None:
        """Add a connection to a host, as an administrator does in the UI."""
        extra = {key: facts[key] for key in ("key_file", "known_hosts")}
        answer = self.client.post(
            "/api/v2/connections",
            json={
                "connection_id": name,
                "conn_type": "ssh",
                "host": facts["host"],
                "login": facts["user"],
                "port": facts["port"],
                "extra": json.dumps(extra),
            },
        )
        answer.raise_for_status()

    def train(
        self, dag: str, training: Training, steps: int, pace: float = 0.5, **conf: Any
    ) -> Run:
        """Trigger a DAG that runs the stand-in for a training on the cluster."""
        commands = [training.command(steps, pace)]
        root = str(conf.pop("root", training.folder.parent / "cluster"))
        values = {"root": root, "commands": commands, "result": training.result}
        return self.trigger(dag, {**values, **conf})


class Run:
    def __init__(self, airflow: Airflow, dag: str, run: str) -> None:
        self.airflow, self.run = airflow, run
        self.path = f"/api/v2/dags/{dag}/dagRuns/{run}"
        self.dag = dag

    @property
    def task(self) -> dict[str, Any]:
        answer = self.airflow.client.get(f"{self.path}/taskInstances/train")
        answer.raise_for_status()
        return dict(answer.json())

    def wait(self, *states: str, seconds: float = 300) -> dict[str, Any]:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with contextlib.suppress(httpx.HTTPError):
                task = self.task
                if task["state"] in states:
                    return task
            time.sleep(0.5)
        raise AssertionError(f"the task is {self.task['state']}, wanted {states}:\n{self.log()}")

    def log(self, attempt: int | None = None) -> list[str]:
        attempt = attempt or self.task["try_number"]
        answer = self.airflow.client.get(
            f"{self.path}/taskInstances/train/logs/{attempt}",
            params={"full_content": True},
            headers={"Accept": "application/json"},
        )
        if answer.status_code != 200:
            return []
        lines = []
        for event in answer.json()["content"]:
            lines.append(str(event.get("event", event)))
            lines += [str(detail["exc_value"]) for detail in event.get("error_detail") or []]
        return lines

    def steps_in_log(self, attempt: int | None = None) -> list[int]:
        lines = self.log(attempt)
        return [int(line.split()[1]) for line in lines if line.startswith("step ")]

    def mark_failed(self) -> None:
        answer = self.airflow.client.patch(
            f"{self.path}/taskInstances/train", json={"new_state": "failed"}
        )
        answer.raise_for_status()

    def clear(self) -> None:
        answer = self.airflow.client.post(
            f"/api/v2/dags/{self.dag}/clearTaskInstances",
            json={
                "dry_run": False,
                "dag_run_id": self.run,
                "task_ids": ["train"],
                "only_failed": False,
                "only_running": False,
            },
        )
        answer.raise_for_status()

    def delete(self) -> None:
        """As the UI does it: Airflow deletes no run that goes on, so its state is set first."""
        self.airflow.client.patch(self.path, json={"state": "failed"}).raise_for_status()
        self.airflow.client.delete(self.path).raise_for_status()
