"""Runs that rent their host, in a real Airflow: the machine is released however a run ends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import provider
from e2e.renting import Renting, renting, until
from fastcpt.reporting.summary import summary

pytestmark = [
    pytest.mark.faults,
    pytest.mark.linux("a machine's processes are found by their environment"),
]
PASSES = 90_000.0


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Renting]:
    sections = {"checkpoints": {"bring_every_minutes": 0.5}, "training": {"save_steps": 20}}
    with renting(tmp_path_factory.mktemp("renting"), **sections) as one:
        yield one


def gone(stack: Renting, run_id: str, seconds: float = 30) -> None:
    """The run's machines are given back, and nothing of them is left."""

    def states() -> list[str]:
        return [rental.state for rental in stack.rentals(run_id)]

    until(lambda: not stack.left() and states() == ["released"], seconds, states)


def test_a_run_rents_its_host_trains_there_and_gives_it_back(stack: Renting) -> None:
    run = stack.wait(stack.api.trigger({**stack.form(), "perplexity_threshold": PASSES}), 1500)
    assert run.outcome == "success", run.states()
    gone(stack, run.run_id)
    (machine,) = stack.machines(run.run_id)
    bill = provider.cost([machine], time.time())
    assert summary(run.record)["cost"] == pytest.approx(bill, rel=0.2)
    # the model is here, although its host is gone
    assert list(Path(summary(run.record)["model"]).glob("*.safetensors"))


def test_a_run_that_is_marked_as_failed_gives_its_host_back(stack: Renting) -> None:
    run_id = stack.trigger_long()
    stack.wait_for_training(run_id)
    stack.mark(run_id, "failed")
    assert stack.wait(run_id).outcome == "failed"
    gone(stack, run_id)


def test_a_run_that_fails_gives_its_host_back_and_a_clear_takes_another(stack: Renting) -> None:
    run_id = stack.trigger_long()
    stack.wait_for_training(run_id)
    stack.api.client.patch(
        f"/api/v2/dags/fast_cpt/dagRuns/{run_id}/taskInstances/train_cpt",
        json={"new_state": "failed"},
    ).raise_for_status()
    assert stack.wait(run_id).outcome == "failed"
    gone(stack, run_id)
    stack.clear(run_id, "train_cpt", downstream=True)
    stack.wait_for_training(run_id)
    assert [rental.state for rental in stack.rentals(run_id)] == ["released", "held"]
    stack.clear(run_id, "train_cpt", downstream=True)
    time.sleep(10)
    stack.wait_for_training(run_id)
    # the clear gave it back or found it: one machine at any time
    assert len(stack.running()) == 1
    stack.mark(run_id, "failed")
    stack.wait(run_id)
    until(lambda: not stack.left(), 30, stack.left)


@contextmanager
def changed_dag(stack: Renting, old: str, new: str, seen: str, name: str) -> Iterator[None]:
    """The DAG's file with ``new`` for ``old``, once Airflow's answer to ``seen`` has a value of that name."""
    file = stack.home / "checkout" / "dags" / "fast_cpt.py"
    text = file.read_text()
    assert text.count(old) == 1
    first = "from functools import partial\n"
    timedelta = f"from datetime import timedelta\n{first}"
    file.write_text(text.replace(old, new).replace(first, timedelta))
    try:
        until(lambda: stack.api.get(seen)[name], 240, f"{seen} has no {name}")
        yield
    finally:
        file.write_text(text)
        until(lambda: not stack.api.get(seen)[name], 240, f"{seen} has {name}")


def test_a_step_whose_time_is_over_gives_the_runs_host_back(stack: Renting) -> None:
    job = "on_gpus(steps.training.train_cpt, steps.training.keep_training"
    timed = f"{job}, retries=0, execution_timeout=timedelta(minutes=1))"
    with changed_dag(stack, f"{job})", timed, "tasks/train_cpt", "execution_timeout"):
        run_id = stack.trigger_long()
        stack.wait_for_training(run_id)
        run = stack.wait(run_id)
    assert (run.outcome, run.states()["train_cpt"]) == ("failed", "failed")
    gone(stack, run_id)


def test_a_run_whose_time_is_over_gives_its_host_back(stack: Renting) -> None:
    timed = "schedule=None, dagrun_timeout=timedelta(minutes=4),"
    with changed_dag(stack, "schedule=None,", timed, "details", "dag_run_timeout"):
        run_id = stack.trigger_long()
        until(stack.running, 240, stack.look(run_id).states)
        assert stack.wait(run_id).outcome == "failed"
    # Airflow skips the teardowns: the DAG that looks after the machines comes every three minutes
    gone(stack, run_id, 300)


def test_a_rejected_run_has_rented_nothing(stack: Renting) -> None:
    run_id = stack.api.trigger({**stack.form(), "require_approval": True})
    stack.until(run_id, lambda states: states.get("approve_plan") == "awaiting_input")
    stack.answer(run_id, "Reject")
    run = stack.wait(run_id)
    assert run.outcome == "failed"
    assert stack.rentals(run_id) == []


def test_a_deleted_runs_machine_is_gone_within_ten_minutes(stack: Renting) -> None:
    run_id = stack.trigger_long()
    stack.wait_for_training(run_id)
    stack.delete(run_id)
    gone(stack, run_id, 600)


def test_a_machine_that_is_taken_away_is_replaced_and_the_training_goes_on(stack: Renting) -> None:
    # it trains for long enough to be brought a checkpoint, and was approved once
    form = {**stack.form(), "max_steps": 3000, "perplexity_threshold": PASSES}
    run_id = stack.api.trigger({**form, "require_approval": True})
    stack.until(run_id, lambda states: states.get("approve_plan") == "awaiting_input")
    stack.answer(run_id, "Approve")
    brought = stack.home / "checkpoints"
    until(lambda: list(brought.glob("*/step_*")), 900, stack.look(run_id).states)
    (first,) = stack.rentals(run_id)
    assert first.machine is not None
    provider.end(stack.provider, first.machine.id)
    until(lambda: len(stack.rentals(run_id)) == 2, 420, stack.look(run_id).states)
    assert stack.look(run_id).states()["approve_plan"] == "success"
    line = stack.wait_for_line(run_id, "the host has no checkpoint as new as step_")
    assert int(line.split("step_")[1].split()[0]) >= 20
    stack.mark(run_id, "failed")
    stack.wait(run_id)
    until(lambda: not stack.left(), 60, stack.left)
