"""A client of Airflow's REST API that shows a run's progress on the terminal."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx

DAG = "fast_cpt"
USER = "admin"
# tasks with progress lines in their logs
PROGRESS_OF = {"train_cpt", "train_cpt_stage2", "train_sft"}


class Api:
    """Airflow's REST API with a login; ``home`` has the password and the logs."""

    def __init__(self, url: str, home: Path) -> None:
        self.home = home
        self.client = httpx.Client(base_url=url, timeout=60)

    def __enter__(self) -> Api:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def wait_until_ready(self, seconds: float = 180) -> None:
        """Wait until the API answers, every process is healthy and the DAG exists."""
        until = time.monotonic() + seconds
        problem = "no answer"
        while time.monotonic() < until:
            try:
                health = self.client.get("/api/v2/monitor/health").json()
                parts = ("scheduler", "dag_processor", "triggerer")
                unhealthy = [part for part in parts if health[part]["status"] != "healthy"]
                if not unhealthy:
                    self.log_in()
                    if self.client.get(f"/api/v2/dags/{DAG}").status_code == 200:
                        return
                    errors = self.client.get("/api/v2/importErrors").json()["import_errors"]
                    # errors in other files, such as schedules, are shown in the UI
                    errors = [error for error in errors if Path(error["filename"]).stem == DAG]
                    if errors:
                        raise RuntimeError(
                            f"the DAG cannot be imported:\n{errors[0]['stack_trace']}"
                        )
                    problem = "the DAG is not parsed yet"
                else:
                    problem = f"not healthy: {', '.join(unhealthy)}"
            except httpx.HTTPError as error:
                problem = str(error)
            time.sleep(0.5)
        raise RuntimeError(
            f"Airflow did not come up in {seconds:.0f} s ({problem}); logs: {self.home}/logs"
        )

    def log_in(self) -> None:
        if "Authorization" not in self.client.headers:
            password = json.loads((self.home / "passwords.json").read_text())[USER]
            answer = self.client.post("/auth/token", json={"username": USER, "password": password})
            answer.raise_for_status()
            self.client.headers["Authorization"] = f"Bearer {answer.json()['access_token']}"

    def trigger(self, conf: dict[str, Any]) -> str:
        """Start a run; returns its id. Raises ``ValueError`` with the value that the form refuses."""
        answer = self.client.post(
            f"/api/v2/dags/{DAG}/dagRuns", json={"logical_date": None, "conf": conf}
        )
        if answer.status_code in (400, 422):
            raise ValueError(f"refused: {answer.json()['detail']}")
        answer.raise_for_status()
        return str(answer.json()["dag_run_id"])

    def end_unfinished_runs(self) -> None:
        """Fail runs left by an interrupted ``make run``: they would continue and hold the GPUs."""
        for state in ("running", "queued"):
            for run in self.get("dagRuns", state=state, limit=100)["dag_runs"]:
                path = f"/api/v2/dags/{DAG}/dagRuns/{run['dag_run_id']}"
                self.client.patch(path, json={"state": "failed"}).raise_for_status()

    def get(self, path: str, **query: Any) -> Any:
        answer = self.client.get(f"/api/v2/dags/{DAG}/{path}", params=query)
        answer.raise_for_status()
        return answer.json()

    def log(self, run: str, task: dict[str, Any]) -> list[dict[str, Any]]:
        """The events of a task's newest try, if any."""
        answer = self.client.get(
            f"/api/v2/dags/{DAG}/dagRuns/{run}/taskInstances/{task['task_id']}/logs/{task['try_number']}",
            params={"map_index": task["map_index"], "full_content": True},
            headers={"Accept": "application/json"},
        )
        if answer.status_code != 200:
            return []
        content = answer.json()["content"]
        return [event for event in content if isinstance(event, dict)]


def clock(began: float) -> str:
    minutes, seconds = divmod(int(time.monotonic() - began), 60)
    return f"{minutes:3d}:{seconds:02d}"


def follow_run(api: Api, run: str, began: float) -> str:
    """Print each task's changes of state and its progress lines until the run ends."""
    shown: dict[tuple[str, int], str | None] = {}
    lines: dict[tuple[str, int], int] = {}
    while True:
        outcome = api.get(f"dagRuns/{run}")["state"]
        tasks = api.get(f"dagRuns/{run}/taskInstances", limit=1000)["task_instances"]
        for task in sorted(tasks, key=lambda task: task["start_date"] or "9"):
            key = (task["task_id"], task["map_index"])
            name = task["task_id"] + (f"[{task['map_index']}]" if task["map_index"] >= 0 else "")
            state = task["state"]
            if state in ("running", "deferred", "success", "failed", "up_for_retry"):
                _print_progress(api, run, task, name, lines, began)
            before = shown.get(key)
            shown[key] = state
            if state == before or state in (None, "scheduled", "queued", "removed"):
                continue
            if {before, state} == {"running", "deferred"} or state == "deferred":
                continue
            took = f"  {task['duration']:.0f} s" if state == "success" and task["duration"] else ""
            print(f"{clock(began)}  {name:<20} {state}{took}", flush=True)
            if state in ("failed", "up_for_retry"):
                _print_error(api, run, task)
        if outcome in ("success", "failed"):
            return str(outcome)
        time.sleep(1)


def _print_progress(
    api: Api,
    run: str,
    task: dict[str, Any],
    name: str,
    lines: dict[tuple[str, int], int],
    began: float,
) -> None:
    if task["task_id"] not in PROGRESS_OF:
        return
    key = (task["task_id"], task["map_index"])
    events = [str(event.get("event", "")) for event in api.log(run, task)]
    progress = [event for event in events if event.startswith(("step ", "evaluat", "generat"))]
    for event in progress[lines.get(key, 0) :]:
        print(f"{clock(began)}  {name:<20} {event[:120]}", flush=True)
    lines[key] = len(progress)


def _print_error(api: Api, run: str, task: dict[str, Any]) -> None:
    for event in api.log(run, task):
        for detail in event.get("error_detail") or []:
            print(f"        {detail['exc_type']}: {detail['exc_value']}", flush=True)
