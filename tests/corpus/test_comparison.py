"""Held-out documents stay held out as a corpus grows: the frozen set, the ledger, the tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from corpus.made import Record, act, acts, made, record, rows_of, text_of
from fastcpt.corpus.selected import BuildError
from fastcpt.corpus.tokenizer import train_tokenizer
from fastcpt.files import sha256_of_file
from fastcpt.held_out import comparison, freeze, trained_and_held_out, unfreeze
from fastcpt.recipe import Recipe

Writer = Callable[..., Path]
Recipes = Callable[..., Recipe]


def validation(corpus: dict[str, Any]) -> str:
    return sha256_of_file(Path(corpus["path"]) / "validation" / "validation_shard_00.parquet")


def trained_ids(home: Path, corpus: dict[str, Any]) -> set[int]:
    table = pq.read_table(home / "ledger" / corpus["digest"] / "texts.parquet").to_pylist()
    return {row["content"] for row in table if row["split"] == "train"}


def changed(one: Record, words: str) -> Record:
    return {**one, "full_text": f"{one['full_text']} {words}"}


def test_the_frozen_set_stays_and_nothing_of_it_is_trained_on(
    documents: Writer, recipe_for: Recipes, home: Path
) -> None:
    records = [act(n, year=2000 + n % 20, words=150 + n) for n in range(1, 61)]
    recipe = recipe_for(documents(records))
    first = made(recipe, home)
    manifest = freeze(home, recipe.name, first["digest"])
    assert manifest["version"] == 1
    # the very same documents: nothing is made again
    assert made(recipe, home)["reused"]
    held_out = {row["id"] for row in rows_of(first, "validation/*.parquet")}
    assert manifest["documents"] == len(held_out) >= 1
    # the next week: one of its acts is corrected, one comes again under another name, the other
    # ones are gone, a new act quotes one as a whole, and there are new acts
    judged = [one for one in records if one["id"] in held_out]
    corrected = changed(judged[0], text_of(5001, 80))
    copied = record("a-copy", judged[-1]["full_text"])
    quoting = record("quoting", f"{judged[-1]['full_text']} {text_of(5002, 600)}")
    others = [one for one in records if one["id"] not in held_out]
    later = [*others, corrected, copied, quoting, *(act(n, 2022) for n in range(500, 540))]
    recipe = recipe_for(documents(later), corpus__validation_tokens=100_000)
    second = made(recipe, home)
    assert validation(second) == validation(first)
    assert trained_and_held_out(home, recipe.name, [first["digest"], second["digest"]]) == 0
    read = {(row["stage"], row["reason"]): row["documents"] for row in second["funnel"]}
    assert read["splits", "of_a_held_out_work"] >= 2  # corrected, copied
    assert read["splits", "held_out_unread"] >= 1  # of 40 new works some are held out by their hash
    assert ("build", "quoted_by_held_out") in read
    # the newest of the first week are trained on by now
    newest = {row["id"] for row in rows_of(first, "validation_newest/*.parquet")}
    assert newest
    ledger = pq.read_table(home / "ledger" / first["digest"] / "held_out.parquet").to_pylist()
    were_newest = {row["content"] for row in ledger if row["split"] == "validation_newest"}
    assert were_newest <= trained_ids(home, second)
    assert second["held_out_before"] == len(were_newest) > first["held_out_before"] == 0


def test_a_trained_act_that_would_be_held_out_is_counted(
    documents: Writer, recipe_for: Recipes, home: Path
) -> None:
    recipe = recipe_for(documents(acts()))
    first = made(recipe, home)
    other = recipe_for(documents(acts()), corpus__seed=1)
    second = made(other, home)
    freeze(home, recipe.name, first["digest"])
    # another draw from before the set was frozen has trained on some of it
    held_out = rows_of(first, "validation/*.parquet")
    also = {row["id"] for row in rows_of(second, "validation*/*.parquet")}
    both = sum(row["id"] not in also for row in held_out)
    assert both
    assert trained_and_held_out(home, recipe.name, [second["digest"]]) == both


def test_a_model_s_tokenizer_stays(
    documents: Writer, recipe_for: Recipes, home: Path, tmp_path: Path
) -> None:
    folder = documents(acts())
    own = {"tokenizer__path": None, "tokenizer__train_vocab_size": 400}
    first = made(recipe_for(folder, **own), home)
    name = recipe_for(folder).name
    freeze(home, name, first["digest"])
    documents([*acts(), act(900, words=3000)])
    second = made(recipe_for(folder, **own), home)
    assert second["tokenizer"] == first["tokenizer"]
    train_tokenizer([text_of(1, 2000)], 320, tmp_path / "other")
    other = recipe_for(folder, tokenizer__path=str(tmp_path / "other"))
    with pytest.raises(BuildError, match=r"another tokenizer.*retire the champion"):
        made(other, home)
    unfreeze(home, name)
    assert made(other, home)["tokenizer"] != first["tokenizer"]
    assert not (comparison(home, name) / "manifest.json").exists()
    assert freeze(home, name, made(other, home)["digest"])["version"] == 2


def test_a_tokenizer_of_its_own_is_the_same_one_after_the_set_was_frozen(
    documents: Writer, recipe_for: Recipes, home: Path
) -> None:
    own = {"tokenizer__path": None, "tokenizer__train_vocab_size": 1000}
    recipe = recipe_for(documents([act(n) for n in range(1, 41)]), **own)
    first = made(recipe, home)
    freeze(home, recipe.name, first["digest"])
    again = made(recipe, home)
    assert again["reused"]
    assert again["digest"] == first["digest"]
