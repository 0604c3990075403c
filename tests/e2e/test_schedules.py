"""A schedule in a running Airflow: it appears, and starts a run of fast_cpt only if there is something new."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from fastcpt.files import read_json, write_json

if TYPE_CHECKING:
    from conftest import Stack

pytestmark = pytest.mark.slow

DAG = "/api/v2/dags/fast_cpt_soon"


def ask(stack: Stack, path: str, seconds: float, **wanted: str) -> Any:
    """The answer of the API, as soon as it says what is wanted."""
    end = time.monotonic() + seconds
    while True:
        answer = stack.api.client.get(f"{DAG}{path}")
        found = answer.json()
        if answer.status_code == 200 and wanted.items() <= found.items():
            return found
        assert time.monotonic() < end, found
        time.sleep(1)


def trigger(stack: Stack) -> str:
    answer = stack.api.client.post(f"{DAG}/dagRuns", json={"logical_date": None})
    answer.raise_for_status()
    return str(answer.json()["dag_run_id"])


def states(stack: Stack, run: str) -> dict[str, str]:
    tasks = stack.api.client.get(f"{DAG}/dagRuns/{run}/taskInstances").json()["task_instances"]
    return {task["task_id"]: task["state"] for task in tasks}


def test_a_schedule_runs_what_is_new_and_nothing_a_second_time(stack: Stack) -> None:
    form = stack.form()
    overrides = {
        "documents.path": form["documents"],
        "corpus.num_shards": 2,
        "training.max_steps": 8,
        "gate.perplexity_threshold": 90_000.0,
    }
    schedule = {"time": "0 3 1 1 *", "recipe": "sample", "overrides": overrides}
    write_json(stack.home / "schedules.yaml", {"soon": schedule})
    # not paused, and no run of the times before
    assert not ask(stack, "", 120)["is_paused"]
    assert ask(stack, "/dagRuns", 60)["total_entries"] == 0
    first = trigger(stack)
    ask(stack, f"/dagRuns/{first}", 600, state="success")
    assert states(stack, first) == {"look_for_new": "success", "run": "success"}
    (run,) = [
        run
        for run in stack.api.get("dagRuns", limit=100)["dag_runs"]
        if "soon__" in run["dag_run_id"]
    ]
    found = stack.look(run["dag_run_id"])
    assert found.outcome == "success"
    assert len(read_json(found.record / "documents.json")) > 0
    began = time.monotonic()
    second = trigger(stack)
    ask(stack, f"/dagRuns/{second}", 120, state="success")
    assert states(stack, second) == {"look_for_new": "skipped", "run": "skipped"}
    assert time.monotonic() - began < 60
    (stack.home / "schedules.yaml").unlink()
