"""Whether training goes on from the champion, and if not, why, before any money is spent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastcpt.recipe import Recipe, load_recipe
from fastcpt.registry.champion import add_model, promote
from fastcpt.registry.start import StartError, start_of
from fastcpt.reporting.record import open_record
from registry.conftest import GOOD


def recipe_with(**settings: Any) -> Recipe:
    overrides = {key.replace("__", "."): value for key, value in settings.items()}
    return load_recipe("sample", {"recurring.start": "champion", **overrides})


def publish(home: Path, name: str, recipe: Recipe, **facts: Any) -> None:
    """A champion that a run of the recipe published."""
    record = open_record(home, f"run of {name}", "fast_cpt", recipe)
    about = {"run": "r", "record": record.name, "path": f"host:/{name}", "training": "sft"}
    decision = {"recommended": True, "against": None, "conditions": [GOOD]}
    add_model(home, recipe.name, name, {**about, "corpus": "c", "decision": decision, **facts}, {})
    promote(home, recipe.name, name, "ann", "a test")


MADE = {"before_sft": "ab12", "corpora": ["b", "c"]}


def test_without_a_champion_and_where_the_recipe_says_so_it_is_the_base_model(home: Path) -> None:
    assert start_of(recipe_with(), home) is None
    publish(home, "sample-1", recipe_with(), **MADE)
    assert start_of(load_recipe("sample"), home) is None


def test_it_is_the_champion_with_all_that_it_was_trained_on(home: Path) -> None:
    publish(home, "sample-1", recipe_with(training__max_steps=50), **MADE)
    start = start_of(recipe_with(), home)
    assert start is not None
    assert (start["model"], start["training"], start["corpora"]) == ("sample-1", "ab12", ["b", "c"])
    publish(home, "sample-2", recipe_with(), before_sft="cd34", corpora=["d"])
    second = start_of(recipe_with(), home)
    assert second is not None
    assert second["training"] == "cd34"


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"model__dtype": "bfloat16"}, "model.dtype was 'float32' and is 'bfloat16'"),
        ({"corpus__max_seq_length": 128}, "corpus.max_seq_length was 256 and is 128"),
        ({"tokenizer__train_vocab_size": 999}, "tokenizer.train_vocab_size was"),
        ({"lora": {"r": 4}}, "lora was None and is"),
    ],
)
def test_a_champion_of_another_recipe_is_refused_with_what_differs(
    home: Path, settings: dict[str, Any], why: str
) -> None:
    publish(home, "sample-1", recipe_with(corpus__max_seq_length=256), **MADE)
    settings = {"corpus__max_seq_length": 256, **settings}
    with pytest.raises(StartError) as refused:
        start_of(recipe_with(**settings), home)
    assert why in str(refused.value)
    assert "recurring.start to base" in str(refused.value)


def test_weights_that_a_rented_host_would_not_have_are_missed_before_it_is_rented(
    home: Path,
) -> None:
    command = ["true"]
    rent = {"acquire": command, "release": command, "status": command}
    publish(home, "sample-1", recipe_with(cluster__rent=rent), **MADE)
    with pytest.raises(StartError, match="ab12 is missing"):
        start_of(recipe_with(cluster__rent=rent), home)
    (home / "before_sft" / "ab12").mkdir(parents=True)
    assert start_of(recipe_with(cluster__rent=rent), home)


def test_a_champion_of_an_older_version_is_refused(home: Path) -> None:
    publish(home, "sample-1", recipe_with())
    with pytest.raises(StartError, match="older version"):
        start_of(recipe_with(), home)
