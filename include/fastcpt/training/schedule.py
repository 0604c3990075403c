"""A training's schedule: phases, learning rate, micro-batches per step, and the time budget."""

from __future__ import annotations

import math
import time
from itertools import accumulate, pairwise
from typing import NamedTuple

from fastcpt.recipe import Recipe
from fastcpt.recipe_sections import Training
from fastcpt.training.data import Rows
from fastcpt.training.exits import TrainingError

MARGIN = 0.02  # of time_budget_hours left unused


def learning_rate(training: Training, step: int, progress: float) -> float:
    """The learning rate of a step (from 0) at ``progress`` (0..1) of the training.

    Linear warm-up over ``warmup_steps``, then the schedule's curve to 0 at the end; warmup_stable_decay is
    flat and falls linearly over the last fifth.
    """
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    begin = training.warmup_steps / training.max_steps
    left = max(0.0, 1.0 - max(0.0, progress - begin) / (1.0 - begin))
    factor = {
        "constant": 1.0,
        "linear": left,
        "cosine": 0.5 * (1.0 - math.cos(math.pi * left)),
        "warmup_stable_decay": min(1.0, (1.0 - progress) / 0.2),
    }[training.lr_scheduler_type]
    return training.learning_rate * max(0.0, factor)


class Phase(NamedTuple):
    """A part of the training: everything, or the adapter of one legal area."""

    area: str  # empty: everything
    rows: Rows
    training: Training  # max_steps and warmup_steps are the phase's own
    begin: float  # of the whole training, 0..1
    end: float


def phases_of(training: Training, data: Rows | dict[str, Rows]) -> list[Phase]:
    """One phase, or one for each area, with steps in proportion to its rows."""
    if not isinstance(data, dict):
        if not len(data):
            raise TrainingError("there are no rows to train on")
        return [Phase("", data, training, 0.0, 1.0)]
    steps, rows = training.max_steps, sum(map(len, data.values()))
    edges = [round(steps * part / rows) for part in accumulate(map(len, data.values()), initial=0)]
    phases = []
    for (area, own), (begin, end) in zip(data.items(), pairwise(edges), strict=True):
        if begin == end:
            raise TrainingError(
                f"max_steps ({steps}) leave none for lora.areas.{area}, which has {len(own)} of "
                f"{rows} rows: raise max_steps or leave it out"
            )
        share = {
            "max_steps": end - begin,
            "warmup_steps": training.warmup_steps * (end - begin) // steps,
        }
        phases.append(
            Phase(area, own, training.model_copy(update=share), begin / steps, end / steps)
        )
    return phases


def accumulation_steps(recipe: Recipe, training: Training, world: int) -> int:
    """Micro-batches per step that give the recipe's global batch on any number of ranks."""
    micro = training.per_device_train_batch_size
    batch = micro * training.gradient_accumulation_steps * recipe.cluster.gpus
    if batch % (micro * world):
        raise TrainingError(
            f"a step has {batch} sequences (recipe, {recipe.cluster.gpus} GPUs): they cannot be "
            f"split evenly over {world} ranks with {micro} at a time; change "
            "per_device_train_batch_size or the number of GPUs"
        )
    return batch // (micro * world)


class Clock:
    """The seconds of a training, and what ``time_budget_hours`` leaves for steps.

    It reserves time to save and to evaluate: another start-up, and per token the time of a training token
    (a forward alone is faster, but may be less optimised).
    """

    def __init__(self, hours: float | None, ends: float | None = None) -> None:
        """``ends``: when the host's money is spent, seconds since the epoch; it shortens the budget."""
        self.hours = hours
        self.ends = None if ends is None else time.monotonic() + ends - time.time()
        self.startup = self.startups = 0.0  # seconds of this start-up, and of all earlier ones
        self.saving = 0.0  # seconds to save the last checkpoint and the model
        self.evaluated_tokens = 0  # read by the evaluation that follows
        self.used = 0.0  # share of the budget, 0..1

    def seconds_left(self, seconds: float, tokens: int) -> float:
        """Seconds left for steps after ``seconds`` of steps on ``tokens``; negative if the budget is exceeded."""
        assert self.hours
        budget = (1.0 - MARGIN) * 3600 * self.hours
        evaluation = self.startup + self.evaluated_tokens * seconds / max(tokens, 1)
        left = budget - (self.startups + self.startup + seconds)
        if self.ends is not None:
            left = min(left, self.ends - time.monotonic())
        return left - self.saving - evaluation

    def progress(self, seconds: float, tokens: int, a_step: float) -> float:
        """Progress by time, 0..1; 1 if no further step of ``a_step`` seconds fits, 0 without a budget."""
        if not self.hours:
            return 0.0
        whole = seconds + self.seconds_left(seconds, tokens) - a_step
        return min(1.0, seconds / whole) if whole > 0 else 1.0
