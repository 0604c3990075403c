"""Which documents belong to one work, so that the splits keep them together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpus.made import Record, act, record, text_of
from fastcpt.corpus import works as works_module
from fastcpt.corpus.build import build
from fastcpt.corpus.fingerprint import SHINGLE, ngram_hashes, word_hashes
from fastcpt.corpus.select import select
from fastcpt.corpus.works import contained
from fastcpt.recipe import Recipe

Recipes = Callable[..., Recipe]
Scores = Callable[[Recipe], list[str]]


@pytest.fixture
def parted(
    documents: Callable[..., Path], recipe_for: Recipes, scores: Scores, home: Path
) -> Callable[..., int]:
    """Of 16 draws, how often one of two documents is trained on and the other held out."""

    def count(records: list[Record], one: str, other: str) -> int:
        found = 0
        for seed in range(20, 36):
            recipe = recipe_for(
                documents(records), corpus__seed=seed, corpus__newest_share=0.0,
                corpus__validation_share=0.3,
            )  # fmt: skip
            path = Path(select(scores(recipe), recipe, home)["path"])
            rows = pq.read_table(path / "documents.parquet", columns=["id", "split"]).to_pylist()
            split = {row["id"]: row["split"] for row in rows}
            found += {split[one], split[other]} == {"train", "validation"}
        return found

    return count


def unnamed(name: str, text: str, **metadata: Any) -> Record:
    return record(name, text, **metadata)


OTHERS = [unnamed(f"other-{n}", text_of(100 + n, 200)) for n in range(20)]


def test_an_extract_is_of_the_act_s_work(parted: Callable[..., int]) -> None:
    whole = text_of(1, 6000)
    extract = " ".join([*whole.split()[1000:3500], *text_of(2, 800).split()])
    records = [unnamed("whole", whole), unnamed("extract", extract), *OTHERS]
    assert parted(records, "whole", "extract") == 0
    # half of it is not enough
    extract = " ".join([*whole.split()[1000:2500], *text_of(2, 2500).split()])
    records = [unnamed("whole", whole), unnamed("extract", extract), *OTHERS]
    assert parted(records, "whole", "extract") > 0


def test_celex_numbers_decide_where_there_are_any(parted: Callable[..., int]) -> None:
    """An amending act that quotes the act is another work; the build looks after the passages."""
    act_of, amending = act(1, words=6000), act(2)
    amending["full_text"] = " ".join(act_of["full_text"].split()[1000:3500])
    assert parted([act_of, amending, *OTHERS], act_of["id"], amending["id"]) > 0


def test_formulas_make_no_work(parted: Callable[..., int]) -> None:
    formula = text_of(1, 4000)
    records = [unnamed(f"d{n}", f"{formula} {text_of(10 + n, 3000)}") for n in range(25)]
    assert parted(records, "d0", "d1") > 0


@pytest.mark.parametrize("key", ["metadata.work", "eli"])
def test_a_field_names_the_work(
    documents: Callable[..., Path], recipe_for: Recipes, scores: Scores, home: Path, key: str
) -> None:
    records = []
    for n in range(40):
        item = unnamed(f"d{n}", text_of(n, 150))
        (item["metadata"] if "." in key else item)[key.split(".")[-1]] = f"work {n // 4}"
        records.append(item)
    records[0]["metadata"]["celex"] = "32016R0679"  # this says more
    for seed in range(6):
        recipe = recipe_for(documents(records), documents__fields={"work": key}, corpus__seed=seed)
        selection = select(scores(recipe), recipe, home)
        table = pq.read_table(Path(selection["path"]) / "documents.parquet").to_pylist()
        work_of = {row["id"]: row["work"] for row in table}
        assert work_of["d0"] == "32016R0679"
        assert [work_of[f"d{n}"] for n in range(1, 40)] == [f"work {n // 4}" for n in range(1, 40)]
        sides: dict[str, set[bool]] = {}
        for row in table:
            assert row["reason"] is None  # no version of another
            sides.setdefault(row["work"], set()).add(row["split"] == "train")
        assert all(len(side) == 1 for side in sides.values())
        build(selection["path"], recipe, home, 1)


def test_articles_of_a_treaty_are_of_one_work_and_no_versions(
    documents: Callable[..., Path], recipe_for: Recipes, scores: Scores, home: Path
) -> None:
    names = ["12016E101", "12016E267", "12016E/PRO/01", "12016E/TXT"]
    records = [record(name, text_of(n), celex=name) for n, name in enumerate(names)]
    recipe = recipe_for(documents([*records, *OTHERS]))
    table = pq.read_table(Path(select(scores(recipe), recipe, home)["path"]) / "documents.parquet")
    rows = {row["id"]: row for row in table.to_pylist()}
    assert {rows[name]["work"] for name in names} == {"12016E"}
    assert {rows[name]["reason"] for name in names} == {None}
    assert len({rows[name]["split"] == "train" for name in names}) == 1


@given(
    st.lists(st.sets(st.integers(0, 40), max_size=30), min_size=2, max_size=26),
    st.data(),
)
def test_pairs_are_those_that_counting_finds(sets: list[set[int]], data: st.DataObject) -> None:
    named = np.array(data.draw(st.lists(st.booleans(), min_size=len(sets), max_size=len(sets))))
    rows = np.arange(len(sets)) * 3 + 1

    def sketches() -> Iterator[tuple[Any, npt.NDArray[np.uint64]]]:
        for place, numbers in enumerate(sets):
            yield np.full(len(numbers), place), np.array(sorted(numbers), dtype=np.uint64)

    often = {n for n in range(41) if sum(n in some for some in sets) > 20}
    own = [some - often for some in sets]
    expected = set()
    for left in range(len(sets)):
        for right in range(left + 1, len(sets)):
            lesser = min(len(own[left]), len(own[right]))
            shared = len(own[left] & own[right])
            if not (named[left] and named[right]) and lesser >= 8 and 2 * shared >= lesser:
                expected.add((int(rows[left]), int(rows[right])))
    at_once = works_module.AT_ONCE
    works_module.AT_ONCE = data.draw(st.sampled_from([at_once, 16]))
    try:
        found = contained(rows, named, sketches)
    finally:
        works_module.AT_ONCE = at_once
    assert {(left, right) for left, right in found.tolist()} == expected


def test_a_sketch_is_one_sequence_in_128() -> None:
    from fastcpt.corpus.fingerprint import fingerprint

    text = text_of(7, 20_000)
    sketch = fingerprint(text).sketch
    every = np.unique(ngram_hashes(word_hashes(text), SHINGLE))
    assert len(sketch) == pytest.approx(len(every) / 128, rel=0.3)
    assert set(sketch.tolist()) <= set(every.tolist())
    # a part's sketch is the part of the sketch
    half = fingerprint(" ".join(text.split()[:10_000])).sketch
    assert set(half.tolist()) <= set(sketch.tolist())
