"""A wrong date changes no other document's score."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpus.made import Record, act, record, text_of
from fastcpt.corpus.dates import newest_plausible
from fastcpt.corpus.select import select
from fastcpt.recipe import Recipe

ACTS = [act(n, year=2000 + n % 20) for n in range(1, 41)]


def years(*counts: tuple[int, int]) -> np.ndarray[tuple[int], np.dtype[np.int16]]:
    return np.repeat(*np.array(counts, dtype=np.int16).T)


@pytest.mark.parametrize(
    ("counts", "newest"),
    [
        ([(2023, 40)], 2023),
        ([(1990, 5), (2000, 10), (2010, 10), (2019, 15), (2202, 1)], 2019),
        ([(1990, 5), (2000, 10), (2010, 10), (2019, 15), (2202, 30)], 2019),  # no year at all
        ([(1990, 5), (2000, 10), (2010, 10), (2019, 15), (2099, 1)], 2019),
        # two of a thousand are few, two of forty are not
        ([(2000, 500), (2010, 500), (2022, 20), (2060, 1), (2071, 2)], 2022),
        ([(2000, 20), (2010, 20), (2071, 2)], 2071),
        # a collection that goes on after a pause: 7 years are less than the usual 14
        ([(1990, 5), (2000, 10), (2014, 6), (2021, 1)], 2021),
        ([(2000, 2), (2020, 1)], 2020),  # too few to tell
        ([(0, 40)], 0),
    ],
)
def test_which_year_is_the_newest(counts: list[tuple[int, int]], newest: int) -> None:
    assert newest_plausible(years(*counts)) == newest


@given(st.lists(st.integers(1950, 2026), min_size=10, max_size=300), st.integers(2104, 32_767))
def test_a_date_beyond_all_others_changes_nothing(known: list[int], odd: int) -> None:
    before = newest_plausible(np.array(known, dtype=np.int16))
    assert newest_plausible(np.array([*known, odd], dtype=np.int16)) == before


@pytest.mark.parametrize("date", ["2202-01-01", "2099-01-01", "9999-12-31"])
def test_one_odd_date_moves_no_other_score(
    documents: Callable[..., Path],
    recipe_for: Callable[..., Recipe],
    scores: Callable[[Recipe], list[str]],
    home: Path,
    caplog: pytest.LogCaptureFixture,
    date: str,
) -> None:
    def rows(records: list[Record]) -> dict[str, tuple[float, float, int]]:
        recipe = recipe_for(documents(records))
        path = Path(select(scores(recipe), recipe, home)["path"])
        table = pq.read_table(path / "documents.parquet").to_pylist()
        return {row["id"]: (row["score"], row["recency"], row["year"]) for row in table}

    odd = [record("odd", text_of(1), date=date), act(99, year=2010, date=date)]
    before, after = rows(ACTS), rows([*ACTS, odd[0]])
    assert {name: after[name] for name in before} == before
    assert after["odd"][1:] == (0.5, 0)  # as if it had no date
    assert "1 documents are dated after 2019" in caplog.text
    assert "The first: 'odd'" in caplog.text
    # where there is a CELEX number, it says the year
    after = rows([*ACTS, odd[1]])
    assert {name: after[name] for name in before} == before
    assert after["32010R0099"][1:] == (pytest.approx(0.5 ** (9 / 15)), 2010)


def test_an_oddly_dated_act_is_not_the_newest(
    documents: Callable[..., Path],
    recipe_for: Callable[..., Recipe],
    scores: Callable[[Recipe], list[str]],
    home: Path,
) -> None:
    recipe = recipe_for(documents([*ACTS, record("odd", text_of(1), date="2202-01-01")]))
    selection = select(scores(recipe), recipe, home)
    assert selection["oddly_dated"] == 1
    table = pq.read_table(Path(selection["path"]) / "documents.parquet").to_pylist()
    newest = {row["year"] for row in table if row["split"] == "validation_newest"}
    assert newest == {2019, 2018, 2017}  # a tenth: five acts
