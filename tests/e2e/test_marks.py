"""A run marked by a person has the same state in Airflow and in its record, whenever it is marked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fastcpt.files import read_json
from fastcpt.reporting.summary import summary

if TYPE_CHECKING:
    from conftest import Run, Stack

pytestmark = pytest.mark.faults


def pause(stack: Stack, paused: bool) -> None:
    answer = stack.api.client.patch("/api/v2/dags/fast_cpt", json={"is_paused": paused})
    answer.raise_for_status()


def jobs_that_run(stack: Stack) -> list[str]:
    folders = (stack.home / "cluster" / "jobs").glob("*train_cpt*")
    found = [(folder.name, read_json(folder / "status.json")["state"]) for folder in folders]
    return [name for name, state in found if state in ("starting", "waiting", "running")]


@pytest.fixture(scope="module")
def failed(stack: Stack) -> Run:
    run_id = stack.trigger_long()
    stack.wait_for_training(run_id)
    stack.mark(run_id, "failed")
    return stack.wait(run_id)


def test_a_run_marked_as_failed_while_it_trains_has_failed(stack: Stack, failed: Run) -> None:
    assert failed.outcome == "failed", failed.states()
    assert failed.states()["train_cpt"] == "failed"
    assert failed.error("report") == "the run did not succeed: train_cpt failed"
    assert summary(failed.record)["state"] == "failed"
    assert (failed.record / "report.html").is_file()
    stack.until(failed.run_id, lambda _: not jobs_that_run(stack))


@pytest.mark.parametrize("state", ["success", "failed"])
def test_a_run_that_has_ended_may_be_marked_otherwise(
    stack: Stack, failed: Run, state: str
) -> None:
    ended = read_json(failed.record / "run.json")["ended"]
    stack.mark(failed.run_id, state)
    assert stack.look(failed.run_id).outcome == state
    facts = read_json(failed.record / "run.json")
    assert (facts["state"], facts["ended"]) == (state, ended)


def test_a_run_marked_as_successful_while_it_trains_has_succeeded(stack: Stack) -> None:
    run_id = stack.trigger_long()
    stack.wait_for_training(run_id)
    stack.mark(run_id, "success")
    run = stack.wait(run_id)
    assert run.outcome == "success", run.states()
    assert summary(run.record)["state"] == "success"
    stack.until(run_id, lambda _: not jobs_that_run(stack))


@pytest.mark.parametrize("state", ["success", "failed"])
def test_a_run_marked_between_two_tasks_is_what_it_was_marked_as(stack: Stack, state: str) -> None:
    run_id = stack.trigger_long()
    stack.until(run_id, lambda states: states.get("plan") == "success")
    pause(stack, True)
    try:
        idle = {None, "scheduled", "success"}
        stack.until(run_id, lambda states: set(states.values()) <= idle)
        stack.mark(run_id, state)
    finally:
        pause(stack, False)
    run = stack.wait(run_id)
    assert run.outcome == state, run.states()
    assert "failed" not in {run.states()[task] for task in run.states() if task != "report"}
    assert summary(run.record)["state"] == state


def test_a_run_that_goes_on_after_its_end_has_no_end_until_it_has_one_again(
    stack: Stack, failed: Run
) -> None:
    stack.clear(failed.run_id, "train_cpt", downstream=True)
    stack.wait_for_training(failed.run_id)
    facts = read_json(failed.record / "run.json")
    assert not {"state", "ended", "marked"} & set(facts)
    stack.mark(failed.run_id, "failed")
    again = stack.wait(failed.run_id)
    assert again.outcome == "failed"
    assert summary(again.record)["state"] == "failed"
