"""One real Airflow and one real SSH server for all end-to-end tests, on a small generated corpus."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import pytest

from fastcpt.reporting.record import record_folder
from stack_module import SCRIPTS, load_local_stack

# every run's documents and instructions lie there: what a user types goes all the way as a name
SAMPLE = "sample '$(touch pwned)' \"`touch pwned`\"; touch pwned #"


@dataclass
class Stack:
    """A running Airflow: trigger a run, wait for it, ask what its tasks did."""

    module: ModuleType
    api: Any
    home: Path
    state: dict[str, Any]

    @classmethod
    @contextmanager
    def started(cls, home: Path, scripts: Path = SCRIPTS) -> Iterator[Self]:
        """Start one of a checkout's ``scripts``, with a sample of documents; end it."""
        module = load_local_stack(home, scripts)
        module.generate_sample(home / SAMPLE, documents=120)
        state = module.start_stack()
        try:
            with module.Api(state["url"], module.HOME) as api:
                api.log_in()
                yield cls(module, api, home, state)
        finally:
            module.end_stack(state)

    def form(self) -> dict[str, Any]:
        """The form's values for a run on the small sample."""
        sample = self.home / SAMPLE
        return {
            "recipe": "sample",
            "documents": str(sample / "parsed"),
            "instructions": str(sample / "instructions.jsonl"),
            "num_shards": 2,
            "max_steps": 8,
        }

    def run(self, **conf: Any) -> Run:
        """Trigger the DAG on the small sample with these values of the form; wait for its end."""
        return self.wait(self.api.trigger({**self.form(), **conf}))

    def look(self, run_id: str) -> Run:
        """The run as it is now."""
        return Run(self, run_id, self.api.get(f"dagRuns/{run_id}")["state"])

    def trigger_long(self) -> str:
        """Start a run that would train for hours; returns its id."""
        return str(self.api.trigger({**self.form(), "max_steps": 100_000}))

    def mark(self, run_id: str, state: str) -> None:
        """Mark a run as a person does in the UI."""
        path = f"/api/v2/dags/fast_cpt/dagRuns/{run_id}"
        self.api.client.patch(path, json={"state": state}).raise_for_status()

    def clear(self, run_id: str, task_id: str, downstream: bool) -> None:
        """Clear a task of a run as a person does in the UI."""
        answer = self.api.client.post(
            "/api/v2/dags/fast_cpt/clearTaskInstances",
            json={
                "dry_run": False,
                "dag_run_id": run_id,
                "task_ids": [task_id],
                "only_failed": False,
                "include_downstream": downstream,
            },
        )
        answer.raise_for_status()

    def until(self, run_id: str, holds: Callable[[dict[str, Any]], bool]) -> None:
        """Wait for the states of the run's tasks, by name."""
        end = time.monotonic() + 400
        while not holds(states := self.look(run_id).states()):
            assert time.monotonic() < end, states
            time.sleep(0.5)

    def until_any(self, run_ids: list[str], outcome: str, seconds: float = 600) -> None:
        """Wait until one of the runs has ended so."""
        end = time.monotonic() + seconds
        while outcome not in [(run := self.look(run_id)).outcome for run_id in run_ids]:
            assert time.monotonic() < end, run.states()
            time.sleep(0.5)

    def wait_for_line(self, run_id: str, *beginnings: str, task: str = "train_cpt") -> str:
        """Wait for a line of the log of a task's newest try that begins so; returns it."""
        self.until(run_id, lambda states: states.get(task) in ("running", "deferred"))
        end = time.monotonic() + 240
        while True:
            events = self.api.log(run_id, self.look(run_id).task(task))
            lines = [str(event.get("event")) for event in events]
            if found := [line for line in lines if line.startswith(beginnings)]:
                return found[0]
            assert time.monotonic() < end, lines
            time.sleep(0.5)

    def wait_for_training(self, run_id: str) -> None:
        """Until the triggerer watches the job: before that, nobody is there to end it."""
        self.wait_for_line(run_id, "step ", "running, ")

    def wait(self, run_id: str, seconds: float = 600) -> Run:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            outcome = self.api.get(f"dagRuns/{run_id}")["state"]
            if outcome in ("success", "failed"):
                return Run(self, run_id, outcome)
            time.sleep(0.5)
        raise AssertionError(
            f"{run_id} did not end in {seconds} s: {Run(self, run_id, '').states()}"
        )


@dataclass
class Run:
    stack: Stack
    run_id: str
    outcome: str

    def tasks(self) -> list[dict[str, Any]]:
        answer = self.stack.api.get(f"dagRuns/{self.run_id}/taskInstances", limit=1000)
        return list(answer["task_instances"])

    def states(self) -> dict[str, str]:
        return {task["task_id"]: task["state"] for task in self.tasks()}

    def task(self, task_id: str) -> dict[str, Any]:
        return next(task for task in self.tasks() if task["task_id"] == task_id)

    def result(self, task_id: str, map_index: int = -1) -> Any:
        answer = self.stack.api.get(
            f"dagRuns/{self.run_id}/taskInstances/{task_id}/xcomEntries/return_value",
            map_index=map_index,
            deserialize=True,
        )
        return answer["value"]

    def error(self, task_id: str) -> str:
        """The messages of the exceptions in a task's newest log."""
        events = self.stack.api.log(self.run_id, self.task(task_id))
        details = [detail for event in events for detail in event.get("error_detail") or []]
        return "\n".join(str(detail["exc_value"]) for detail in details)

    @property
    def record(self) -> Path:
        return record_folder(self.stack.home, self.run_id)


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with Stack.started(tmp_path_factory.mktemp("home")) as one:
        yield one
