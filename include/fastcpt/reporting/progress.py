"""The progress of a run's training: its step, its rate, and the remaining hours and money."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcpt.reporting.pictures import read_metrics
from fastcpt.reporting.record import TRAININGS, read, recipe_of, rented
from fastcpt.reporting.summary import duration, planned, span


@dataclass(frozen=True)
class TrainingProgress:
    training: str
    step: int
    steps: int
    facts: tuple[tuple[str, str], ...]  # name and text


def progress(record: Path) -> TrainingProgress | None:
    """The progress of the running training, from its last line of metrics; None if none is running."""
    going = [
        name
        for name in TRAININGS
        if (record / name / "metrics.jsonl").is_file() and not read(record, f"{name}/training.json")
    ]
    rows = read_metrics(record / going[-1] / "metrics.jsonl") if going else []
    if not rows:
        return None
    recipe, last = recipe_of(record), rows[-1]
    section = {
        "train_cpt": recipe.get("training"),
        "train_cpt_stage2": recipe.get("stage2"),
        "train_sft": (recipe.get("sft") or {}).get("training"),
    }[going[-1]]
    steps = int((section or {}).get("max_steps") or last["step"])
    return TrainingProgress(
        going[-1], int(last["step"]), steps, tuple(_facts(record, recipe, last))
    )


def _facts(
    record: Path, recipe: Mapping[str, Any], last: Mapping[str, Any]
) -> list[tuple[str, str]]:
    gpus = int((recipe.get("cluster") or {}).get("gpus") or 1)
    facts = [("loss", f"{last['loss']:.3f}" if last.get("loss") is not None else "not a number")]
    if rate := last.get("tokens_per_s_per_gpu"):
        facts.append(("tokens/s", f"{rate * gpus:,.0f}"))
    left = last.get("hours_left")
    if left is not None:
        facts.append(("time left for this training", duration(left * 3600)))
    spent, price = last.get("cost"), price_per_hour(record)
    if spent is not None:
        facts.append(("cost of this training so far", f"${spent:,.2f}"))
    if left is not None and price:
        facts.append(("cost left for this training", f"${left * price:,.2f}"))
    if (paid := rented(record, time.time())) is not None:
        money = read(record, "rent.json")["money"]
        words = f"${paid:,.2f}" + (f" of ${money:,.2f} (budget.money)" if money else "")
        facts.append(("rented so far, the whole run", words))
    promised = planned(record) or {}
    if promised.get("hours"):
        facts.append(("planned for the whole run", span(promised["hours"], " h")))
    if promised.get("cost"):
        facts.append(("its planned cost", span(promised["cost"], prefix="$")))
    if skipped := last.get("skipped_steps"):
        facts.append(("skipped steps", f"{skipped:,}"))
    return facts


def price_per_hour(record: Path) -> float | None:
    """USD per hour for all the run's GPUs, from its plan; None without a price."""
    promised = planned(record) or {}
    hours, cost = promised.get("hours"), promised.get("cost")
    price: float | None = cost[1] / hours[1] if hours and cost and hours[1] else None
    return price
