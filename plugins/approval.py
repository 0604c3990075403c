"""Plans again with the actual corpus and cluster, and waits for a person's approval if wanted."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.sdk import Context
from airflow.sdk.definitions.param import ParamsDict

import steps.plan
from fastcpt.reporting.plan_table import COUNTED, markdown
from fastcpt.reporting.record import add_time, read, rented
from notifications import tell
from run_pages import PREFIX, ROOT
from steps.rent import replaces_a_machine


def body_of(plan: Path) -> str:
    """What the page that asks shows: the plan's tables, and a link to the run's page."""
    spent = rented(plan.parent, time.time())
    money = "nothing has been spent on GPUs" if spent is None else f"{spent:,.2f} USD were spent"
    run = f"{ROOT}/plugin{PREFIX}{PREFIX}/run/{quote(plan.parent.name)}"
    return (
        f"{markdown(read(plan.parent, plan.name), COUNTED)}\n\n"
        f"[The run's page]({run}) has the corpus and the whole recipe. "
        f"Rejecting ends the run: {money}."
    )


class ApprovePlan(ApprovalOperator):
    """Refuse a run that does not fit, or wait for approval in the UI (``require_approval``).

    Without ``require_approval``, or if a machine like the planned one was approved, rented and taken away
    by its provider, the task ends at once with the plan's figures.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(subject="Approve the plan of this run", fail_on_reject=True, **kwargs)

    def execute(self, context: Context) -> Any:
        plan = steps.plan.final_plan(context)
        if not context["params"]["require_approval"] or replaces_a_machine(context):
            return {"plan": plan["path"]}
        self.body = body_of(Path(plan["path"]))
        self._note(context, time.time())
        # the form only asks for approval, not for the run's parameters again
        self.params = ParamsDict({})
        link = context["ti"].log_url.partition("?")[0] + "/required_actions"
        tell(context, "waiting for approval", plan["text"], link)
        return super().execute(context)

    def execute_complete(self, context: Context, event: dict[str, Any]) -> Any:
        self._note(context)
        return super().execute_complete(context, event)

    def _note(self, context: Context, began: float | None = None) -> None:
        """Record in the run's record since when it has been waiting for a person."""
        record = Path(context["ti"].xcom_pull(task_ids="plan")["record"])
        began = began or read(record, "times/approval.json")["began"]
        add_time(record, "approval", began, time.time())
