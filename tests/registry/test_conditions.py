"""Whether a model is recommended: paired over documents, with figures worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fastcpt.recipe_sections import Conditions, Publish
from fastcpt.registry.conditions import recommend

GATE = {"validation_set": "random", "value": 9.0, "threshold": 18.0, "passed": True}
NATS = 1000 * np.random.default_rng(1).lognormal(size=200)  # of a base model; some acts are long


def evaluation(factor: float, noise: float = 0.0, right: str = "", **more: Any) -> dict[str, Any]:
    """A model that needs ``factor`` of the base model's nats, give or take on each document."""
    drawn = np.random.default_rng(7).normal(size=len(NATS))
    drawn -= (drawn * NATS).sum() / NATS.sum()  # in sum exactly the factor
    found: dict[str, Any] = {
        "validation_set": "random",
        "window": 512,
        "random": {
            "by_document": {
                "id": [f"d{n}" for n in range(len(NATS))],
                "bytes": [1000] * len(NATS),
                "model": (NATS * (factor + noise * drawn)).tolist(),
                "base": NATS.tolist(),
            }
        },
    }
    if right:
        found["questions"] = {"model": {"right": right}}
    return {**found, **more}


def named(decision: dict[str, Any], words: str) -> dict[str, Any]:
    (condition,) = [one for one in decision["conditions"] if words in one["what"]]
    return dict(condition)


def test_the_first_model_has_to_beat_the_base_model() -> None:
    better = recommend(Publish(), GATE, evaluation(0.9), None)
    assert better["recommended"]
    assert better["against"] is None
    saved = named(better, "over the base model")
    # one factor for all documents: no noise
    assert [saved[key] for key in ("value", "low", "high")] == pytest.approx([0.1] * 3)
    worse = recommend(Publish(), GATE, evaluation(1.01), None)
    assert not worse["recommended"]
    assert named(worse, "over the base model")["value"] == pytest.approx(-0.01)
    missed = {**GATE, "passed": False, "value": 20.0}
    assert not recommend(Publish(), missed, evaluation(0.9), None)["recommended"]


@pytest.mark.parametrize(
    ("factor", "noise", "recommended"),
    [
        (0.896, 0.0, True),  # 0.4 / 90 is 0.44 %: twice the margin
        (0.896, 0.002, True),
        (0.8991, 0.0, False),  # 0.1 %: below the margin
        (0.896, 0.2, False),  # not beyond the noise
        (0.904, 0.002, False),  # worse by twice the margin
        (0.9, 0.0, False),  # the same again
    ],
)
def test_a_challenger_is_better_by_the_margin_and_beyond_noise(
    factor: float, noise: float, recommended: bool
) -> None:
    champion = {"model": "sample-1", "evaluation": evaluation(0.9)}
    found = recommend(Publish(margin=0.002), GATE, evaluation(factor, noise), champion)
    assert found["recommended"] is recommended
    assert found["against"] == "sample-1"
    saved = named(found, "over the champion")
    assert saved["low"] <= saved["value"] <= saved["high"]


def test_pairs_see_what_sums_do_not() -> None:
    """Documents differ by far more than the models do: apart, the two would not be told from another."""
    champion = {"model": "sample-1", "evaluation": evaluation(0.9)}
    saved = named(
        recommend(Publish(), GATE, evaluation(0.896, 0.002), champion), "over the champion"
    )
    assert saved["high"] - saved["low"] < 0.002
    assert NATS.std() / math.sqrt(len(NATS)) / NATS.mean() > 0.05


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"window": 1024}, "the window is 1024, the champion's 512"),
        ({"random": {}}, "an older version"),
        (
            {"random": {"by_document": {"id": ["d"], "bytes": [1], "model": [1.0]}}},
            "not evaluated on",
        ),
    ],
)
def test_what_cannot_be_compared_is_a_candidate(change: dict[str, Any], why: str) -> None:
    champion = {"model": "sample-1", "evaluation": evaluation(0.9)}
    found = recommend(Publish(), GATE, {**evaluation(0.5), **change}, champion)
    assert not found["recommended"]
    assert why in named(found, "over the champion")["why"]


def test_answers_may_not_be_worse_than_the_champion_s() -> None:
    champion = {"model": "sample-1", "evaluation": evaluation(0.9, right="1" * 80 + "0" * 20)}
    equal = recommend(Publish(), GATE, evaluation(0.8, right="1" * 79 + "0" * 21), champion)
    assert equal["recommended"]
    found = recommend(Publish(), GATE, evaluation(0.8, right="1" * 60 + "0" * 40), champion)
    assert not found["recommended"]
    assert named(found, "right answers")["value"] == pytest.approx(-0.2)
    fewer = recommend(Publish(), GATE, evaluation(0.8, right="1" * 50), champion)
    assert not fewer["recommended"]
    assert named(fewer, "right answers")["why"] == "50 questions were asked, the champion 100"


def test_a_champion_that_was_trained_on_what_judges_it_is_no_measure() -> None:
    champion = {"model": "sample-1", "evaluation": evaluation(0.9)}
    found = recommend(Publish(), GATE, evaluation(0.8), champion, trained_on=3)
    assert not found["recommended"]
    assert named(found, "was trained on")["value"] == 3
    unknown = recommend(Publish(), GATE, evaluation(0.8), champion, trained_on=None)
    assert not unknown["recommended"]


def test_the_recipe_s_own_conditions() -> None:
    general = {
        "id": ["g1", "g2"],
        "bytes": [100, 100],
        "base": [100 * math.log(2)] * 2,  # one bit a byte
        "model": [103 * math.log(2), 105 * math.log(2)],
    }
    gain = {"value": -0.01, "low": -0.05, "high": 0.03}
    found = evaluation(
        0.9,
        general={"by_document": general},
        questions={"model": {"right": "", "table": {"all": {"gain": gain}}}},
    )

    def met(**wanted: float) -> list[bool]:
        publish = Publish(conditions=Conditions(**wanted))
        return [one["met"] for one in recommend(publish, GATE, found, None)["conditions"][2:]]

    assert met() == []
    assert met(forgotten=0.05, tasks=0.0) == [True, True]
    assert met(forgotten=0.03, tasks=0.04) == [False, False]
    saved = 0.1 * NATS.sum() / math.log(2) / (1000 * len(NATS))
    assert met(improvement=saved - 1e-9) == [True]
    assert met(improvement=saved + 1e-9) == [False]
    unmeasured = recommend(
        Publish(conditions=Conditions(forgotten=1.0)), GATE, evaluation(0.9), None
    )["conditions"][-1]
    assert (unmeasured["met"], unmeasured["value"]) == (False, None)
    assert "documents.replay" in unmeasured["why"]
