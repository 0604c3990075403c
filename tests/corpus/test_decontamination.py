"""No held-out document is trained on: none of its work, no passage of its text."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from corpus.made import acts, made, record, rows_of, text_of
from fastcpt.corpus import build as build_module
from fastcpt.corpus.build import build
from fastcpt.corpus.decontamination import LeakError
from fastcpt.corpus.documents import list_parts
from fastcpt.corpus.score import score_parts
from fastcpt.corpus.select import select
from fastcpt.corpus.selected import BuildError
from fastcpt.corpus.tokenizer import describe
from fastcpt.recipe import Recipe

Recipes = Callable[..., Recipe]
Writer = Callable[..., Path]


def test_extracts_of_held_out_acts_are_not_trained_on(
    documents: Writer, recipe_for: Recipes, home: Path
) -> None:
    # the newest act, and older ones that hold all of it, a third of it and a tenth of it
    newest = record("newest", text_of(1, 300), date="2025-01-01")
    words = text_of(1, 300).split()
    own = {count: text_of(10 + count, 1500).split() for count in (300, 120, 30)}
    others = [
        record(name, " ".join([*own[count][:700], *words[:count], *own[count][700:]]))
        for name, count in (("all", 300), ("third", 120), ("tenth", 30))
    ]
    # and one that is made of it
    extract = record("extract", " ".join([*words[100:200], *text_of(5, 100).split()]))
    corpus = made(
        recipe_for(
            documents([newest, *others, extract, *acts(20)]),
            corpus__newest_share=0.01,
            corpus__validation_share=0.01,
            corpus__seed=4,
        ),
        home,
    )
    assert [row["id"] for row in rows_of(corpus, "validation_newest/*")] == ["newest"]
    drawn = {row["id"] for row in rows_of(corpus, "validation/*")}
    assert drawn.isdisjoint({"all", "third", "tenth", "extract"})
    dropped = {row["reason"]: row for row in corpus["funnel"] if row["stage"] == "build"}
    assert dropped["overlaps_held_out"]["documents"] == 1
    # the blanks around a passage go with it
    cut_off = sum(len(" ".join(words[:count])) + 2 for count in (300, 120))
    assert dropped["quoted_by_held_out"]["characters"] == cut_off
    tokenizer = describe(Path(corpus["path"]) / "tokenizer/tokenizer.json").load()
    pieces = [
        tokenizer.decode(row["input_ids"][end - length : end])
        for row in rows_of(corpus)
        for length, end in zip(row["lengths"], np.cumsum(row["lengths"]), strict=True)
    ]
    trained = "\n".join(pieces)
    assert " ".join(words[40:43]) not in trained
    assert " ".join(words[150:153]) not in trained
    assert " ".join(words[20:23]) in trained  # of what a tenth is
    # token for token: what is before a passage and what is after it, apart
    stretches = [" ".join(some) for n in (300, 120) for some in (own[n][:700], own[n][700:])]
    kept = [item["full_text"] for item in acts(20) if item["id"] not in drawn]
    texts = [*stretches, others[2]["full_text"], *kept]
    expected = sum(len(ids.ids) for ids in tokenizer.encode_batch(texts, add_special_tokens=False))
    assert corpus["documents"] == len(others) + len(kept)
    assert corpus["tokens"] == expected + 2 * corpus["documents"]


def formula(words: int = 60) -> str:
    return text_of(4242, words)


def test_formulas_that_many_documents_share_count_in_no_overlap(
    documents: Writer, recipe_for: Recipes, home: Path
) -> None:
    """Half of each short text is one formula: nothing is lost, held out or trained on."""
    records = acts(60, words=60)
    for item in records:
        item["full_text"] = f"{formula()} {item['full_text']} {formula(20)}"
    corpus = made(recipe_for(documents(records)), home)
    assert {row["reason"] for row in corpus["funnel"] if row["stage"] == "build"} == set()
    assert corpus["documents"] + len(rows_of(corpus, "validation*/*")) == 60


def test_what_overlaps_beside_a_formula_is_still_found(
    documents: Writer, recipe_for: Recipes, home: Path
) -> None:
    records = acts(60, words=60)
    newest = record("newest", text_of(1, 60), date="2025-01-01")
    copy = record("copy", text_of(1, 50) + " " + text_of(2, 40))
    for item in [*records, newest, copy]:
        item["full_text"] = f"{formula()} {item['full_text']}"
    recipe = recipe_for(documents([*records, newest, copy]), corpus__newest_share=0.01)
    (dropped,) = [row for row in made(recipe, home)["funnel"] if row["stage"] == "build"]
    assert (dropped["reason"], dropped["documents"]) == ("overlaps_held_out", 1)


def test_a_held_out_set_made_of_formulas_fails_the_build(
    documents: Writer, recipe_for: Recipes, home: Path
) -> None:
    """Nine tenths of the newest act's text stand in very many others."""
    records = acts(60, words=400)
    for item in records[:30]:
        item["full_text"] = f"{formula()} {item['full_text']}"
    newest = record("newest", f"{formula(60)} {text_of(1, 5)}", date="2025-01-01")
    recipe = recipe_for(documents([*records, newest]), corpus__newest_share=0.01)
    expected = (
        "validation_newest would lose 1 of 1 documents, 100% of its tokens: more than 70% of each "
        "stands in more than 20 other documents, and measures nothing (the first: 'newest'). Take "
        "the text that repeats out of the documents, or raise selection.min_characters"
    )
    with pytest.raises(BuildError, match=re.escape(expected)):
        made(recipe, home)


@pytest.mark.parametrize("budget", [None, 20_000])
def test_no_training_document_left(
    documents: Writer, recipe_for: Recipes, home: Path, budget: int | None
) -> None:
    """Each act begins as the newest one does."""
    shared = text_of(1, 100)
    records = acts(10, words=60)
    for item in records:
        item["full_text"] = f"{shared} {item['full_text']}"
    recipe = recipe_for(
        documents(records),
        corpus__newest_share=0.1,
        corpus__validation_share=0.1,
        selection__near_duplicate_threshold=1.0,
        selection__target_tokens=budget,
    )
    message = (
        r"no training document is left: all 7 overlap with held-out documents by more than 30%"
    )
    with pytest.raises(BuildError, match=message):
        made(recipe, home)


def test_a_leak_fails_the_build(
    documents: Writer, recipe_for: Recipes, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = record("newest", text_of(1, 300), date="2025-01-01")
    leaking = record("leaking", text_of(1, 200) + " " + text_of(2, 1500))
    recipe = recipe_for(documents([newest, leaking, *acts(20)]), corpus__newest_share=0.01)
    monkeypatch.setattr(build_module, "drop_overlapping", lambda *_: None)
    with pytest.raises(LeakError, match=r"'leaking' and held-out 'newest' share more than 30%"):
        made(recipe, home)


def test_a_work_on_both_sides_fails_the_build(
    documents: Writer, recipe_for: Recipes, home: Path
) -> None:
    recipe = recipe_for(documents(acts()))
    scores = score_parts(list_parts(recipe.documents), recipe, home, 1)
    selection = Path(select([score["path"] for score in scores], recipe, home)["path"])
    table = pq.read_table(selection / "documents.parquet")
    works = ["32020R9999"] * table.num_rows
    table = table.set_column(table.schema.get_field_index("work"), "work", [works])
    pq.write_table(table, selection / "documents.parquet")
    with pytest.raises(LeakError, match="are of one work, 32020R9999"):
        build(str(selection), recipe, home, 1)
