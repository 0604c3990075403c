"""The length of a training that goes on from the champion."""

from __future__ import annotations

from typing import Any

import pytest

from fastcpt.recipe import load_recipe
from fastcpt.recipe_sections import Training
from fastcpt.recurring import share_of_all, shortened


@pytest.mark.parametrize(
    ("share", "steps", "warmup"), [(1.0, 200, 20), (0.25, 50, 5), (0.026, 6, 0), (0.0001, 1, 0)]
)
def test_steps_and_warm_up_are_in_proportion_to_the_tokens(
    share: float, steps: int, warmup: int
) -> None:
    found = shortened(Training(max_steps=200, warmup_steps=20, learning_rate=1e-4), share)
    assert (found.max_steps, found.warmup_steps) == (steps, warmup)
    assert found.learning_rate == 1e-4


def test_the_share_counts_the_replay_and_is_1_from_the_base_model() -> None:
    gone_on = {"new_tokens": 300, "replayed_tokens": 100, "all_tokens": 1000}
    manifest: Any = {"gone_on": gone_on}
    assert share_of_all(manifest) == 0.4
    assert share_of_all({**manifest, "gone_on": None}) == share_of_all({}) == 1.0  # type: ignore[typeddict-item]


def test_recipes_begin_with_the_base_model_unless_they_say_otherwise() -> None:
    assert load_recipe("sample").recurring.start == "base"
    recipe = load_recipe("sample", {"recurring.start": "champion", "recurring.replay": 0.1})
    assert (recipe.recurring.start, recipe.recurring.replay) == ("champion", 0.1)
