"""Solves for the most tokens or the fewest GPUs within hours and money; the result is a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastcpt.planning.alternatives import MORE_GPUS, Keep, alternatives
from fastcpt.planning.costs import Job
from fastcpt.planning.figures import plan_on
from fastcpt.planning.hardware import Hardware, hardware_of
from fastcpt.planning.jobs import best_job, changed, host_has_memory, job_changes
from fastcpt.planning.models import shape_of
from fastcpt.planning.result import CannotRun, Plan, PlanRefused
from fastcpt.recipe import Recipe

MOST_STEPS = 10_000_000  # the recipe's own limit


def most_tokens(
    recipe: Recipe,
    tokens: int | None = None,
    cluster: Mapping[str, Any] | str | None = None,
    history: Path | None = None,
    keep: Iterable[Keep] = (),
) -> tuple[Recipe, Plan]:
    """The recipe with as many steps as its budget allows on the cluster, and its plan.

    ``recipe.budget`` must have hours or money. Micro-batch and recomputation become the fastest that fit.
    Raises ``PlanRefused`` if no step fits, with alternatives to ``recipe`` that do not change ``keep``.
    """
    _require_budget(recipe)
    hardware = _gpus_of(recipe, cluster)

    def refused() -> PlanRefused:
        return _refused(recipe, tokens, hardware, history, keep)

    job = _best(recipe, hardware)
    if job is None:
        raise refused()
    other = changed(recipe, job_changes(recipe, job, hardware))

    def with_steps(steps: int) -> tuple[Recipe, Plan]:
        warmup = min(recipe.training.warmup_steps, steps // 10)
        cut = changed(other, {"training.max_steps": steps, "training.warmup_steps": warmup})
        return cut, plan_on(cut, tokens, hardware, history)

    if not with_steps(1)[1].fits:
        raise refused()
    # hours and money grow with the steps: find the last number that fits by bisection
    low, high = 1, MOST_STEPS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if with_steps(middle)[1].fits else (low, middle - 1)
    return with_steps(low)


def fewest_gpus(
    recipe: Recipe,
    tokens: int | None = None,
    cluster: Mapping[str, Any] | str | None = None,
    history: Path | None = None,
    keep: Iterable[Keep] = (),
) -> tuple[Recipe, Plan]:
    """The recipe on the fewest GPUs of the cluster's kind that keep its budget with the same tokens.

    Raises ``PlanRefused`` with alternatives if no number of GPUs does.
    """
    _require_budget(recipe)
    given = _gpus_of(recipe, cluster)
    for count in MORE_GPUS:
        hardware = given.with_count(count)
        if recipe.global_batch_size % count:
            continue
        shape = shape_of(recipe)
        job = best_job(recipe, shape, hardware) if shape else None
        if job is None or not host_has_memory(job, hardware):
            continue
        other = changed(recipe, job_changes(recipe, job, hardware))
        found = plan_on(other, tokens, hardware, history)
        if found.fits:
            return other, found
    raise _refused(recipe, tokens, given, history, keep)


def _require_budget(recipe: Recipe) -> None:
    if recipe.budget.hours is None and recipe.budget.money is None:
        raise ValueError("nothing to solve for: give hours (--hours), money (--budget) or both")


def _gpus_of(recipe: Recipe, cluster: Mapping[str, Any] | str | None) -> Hardware:
    hardware = hardware_of(recipe.cluster, cluster)
    if hardware.gpu is None:
        raise ValueError(
            "on CPUs nothing is known to solve with: name a cluster (--cluster 4xB200)"
        )
    return hardware


def _best(recipe: Recipe, hardware: Hardware) -> Job | None:
    shape = shape_of(recipe)
    if shape is None:
        raise ValueError(plan_on(recipe, None, hardware, None).problems[0])
    return best_job(recipe, shape, hardware)


def _refused(
    recipe: Recipe,
    tokens: int | None,
    hardware: Hardware,
    history: Path | None,
    keep: Iterable[Keep],
) -> PlanRefused:
    found = plan_on(recipe, tokens, hardware, history)
    others = tuple(alternatives(recipe, tokens, hardware, history, keep))
    refusal = CannotRun if found.problems else PlanRefused
    return refusal(replace(found, alternatives=others).message())
