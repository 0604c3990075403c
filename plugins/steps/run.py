"""What a step needs of its run: the recipe, the record, the price of the GPUs."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar, cast

from airflow.sdk import Context, get_current_context

from fastcpt.recipe import Recipe, load_recipe
from fastcpt.recurring import Start
from steps.results import HostFacts, Plan, result_of
from tracking import follow

P = ParamSpec("P")
Returned = TypeVar("Returned")


def planned_recipe(plan: Plan) -> Recipe:
    """The run's recipe as ``plan`` resolved it."""
    return load_recipe(plan["recipe"])


def start_of_run(record: Path) -> Start | None:
    """The champion that the run goes on from, as ``plan`` found it; None: the base model."""
    from fastcpt.reporting.record import read

    return cast(Start, read(record, "start.json")) or None


def noted(step: Callable[P, Returned]) -> Callable[P, Returned]:
    """Decorate a step to write its start and end into the run's record."""

    @functools.wraps(step)
    def noted(*args: P.args, **kwargs: P.kwargs) -> Returned:
        began = time.time()
        answer = step(*args, **kwargs)
        context = get_current_context()
        note(context, Path(result_of(context, "plan")["record"]), began)
        return answer

    return noted


def note(context: Context, record: Path, began: float) -> None:
    """Note in the record when a task worked; MLflow, where there is one, is told what is new."""
    from fastcpt.reporting.record import add_time

    task = context["ti"]
    part = "" if task.map_index in (None, -1) else f"-{task.map_index}"
    add_time(record, f"{task.task_id}{part}", began, time.time())
    follow(record)


def price_of(recipe: Recipe, cluster: HostFacts | None) -> float | None:
    """USD per GPU hour: the recipe's, or the table's for the GPUs that were found."""
    from fastcpt.planning.hardware import hardware_of

    if recipe.cluster.cpu_only or recipe.budget.price_per_gpu_hour is not None:
        return recipe.budget.price_per_gpu_hour
    gpu = hardware_of(recipe.cluster, cluster).gpu
    return gpu.usd_hour if gpu else None
