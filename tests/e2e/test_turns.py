"""Two runs triggered together: one has the cluster's GPUs until its end, the other says that it waits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fastcpt.cluster.jobs import job_name
from fastcpt.files import read_json

if TYPE_CHECKING:
    from conftest import Run, Stack

pytestmark = pytest.mark.faults


def job(run: Run, step: str) -> dict[str, Any]:
    """What the cluster noted of a step's job; empty before it was begun."""
    name = job_name("fast_cpt", run.run_id, step, -1)
    file = Path(run.stack.home) / "cluster" / "jobs" / name / "status.json"
    status: dict[str, Any] = read_json(file) if file.exists() else {}
    return status


def test_the_gpus_are_one_runs_until_its_last_step_has_ended(stack: Stack) -> None:
    # another number of steps each: neither finds the other's models
    form = {**stack.form(), "instructions": None, "perplexity_threshold": 90_000.0}
    ids = [stack.api.trigger({**form, "max_steps": steps}) for steps in (2, 3)]
    stack.until_any(ids, "success")
    first, second = sorted(map(stack.look, ids), key=lambda run: run.outcome != "success")
    # the waiting one said whom it waited for, once
    stack.wait_for_line(second.run_id, "job ")
    events = stack.api.log(second.run_id, second.task("train_cpt"))
    lines = [str(event["event"]) for event in events]
    waited = [line for line in lines if line.startswith("waiting for the GPUs")]
    assert len(waited) == 1, lines
    assert f"run {first.run_id} of fast_cpt has them since 20" in waited[0]
    # a step of the finished run takes a turn again
    stack.clear(first.run_id, "evaluate_cpt", downstream=False)
    line = stack.wait_for_line(first.run_id, "waiting for the GPUs", task="evaluate_cpt")
    assert f"run {second.run_id} of fast_cpt has them" in line
    for run in (second, first):
        assert stack.wait(run.run_id, 600).outcome == "success", stack.look(run.run_id).states()
    steps = ("train_cpt", "evaluate_cpt", "publish")
    assert job(second, "train_cpt")["running_since"] > job(first, "publish")["ended"]
    assert all(job(second, step)["state"] == "succeeded" for step in steps)
    assert [read_json(file) for file in (stack.home / "turns").glob("*.json")] == [[]]
