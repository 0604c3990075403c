"""A plan's alternative as a recipe of one's own, which plans to the same figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastcpt.planning.hardware import Hardware
from fastcpt.planning.placement import batch_problem, placement
from fastcpt.planning.plan import Alternative, Plan, changed
from fastcpt.recipe import Recipe


def own_recipe(
    recipe: Recipe, name: str, description: str, changes: Mapping[str, Any] | None = None
) -> Recipe:
    """The changed recipe under a name of its own; what the guide claims is not about it."""
    own = {"name": name, "description": description, "claim": None}
    return changed(recipe, {**(changes or {}), **own})


def placed(recipe: Recipe, hardware: Hardware) -> Recipe:
    """The recipe with the GPUs it was planned on named in it; as it is where they cannot split its
    batch, or are CPUs."""
    if hardware.gpu is None or batch_problem(recipe, hardware) is not None:
        return recipe
    return changed(recipe, placement(recipe, hardware))


def numbered(found: Plan, number: int) -> Alternative:
    """The alternative that the plan's message lists under ``number``, from 1; ``ValueError`` where
    there is none."""
    if found.fits:
        raise ValueError(f"--take {number}: '{found.recipe}' fits as it is, nothing else is listed")
    if not 1 <= number <= len(found.alternatives):
        raise ValueError(f"--take {number}: {len(found.alternatives)} alternatives are listed")
    return found.alternatives[number - 1]
