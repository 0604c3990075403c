"""Lays out a recipe's batch over GPUs, or says why that is impossible and what helps."""

from __future__ import annotations

from typing import Any

from fastcpt.planning.hardware import Hardware
from fastcpt.recipe import Recipe
from fastcpt.recipe_sections import Training

SECTIONS = ("training", "stage2", "sft.training")


def batch_of(recipe: Recipe, training: Training) -> int:
    """Sequences per step of a training, over all GPUs."""
    micro = training.per_device_train_batch_size
    return micro * training.gradient_accumulation_steps * recipe.cluster.gpus


def placement(recipe: Recipe, hardware: Hardware, micro: int | None = None) -> dict[str, Any]:
    """Changes that put the recipe on these GPUs and name them; each training keeps its batch.

    Micro-batches become at most ``micro``, or else keep their size, but are reduced until they divide a
    GPU's share of the batch. A batch that cannot be split evenly is rounded down, to at least one sequence
    per GPU.
    """
    assert hardware.gpu is not None
    changes: dict[str, Any] = {"cluster.gpus": hardware.count, "cluster.gpu": hardware.gpu.name}
    if recipe.cluster.cpu_only:
        changes["cluster.cpu_only"] = False
    trainings = (recipe.training, recipe.stage2, recipe.sft.training)
    for section, training in zip(SECTIONS, trainings, strict=True):
        a_gpu = max(1, batch_of(recipe, training) // hardware.count)
        most = training.per_device_train_batch_size if micro is None else micro
        own = next(m for m in range(most, 0, -1) if a_gpu % m == 0)
        changes[f"{section}.per_device_train_batch_size"] = own
        changes[f"{section}.gradient_accumulation_steps"] = a_gpu // own
    return changes


def batch_problem(recipe: Recipe, hardware: Hardware) -> str | None:
    """Why a step cannot be split over the GPUs, and what helps; None if it can."""
    batch, count = recipe.global_batch_size, hardware.count
    micro = recipe.training.per_device_train_batch_size
    if batch % (micro * count) == 0:
        return None
    cannot = f"batch: a step's {batch} sequences cannot be split over {count} GPUs"
    if batch % count == 0:
        a_gpu = batch // count
        fits = next(m for m in range(min(micro, a_gpu), 0, -1) if a_gpu % m == 0)
        return (
            f"{cannot} with {micro} at a time: each has {a_gpu}; set training.per_device_train_batch_size "
            f"to {fits} and training.gradient_accumulation_steps to {a_gpu // fits}"
        )
    fewer = next(n for n in range(count, 0, -1) if batch % n == 0)
    more = next((n for n in range(count, batch + 1) if batch % n == 0), None)
    gpus = f"{fewer} GPU{'s' if fewer > 1 else ''}" if more is None else f"{fewer} or {more} GPUs"
    other = placement(recipe, hardware)
    a_gpu = (
        other["training.per_device_train_batch_size"]
        * other["training.gradient_accumulation_steps"]
    )
    return (
        f"{cannot}, whatever the micro-batch: take {gpus}, or steps of {a_gpu * count} sequences "
        f"(cluster.gpus {count}, training.per_device_train_batch_size "
        f"{other['training.per_device_train_batch_size']}, training.gradient_accumulation_steps "
        f"{other['training.gradient_accumulation_steps']})"
    )
