"""A corpus for going on from a champion: new documents, a replay of the rest, nothing counted as new twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from corpus.made import Record, act, acts, text_of
from fastcpt.corpus.build import build
from fastcpt.corpus.documents import list_parts
from fastcpt.corpus.going_on import NothingNew
from fastcpt.corpus.score import score_parts
from fastcpt.corpus.select import select
from fastcpt.corpus.selected import BuildError
from fastcpt.held_out import HeldOutError, freeze, trained_and_held_out
from fastcpt.recipe import Recipe
from fastcpt.recurring import Start

Writer = Callable[..., Path]
Recipes = Callable[..., Recipe]


def made(recipe: Recipe, home: Path, start: Start | None = None) -> dict[str, Any]:
    scores = score_parts(list_parts(recipe.documents), recipe, home, 1)
    selection = select([score["path"] for score in scores], recipe, home)
    return dict(build(selection["path"], recipe, home, 1, start))


def start_with(*corpora: dict[str, Any], training: str = "ab12") -> Start:
    digests = [corpus["digest"] for corpus in corpora]
    return {"model": "law-1", "training": training, "record": "r", "corpora": digests}


def trained(home: Path, corpus: dict[str, Any]) -> set[int]:
    ledger = pq.read_table(home / "ledger" / corpus["digest"] / "texts.parquet").to_pylist()
    return {row["content"] for row in ledger if row["split"] == "train"}


def later(records: list[Record]) -> list[Record]:
    """A week later: ten new acts, and one of the old ones is corrected."""
    corrected = {**records[3], "full_text": f"{records[3]['full_text']} {text_of(77, 40)}"}
    new = [act(n, year=2021, words=150) for n in range(600, 610)]
    return [*records[:3], corrected, *records[4:], *new]


@pytest.fixture
def first(documents: Writer, recipe_for: Recipes, home: Path) -> dict[str, Any]:
    """The champion's corpus; its held-out set is frozen."""
    recipe = recipe_for(documents(acts(60)))
    corpus = made(recipe, home)
    freeze(home, recipe.name, corpus["digest"])
    return corpus


def test_it_has_all_that_is_new_and_a_replay_of_the_rest(
    first: dict[str, Any], documents: Writer, recipe_for: Recipes, home: Path
) -> None:
    recipe = recipe_for(documents(later(acts(60))), recurring__replay=0.4)
    whole = made(recipe, home)
    second = made(recipe, home, start_with(first))
    facts, before = second["gone_on"], trained(home, first)
    assert trained(home, second) - before == trained(home, whole) - before
    assert facts["new_documents"] == len(trained(home, second) - before) >= 8
    assert facts["replayed_documents"] == len(trained(home, second) & before) >= 1
    # 0.4 of the tokens at most, and no further document would fit: all have below 1,000
    wanted = facts["new_tokens"] * 0.4 / 0.6
    assert wanted - 1000 < facts["replayed_tokens"] <= wanted
    assert second["tokens"] == facts["new_tokens"] + facts["replayed_tokens"]
    assert facts["all_tokens"] == whole["tokens"] > second["tokens"]
    left = {row["reason"]: row["documents"] for row in second["funnel"]}["trained_on_before"]
    assert left >= whole["documents"] - second["documents"]
    assert trained_and_held_out(home, recipe.name, [first["digest"], second["digest"]]) == 0


def test_its_name_is_of_the_champion_and_the_replay_and_it_is_found_again(
    first: dict[str, Any], documents: Writer, recipe_for: Recipes, home: Path
) -> None:
    recipe = recipe_for(documents(later(acts(60))))
    second = made(recipe, home, start_with(first))
    assert made(recipe, home, start_with(first))["reused"]
    other = made(recipe, home, start_with(first, training="cd34"))
    more = recipe.model_copy(
        update={"recurring": recipe.recurring.model_copy(update={"replay": 0.5})}
    )
    names = {second["digest"], other["digest"], made(recipe, home)["digest"]}
    names.add(made(more, home, start_with(first))["digest"])
    assert len(names) == 4
    # another champion has another replay
    assert trained(home, second) != trained(home, other)


def test_what_a_later_champion_was_trained_on_is_of_all_its_corpora(
    first: dict[str, Any], documents: Writer, recipe_for: Recipes, home: Path
) -> None:
    second = made(recipe_for(documents(later(acts(60)))), home, start_with(first))
    newer = [*later(acts(60)), *(act(n, year=2022, words=150) for n in range(700, 706))]
    third = made(recipe_for(documents(newer)), home, start_with(first, second))
    before = trained(home, first) | trained(home, second)
    new = trained(home, third) - before
    assert len(new) == third["gone_on"]["new_documents"]
    # of six new acts some may be held out; the newest of the week before are trained on now
    assert 1 <= len(new) <= 12


def test_the_newest_acts_that_the_champion_was_trained_on_judge_no_more(
    first: dict[str, Any], documents: Writer, recipe_for: Recipes, home: Path
) -> None:
    # two more old acts: the newest of all acts were there before
    records = [*acts(60), act(801, year=1990, words=150), act(802, year=1990, words=150)]
    recipe = recipe_for(documents(records), corpus__newest_share=0.2)
    corpus = made(recipe, home, start_with(first))
    newest = pq.read_table(home / "ledger" / corpus["digest"] / "held_out.parquet").to_pylist()
    judged = {row["content"] for row in newest if row["split"] == "validation_newest"}
    assert not judged & trained(home, first)


def test_nothing_new_is_said_before_anything_is_made(
    first: dict[str, Any], documents: Writer, recipe_for: Recipes, home: Path
) -> None:
    # one act is gone: other documents, and none of them new
    recipe = recipe_for(documents(acts(60)[1:]), corpus__newest_share=0.0)
    known = made(recipe, home)
    with pytest.raises(NothingNew, match="champion law-1 was trained on all"):
        made(recipe, home, start_with(first, known))


def test_a_corpus_that_the_ledger_does_not_know_is_refused(
    first: dict[str, Any], documents: Writer, recipe_for: Recipes, home: Path
) -> None:
    lost = {**first, "digest": "gone"}
    with pytest.raises(HeldOutError, match="what corpus gone trained on is not known"):
        made(recipe_for(documents(later(acts(60)))), home, start_with(lost))


def test_a_gate_on_newest_acts_that_are_all_known_is_refused(
    first: dict[str, Any], documents: Writer, recipe_for: Recipes, home: Path
) -> None:
    records = [*acts(60), *(act(n, year=1990, words=150) for n in range(801, 806))]
    recipe = recipe_for(documents(records), gate__validation_set="newest")
    known = made(recipe_for(documents(acts(60)), corpus__newest_share=0.0), home)
    with pytest.raises(BuildError, match=r"gate\.validation_set"):
        made(recipe, home, start_with(first, known))
