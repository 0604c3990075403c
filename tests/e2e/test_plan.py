"""A person's approval of the plan, and a plan that uses the previous run's figures."""

from __future__ import annotations

import html
import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fastcpt.files import read_json
from fastcpt.planning.history import FILE, read_history
from fastcpt.reporting.summary import summary

if TYPE_CHECKING:
    from conftest import Run, Stack

pytestmark = pytest.mark.slow

# Its own steps and ranks, so that no other test's model or rate is found; no fine-tuning, to be short.
CONF = {"max_steps": 6, "gpus": 1, "instructions": None, "perplexity_threshold": 90_000.0}
APPROVAL = "dagRuns/{run}/taskInstances/approve_plan/-1/hitlDetails"


def documents(stack: Stack) -> str:
    sample: Path = stack.home / "sample-of-plan"
    if not sample.exists():
        stack.module.generate_sample(sample, documents=60)
    return str(sample / "parsed")


def trigger(stack: Stack) -> str:
    """A run that waits for approval; all that does not need GPUs is done when this returns."""
    conf = {"recipe": "sample", "documents": documents(stack), "num_shards": 2}
    run_id = str(stack.api.trigger({**conf, **CONF, "require_approval": True}))
    until = time.monotonic() + 200
    while time.monotonic() < until:
        tasks = stack.api.get(f"dagRuns/{run_id}/taskInstances", limit=1000)["task_instances"]
        states = {task["task_id"]: task["state"] for task in tasks}
        assert "failed" not in states.values(), states
        if (states["approve_plan"], states["sync"]) == ("awaiting_input", "success"):
            assert states["train_cpt"] is None
            return run_id
        time.sleep(0.5)
    raise AssertionError(f"{run_id} does not ask for approval: {states}")


def answer(stack: Stack, run_id: str, option: str) -> Run:
    """What the buttons of Airflow's page send; then the run's end."""
    request = {"chosen_options": [option], "params_input": {}}
    url = f"/api/v2/dags/fast_cpt/{APPROVAL.format(run=run_id)}"
    stack.api.client.patch(url, json=request).raise_for_status()
    return stack.wait(run_id)


def trainings(stack: Stack) -> set[str]:
    """The jobs that ever used the cluster's GPUs."""
    return {path.name for path in (stack.home / "cluster" / "jobs").glob("*train_cpt*")}


@pytest.fixture(scope="module")
def approved(stack: Stack) -> tuple[Run, dict[str, Any]]:
    """A run that was approved, and what the person was shown."""
    before = trainings(stack)
    run_id = trigger(stack)
    asked = stack.api.get(APPROVAL.format(run=run_id))
    assert trainings(stack) == before
    return answer(stack, run_id, "Approve"), asked


def test_an_approved_plan_is_carried_out(approved: tuple[Run, dict[str, Any]]) -> None:
    run, asked = approved
    assert asked["subject"] == "Approve the plan of this run"
    assert asked["options"] == ["Approve", "Reject"]
    shown = html.unescape(asked["body"])
    assert "**sample**: own shape, full, float32, on 1xCPU. The plan fits." in shown
    assert re.search(
        r"^\| passes over the corpus \| [\d.,]+ \| 10000: fits \|", shown, re.MULTILINE
    )
    assert f"/fast-cpt-runs/run/{run.record.name})" in shown
    assert run.outcome == "success", run.states()
    assert run.result("train_cpt")["steps"] == 6


def test_the_summary_tells_work_from_approval_and_what_did_not_happen(
    approved: tuple[Run, dict[str, Any]],
) -> None:
    facts = summary(approved[0].record)
    assert facts["branch"] == "no fine-tuning after stage 1: no instructions"
    times = facts["times"]
    assert times["approval"] > 0
    assert times["worked"] > 0
    assert times["approval"] + times["worked"] < facts["seconds"] + 1


def test_the_report_shows_the_plan_beside_what_the_run_took(
    approved: tuple[Run, dict[str, Any]],
) -> None:
    run, _ = approved
    rows = {row["what"]: row for row in read_json(run.record / "plan_and_actual.json")["rows"]}
    training = read_json(run.record / "train_cpt" / "training.json")
    assert rows["tokens/s, all GPUs"]["actual"] == training["tokens_per_s_per_gpu"]
    steps, whole = rows["hours of training steps"], rows["hours on the GPUs, without stage 2"]
    evaluation = rows["hours of evaluation"]
    assert steps["actual"] == pytest.approx(training["seconds"] / 3600)
    # the job holds the start of its processes beside the steps
    assert whole["actual"] > steps["actual"] + evaluation["actual"] > 0
    page = (run.record / "report.html").read_text()
    assert "Plan and actual figures" in page
    assert "hours of evaluation" in page


def test_the_next_plan_is_the_last_run_and_a_rejected_one_spends_nothing(
    stack: Stack, approved: tuple[Run, dict[str, Any]]
) -> None:
    run, _ = approved
    kept = read_history(stack.home / FILE)[-1]
    assert kept.run == f"{run.run_id}/train_cpt"
    training = read_json(run.record / "train_cpt" / "training.json")
    assert kept.tokens_per_s_per_gpu == training["tokens_per_s_per_gpu"]
    assert kept.startup_seconds == training["startup_seconds"] > 0
    assert kept.evaluation_seconds is not None
    assert kept.evaluation_seconds > 0

    before = trainings(stack)
    second = trigger(stack)
    asked = stack.api.get(APPROVAL.format(run=second))
    rejected = answer(stack, second, "Reject")
    plan = json.loads((rejected.record / "plan.json").read_text())
    assert plan["rate_source"].startswith(f"last run here, {run.run_id}/train_cpt of 20")
    middle = (plan["tokens_per_s"]["low"] + plan["tokens_per_s"]["high"]) / 2
    assert middle == pytest.approx(training["tokens_per_s_per_gpu"])
    assert plan["hours_parts"]["start-up"] == pytest.approx(training["startup_seconds"] / 3600)
    assert plan["rate_source"] in html.unescape(asked["body"])

    states = rejected.states()
    assert rejected.outcome == "failed"
    assert states["approve_plan"] == "failed"
    assert {states[task] for task in ("train_cpt", "evaluate_cpt", "publish")} == {
        "upstream_failed"
    }
    assert rejected.error("report") == "the run did not succeed: approve_plan failed"
    assert trainings(stack) == before


def test_a_plan_that_does_not_fit_is_gone_on_with_where_the_form_says_so(stack: Stack) -> None:
    conf = {
        "recipe": "cpt_config_fast",
        "documents": documents(stack),
        "connection": "local_cluster",
        "run_even_if_plan_says_no": True,
    }
    run_id = str(stack.api.trigger(conf))
    states: dict[str, str | None] = {}
    until = time.monotonic() + 100
    # this machine has none of the four GPUs: the plan has been passed when that is said
    while states.get("check_cluster") != "failed" and time.monotonic() < until:
        time.sleep(0.5)
        tasks = stack.api.get(f"dagRuns/{run_id}/taskInstances", limit=1000)["task_instances"]
        states = {task["task_id"]: task["state"] for task in tasks}
    ended = stack.api.client.patch(
        f"/api/v2/dags/fast_cpt/dagRuns/{run_id}", json={"state": "failed"}
    )
    ended.raise_for_status()
    assert (states["plan"], states["check_cluster"]) == ("success", "failed")
