"""From legal documents to a gated, fine-tuned model. This file only wires the steps.

    plan -> list_documents -> score (a task per group of files) -> select
    select -> tokenize (a task per group of files) -> build -> sync -> train_cpt
    plan -> check_cluster -> prepare_environment -> sync
    build, check_cluster -> approve_plan -> acquire_cluster -> prepare_rented -> train_cpt
    train_cpt -> evaluate_cpt -> gate -> train_sft -> evaluate_sft -> publish
    publish -> release_cluster -> report
    gate -> train_cpt_stage2 -> evaluate_stage2 -> gate_stage2 -> train_sft

Tasks pass on paths and digests. Every output is found again by its digest, so any task can be retried,
cleared or run again and does only what is left. Each step is a function in plugins/steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from airflow.sdk import Param, TriggerRule, dag, task

import steps.cluster
import steps.corpus
import steps.gate
import steps.plan
import steps.publish
import steps.rent
import steps.report
import steps.training
from approval import ApprovePlan
from fastcpt.recipe import DEFAULT_RECIPE, recipe_names
from fastcpt.recipe_form import FORM, form_schema
from notifications import tell_failure
from remote_job import RemoteJobOperator
from retries import RETRIES

PARAMS = {
    "recipe": Param(
        DEFAULT_RECIPE,
        type="string",
        enum=recipe_names(),
        description="What to run. The fields below replace its values if filled in.",
    ),
    **{name: Param(None, **form_schema(name)) for name in FORM},
    "overrides": Param(
        {},
        type="object",
        description='Any other value of the recipe, by its dotted key: {"budget.money": 400}.',
    ),
    "run_even_if_plan_says_no": Param(
        False,
        type="boolean",
        description="Continue even if the plan does not fit or does not know the model.",
    ),
    "require_approval": Param(
        False,
        type="boolean",
        description="Wait for a person to approve the plan before GPUs are used.",
    ),
}


def on_gpus(job: Callable[..., Any], then: Callable[..., Any], **options: Any) -> RemoteJobOperator:
    return RemoteJobOperator(
        task_id=job.__name__,
        job=job,
        then=then,
        secrets=steps.cluster.secrets,
        in_turn=True,
        **options,
    )


@dag(
    dag_id="fast_cpt",
    schedule=None,  # fast_cpt_schedules.py
    is_paused_upon_creation=False,  # it only runs when triggered
    params=PARAMS,
    doc_md=__doc__,
    tags=["training"],
    default_args={**RETRIES, "on_failure_callback": tell_failure},
)
def fast_cpt() -> None:
    # store a result as one record, not also key by key
    step = partial(task, multiple_outputs=False)
    plan = step(steps.plan.plan)()
    documents = step(steps.plan.list_documents)(plan)
    scores = step(steps.corpus.score).partial(plan=plan).expand(parts=documents)
    selection = step(steps.corpus.select)(plan, scores)
    tokens = (
        step(steps.corpus.tokenize).partial(plan=plan, selection=selection).expand(parts=documents)
    )
    corpus = step(steps.corpus.build)(plan, selection)

    cluster = step(steps.cluster.check_cluster)(plan)
    environment = RemoteJobOperator(
        task_id="prepare_environment", job=steps.cluster.prepare_environment
    )
    places = step(steps.cluster.sync)(plan, corpus, cluster, environment.output)

    # setup and teardown, so that a cleared step finds its machine or gets another one
    rented = step(steps.rent.acquire_cluster)(plan).as_setup()
    prepare_rented = RemoteJobOperator(
        task_id="prepare_rented", job=steps.rent.prepare_rented, then=steps.rent.bring_to_rented
    ).as_setup()
    release = step(steps.rent.release_cluster)().as_teardown(setups=[rented, prepare_rented])

    train_cpt = on_gpus(steps.training.train_cpt, steps.training.keep_training)
    evaluate_cpt = on_gpus(steps.training.evaluate_cpt, steps.training.keep_evaluation)
    gate = task.branch(steps.gate.gate)()
    train_cpt_stage2 = on_gpus(steps.training.train_cpt_stage2, steps.training.keep_training)
    evaluate_stage2 = on_gpus(steps.training.evaluate_stage2, steps.training.keep_evaluation)
    gate_stage2 = step(steps.gate.gate_stage2)()
    # one of the two gates before it was skipped
    train_sft = on_gpus(
        steps.training.train_sft,
        steps.training.keep_training,
        trigger_rule=TriggerRule.NONE_FAILED_MIN_ONE_SUCCESS,
    )
    evaluate_sft = on_gpus(steps.training.evaluate_sft, steps.training.keep_evaluation)
    publish = on_gpus(steps.publish.publish, steps.publish.keep_published)
    report = step(steps.report.report)()

    approve_plan = ApprovePlan(task_id="approve_plan", retries=0)

    tokens >> corpus
    cluster >> environment
    [corpus, cluster] >> approve_plan
    approve_plan >> rented >> prepare_rented
    [places, prepare_rented] >> train_cpt >> evaluate_cpt >> gate >> [train_sft, train_cpt_stage2]
    train_cpt_stage2 >> evaluate_stage2 >> gate_stage2 >> train_sft
    # teardowns run in any case, also after the run was marked; the last one's state becomes the run's
    report.as_teardown(on_failure_fail_dagrun=True)
    train_sft >> evaluate_sft >> publish >> release >> report


fast_cpt()
