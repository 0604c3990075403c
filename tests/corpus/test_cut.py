"""Documents cut short (``selection.max_document_tokens``): what remains, and what fills a budget."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from corpus.made import act, acts, made, rows_of
from fastcpt.corpus.budget import cut_for
from fastcpt.corpus.documents import list_parts
from fastcpt.corpus.explain import explain
from fastcpt.corpus.score import score_parts
from fastcpt.corpus.select import select
from fastcpt.corpus.selected import BuildError
from fastcpt.corpus.token_ids import TokenIds
from fastcpt.corpus.tokenizer import describe
from fastcpt.recipe import Recipe

Recipes = Callable[..., Recipe]
Writer = Callable[..., Path]


def segments_of(corpus: dict[str, Any]) -> list[list[int]]:
    found = []
    for row in rows_of(corpus):
        ends = np.cumsum(row["lengths"])
        found += [part.tolist() for part in np.split(np.array(row["input_ids"]), ends[:-1])]
    return found


def kept_of(corpus: dict[str, Any], reason: str) -> int:
    return sum(row["tokens"] for row in corpus["funnel"] if row["reason"] == reason)


def test_the_first_tokens_of_each_document_are_trained_on(
    documents: Writer, recipe_for: Recipes, home: Path, tokenizer_folder: Path
) -> None:
    folder = documents(acts())
    whole = made(recipe_for(folder), home)
    corpus = made(recipe_for(folder, selection__max_document_tokens=50), home)
    facts = describe(tokenizer_folder / "tokenizer.json")
    tokenizer = facts.load()
    held_out = {row["id"] for row in rows_of(corpus, "validation*/*.parquet")}
    begins = [
        [facts.bos_id, *tokenizer.encode(item["full_text"], add_special_tokens=False).ids][:50]
        for item in acts()
        if item["id"] not in held_out
    ]
    assert sorted(segments_of(corpus)) == sorted(begins)
    assert corpus["documents"] == whole["documents"] == len(begins)
    assert corpus["max_document_tokens"] == 50
    # what is held out is read whole, and the funnel's sums are as without the cut
    assert rows_of(corpus, "validation*/*.parquet") == rows_of(whole, "validation*/*.parquet")
    assert kept_of(corpus, "train") == corpus["tokens"] == 50 * len(begins)
    assert corpus["tokens"] + kept_of(corpus, "cut_short") == whole["tokens"]


def test_auto_fills_the_budget_with_all_documents(
    documents: Writer, recipe_for: Recipes, home: Path
) -> None:
    folder = documents(acts())
    whole = made(recipe_for(folder), home)
    held_out = kept_of(whole, "validation") + kept_of(whole, "validation_newest")
    budget = held_out + whole["tokens"] // 3
    corpus = made(
        recipe_for(folder, selection__max_document_tokens="auto", selection__target_tokens=budget),
        home,
    )
    assert corpus["documents"] == whole["documents"]
    # one token more of each document would not fit
    assert budget - corpus["documents"] < held_out + corpus["tokens"] <= budget
    assert max(map(len, segments_of(corpus))) <= corpus["max_document_tokens"]


def test_auto_fills_a_share_and_says_so(documents: Writer, recipe_for: Recipes, home: Path) -> None:
    short, long = act(1, words=30), [act(n, words=1000) for n in (2, 3, 4)]
    folder = documents([short, *long, *(act(n, words=100) for n in range(5, 25))])
    recipe = recipe_for(folder, selection__max_document_tokens="auto", selection__top_share=0.5)
    scores = score_parts(list_parts(recipe.documents), recipe, home, 1)
    selection = select([score["path"] for score in scores], recipe, home)
    assert selection["kept"] == 24
    assert not [row for row in selection["funnel"] if row["reason"] == "outside_top_share"]
    told = [explain(item["id"], selection["path"], recipe) for item in long]
    trained = [one for one in told if "taken for train" in one]
    assert trained
    cut = selection["max_document_tokens"]
    assert all(f"its first {cut:,} tokens, as of every longer" in one for one in trained)
    assert "its first" not in explain(short["id"], selection["path"], recipe)


@pytest.mark.parametrize("target", [None, 10_000_000])
def test_auto_cuts_nothing_where_all_fits(
    documents: Writer, recipe_for: Recipes, home: Path, target: int | None
) -> None:
    folder = documents(acts())
    corpus = made(
        recipe_for(folder, selection__max_document_tokens="auto", selection__target_tokens=target),
        home,
    )
    assert corpus["max_document_tokens"] is None
    assert corpus["tokens"] == made(recipe_for(folder), home)["tokens"]


def test_a_budget_that_the_held_out_documents_fill_is_refused(
    documents: Writer, recipe_for: Recipes, home: Path
) -> None:
    recipe = recipe_for(
        documents(acts()), selection__max_document_tokens="auto", selection__target_tokens=1_000
    )
    with pytest.raises(BuildError, match="no room for training documents beside the held-out"):
        made(recipe, home)


def test_the_cut_is_the_greatest_that_fits() -> None:
    assert cut_for(np.array([2, 5, 10]), 12) == 5
    assert cut_for(np.array([2, 5, 10]), 11) == 4
    assert cut_for(np.array([2, 5, 10]), 100) == 10
    assert cut_for(np.array([2, 5, 10]), 2) == 0


def test_a_document_in_stretches_is_cut_over_all_of_them() -> None:
    rows = np.array([3, 3, 3, 7])
    ids = TokenIds(["a"], np.zeros(4, int), np.array([0, 10, 20, 30]), np.array([4, 5, 6, 8]))
    kept, left = ids.first_of_each(rows, 7)
    assert kept.tolist() == [3, 3, 7]
    assert left.offset.tolist() == [0, 10, 30]
    assert left.length.tolist() == [4, 3, 7]
