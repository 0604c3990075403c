"""Plans a recipe on a cluster: time, memory, money; or why it does not fit, and what would.

    plan(recipe, tokens, cluster, history) -> Plan

``tokens`` of the corpus are counted by the build, or estimated from the documents' bytes
(``estimated_tokens``). ``cluster`` is the result of ``check_cluster``, or a name such as ``4xB200``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastcpt.planning.alternatives import Keep, alternatives
from fastcpt.planning.figures import plan_on
from fastcpt.planning.hardware import hardware_of
from fastcpt.planning.result import CannotRun, Plan, PlanRefused
from fastcpt.recipe import Recipe
from fastcpt.recurring import shortened

CHARACTERS_PER_TOKEN = 4.4  # running legal text, Llama's and dolma2's vocabularies


def estimated_tokens(document_bytes: int, recipe: Recipe) -> int:
    """An upper estimate of corpus tokens from the documents' uncompressed bytes, before any is read.

    4.4 characters per token, then the recipe's selection. Thresholds, duplicates and held-out acts are not
    known yet.
    """
    return selected_tokens(round(document_bytes / CHARACTERS_PER_TOKEN), recipe)


def selected_tokens(tokens: int, recipe: Recipe) -> int:
    """How many of ``tokens`` a recipe selects: its share, limited by its token budget."""
    share = round(tokens * (recipe.selection.top_share or 1.0))
    return min(share, recipe.selection.target_tokens or share)


def plan(
    recipe: Recipe,
    tokens: int | None = None,
    cluster: Mapping[str, Any] | str | None = None,
    history: Path | None = None,
    keep: Iterable[Keep] = (),
) -> Plan:
    """Plan ``recipe``'s continued pre-training.

    ``tokens``: of the corpus; None: the recipe's ``target_tokens``. ``cluster``: facts of
    ``check_cluster``, a name (``4xB200``), or None for the recipe's own. ``history``: the file that
    ``record_run`` writes. ``keep``: what the alternatives may not change. Raises a kind of ``ValueError``
    for an unknown cluster or model; a recipe that does not fit is a result, not an error (see
    ``require_fit``).
    """
    hardware = hardware_of(recipe.cluster, cluster)
    found = plan_on(recipe, tokens, hardware, history)
    if found.fits or hardware.gpu is None:
        return found
    return replace(found, alternatives=tuple(alternatives(recipe, tokens, hardware, history, keep)))


def plan_going_on(
    recipe: Recipe,
    tokens: int,
    share: float,
    cluster: Mapping[str, Any] | str | None = None,
    history: Path | None = None,
) -> Plan:
    """The plan of a training that goes on from the champion on ``tokens``, with what that saves.

    ``tokens`` are ``share`` (above 0, at most 1) of those from the base model.
    """
    trainings = {
        "training": shortened(recipe.training, share),
        "stage2": shortened(recipe.stage2, share),
    }
    found = plan(recipe.model_copy(update=trainings), tokens, cluster, history)
    base = plan_on(recipe, round(tokens / share), hardware_of(recipe.cluster, cluster), history)
    return replace(found, notes=(*found.notes, _saved(found, base)))


def _saved(found: Plan, base: Plan) -> str:
    words = (
        f"goes on from the champion: {found.corpus_tokens:,} tokens in {found.steps:,} steps; from the "
        f"base model {base.corpus_tokens:,} in {base.steps:,}"
    )
    if found.hours and base.hours:
        words += f". Saves about {base.hours.middle - found.hours.middle:,.1f} h"
    if found.cost and base.cost:
        words += f" and ${base.cost.middle - found.cost.middle:,.0f}"
    return words


def require_fit(plan: Plan, command: str = "the same command with") -> None:
    """Raise ``PlanRefused`` with the plan's message if it does not fit; ``CannotRun`` if it never would."""
    if not plan.fits:
        raise (CannotRun if plan.problems else PlanRefused)(plan.message(command))
