"""The end of a run: closes its record and writes its report, even if it failed."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

from airflow.sdk import get_current_context

from fastcpt.files import HOME
from notifications import AlreadyTold
from steps.results import HostFacts, Plan, result_or_none
from steps.run import planned_recipe, price_of
from tracking import follow


class RunFailed(ValueError, AlreadyTold):
    """The run did not succeed: the last task fails with it, and so does the run. The failed task sent a message."""


class Reported(TypedDict, total=False):
    """The report's file and the run's outcome; empty if the run had no record."""

    report: str
    state: str


def report() -> Reported:
    """Close the run's record and write its report, even after a failure.

    Raises ``RunFailed`` if the run did not succeed, as this task's state becomes the run's.
    """
    from fastcpt.planning.history import compare_with_plan, record_run
    from fastcpt.reporting.record import add, add_cost, close_record, read, took
    from fastcpt.reporting.report import write_report

    context = get_current_context()
    run, dag = context["run_id"], context["dag"].dag_id
    states = context["ti"].get_task_states(dag, run_ids=[run])[run]
    plan: Plan | None = result_or_none(context, "plan")
    if states["plan"] == "skipped":
        print("Nothing is new: the log of `plan` says since when.")
        return {}
    if plan is None:
        print("The run ended before it had a record: the log of `plan` says why.")
        # `success` without a result means that the run was marked as successful while `plan` ran
        _require_success(states, states["plan"])
        return {}
    record, recipe = Path(plan["record"]), planned_recipe(plan)
    cluster: HostFacts | None = result_or_none(context, "check_cluster")
    evaluations = {"train_cpt": "evaluation.json", "train_cpt_stage2": "evaluation_stage2.json"}
    for training, evaluation in evaluations.items():
        totals = read(record, f"{training}/training.json")
        if totals.get("job_seconds"):  # None if an earlier run had done the training
            seconds = read(record, evaluation).get("job_seconds")
            record_run(HOME, f"{run}/{training}", recipe, cluster, totals, seconds)
    add_cost(record, recipe.cluster.gpus, price_of(recipe, cluster))
    compared = compare_with_plan(read(record, "plan.json"), took(record, recipe.cluster.gpus))
    add(record, "plan_and_actual.json", {"rows": compared})
    outcome = read(record, "run.json").get("marked") or _outcome(states)
    close_record(record, outcome)
    follow(record, patience=10.0)
    written = str(write_report(record))
    _require_success(states, outcome)
    return {"report": written, "state": outcome}


def _outcome(states: dict[str, str]) -> str:
    """``success`` if a model was published or nothing was new, else ``failed``."""
    if states["build"] == "skipped":  # nothing was new in what had come
        return "success"
    # a failed release is reported and retried, but does not make the run fail: the model exists
    steps = {task: state for task, state in states.items() if task != "release_cluster"}
    failed = any(state in ("failed", "upstream_failed") for state in steps.values())
    return "failed" if failed or states["publish"] != "success" else "success"


def _require_success(states: dict[str, str], outcome: str) -> None:
    if outcome != "success":
        failed = sorted(task for task, state in states.items() if state == "failed")
        why = f"{', '.join(failed)} failed" if failed else "it was marked as failed"
        raise RunFailed(f"the run did not succeed: {why}")
