"""Releases rented machines of runs that ended, were deleted, or spent their money.

A run that lost its machine, or got one that differs from the plan, begins again: each of its steps
finds its earlier result, and its training resumes from the newest copied checkpoint.
"""

from __future__ import annotations

import time

from airflow.sdk import get_current_context
from airflow.sdk.execution_time import task_runner
from airflow.sdk.execution_time.comms import TriggerDagRun
from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance

from fastcpt.files import HOME
from gpu_turns import goes_on
from notifications import tell

MINUTES = 3


def look_after() -> None:
    """Check every machine of the ledger, and again at the moment when one has to be released."""
    from fastcpt.rent import machines

    context, until = get_current_context(), time.time() + 60 * MINUTES - 30
    while True:
        for news in machines.look_after(HOME, _goes_on):
            rental = news.rental
            print(f"{rental.key}: {news.what}: {news.reason}")
            tell(context, f"rented machine of {rental.run}: {news.what}", news.reason)
        for rental in machines.to_begin_again(HOME, _goes_on):
            print(f"{rental.key}: {rental.why}: {rental.run} begins again")
            # the whole run is cleared
            wanted = TriggerDagRun(dag_id=rental.dag, run_id=rental.run, reset_dag_run=True)
            task_runner.SUPERVISOR_COMMS.send(wanted)
            machines.begun_again(HOME, rental)
        due = machines.next_due(HOME)
        if due is None or max(due, time.time()) > until:
            return
        time.sleep(max(1.0, due - time.time()))


def _goes_on(dag: str, run: str) -> bool | None:
    """Whether a run has not ended; None if it was deleted."""
    if goes_on(dag, run):
        return True
    return False if RuntimeTaskInstance.get_dr_count(dag, run_ids=[run]) else None
