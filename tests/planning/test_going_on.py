"""The plan of a training that goes on from the champion, compared with one from the base model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastcpt.planning.plan import plan, plan_going_on
from fastcpt.recipe import load_recipe


def test_it_has_its_share_of_tokens_steps_hours_and_money_and_says_what_is_saved() -> None:
    recipe = load_recipe("cpt_config_fast", {"training.max_steps": 2000, "budget.hours": None})
    whole = plan(recipe, 800_000_000, "8xH100")
    found = plan_going_on(recipe, 200_000_000, 0.25, "8xH100")
    assert (found.steps, found.corpus_tokens) == (500, 200_000_000)
    assert found.passes == pytest.approx(whole.passes)
    assert found.hours_parts["training"] == pytest.approx(whole.hours_parts["training"] / 4)
    (note,) = [note for note in found.notes if note.startswith("goes on")]
    assert note.startswith(
        "goes on from the champion: 200,000,000 tokens in 500 steps; from the base model 800,000,000 in "
        "2,000. Saves about "
    )
    assert found.hours is not None
    assert whole.hours is not None
    assert found.cost is not None
    assert whole.cost is not None
    hours = (whole.hours.low + whole.hours.high - found.hours.low - found.hours.high) / 2
    money = (whole.cost.low + whole.cost.high - found.cost.low - found.cost.high) / 2
    assert note.endswith(f"{hours:,.1f} h and ${money:,.0f}")
    assert hours > 0.7 * whole.hours_parts["training"]
    # the rest is the plan of the short training
    assert replace(found, notes=()).text() in found.text().replace(f"note            {note}\n", "")


def test_unknown_hours_are_not_said_to_be_saved() -> None:
    recipe = load_recipe("sample")
    found = plan_going_on(recipe, 10_000, 0.5)
    assert found.steps == recipe.training.max_steps / 2
    assert ("Saves" in found.notes[-1]) == (found.hours is not None)
