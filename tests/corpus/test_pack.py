"""The packer: nothing lost, nothing too long, hardly any padding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcpt.corpus.pack import Packed, pack

LENGTHS = st.lists(st.integers(1, 400), min_size=1, max_size=200)


def check_whole(packed: Packed, lengths: list[int], size: int) -> None:
    """Every token of every document is in exactly one piece, and rows hold at most ``size``."""
    for document, length in enumerate(lengths):
        own = packed.document == document
        pieces = sorted(zip(packed.begin[own].tolist(), packed.length[own].tolist(), strict=True))
        at = 0
        for begin, count in pieces:
            assert begin == at
            assert count > 0
            at += count
        assert at == length
    filled = np.bincount(packed.row, weights=packed.length, minlength=packed.rows)
    assert filled.max() <= size
    assert filled.min() > 0


@given(LENGTHS, st.integers(2, 128))
@settings(max_examples=200, deadline=None)
def test_no_token_is_lost(lengths: list[int], size: int) -> None:
    check_whole(pack(np.array(lengths), size), lengths, size)


@given(st.integers(0, 2**32), st.integers(64, 512))
@settings(max_examples=25, deadline=None)
def test_padding_stays_under_half_a_percent(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = np.maximum(1, rng.lognormal(5.5, 1.0, 1500)).astype(np.int64)
    packed = pack(lengths, size)
    assert 1 - lengths.sum() / (packed.rows * size) < 0.005


@pytest.mark.parametrize("rest", [300, 513, 700])
def test_rests_that_do_not_fit_together_are_cut(rest: int) -> None:
    # best-fit alone would leave 0.3 to 0.5 of each row empty
    lengths = [rest] * 600
    packed = pack(np.array(lengths), 1000)
    check_whole(packed, lengths, 1000)
    assert 1 - sum(lengths) / (packed.rows * 1000) < 0.005


def test_documents_longer_than_a_row_fill_whole_rows_first() -> None:
    packed = pack(np.array([10, 4]), 4)
    by_row = list(
        zip(
            packed.row.tolist(),
            packed.document.tolist(),
            packed.begin.tolist(),
            packed.length.tolist(),
            strict=True,
        )
    )
    assert by_row == [(0, 0, 0, 4), (1, 0, 4, 4), (2, 1, 0, 4), (3, 0, 8, 2)]


def test_best_fit_takes_the_row_with_the_least_room() -> None:
    # 7 and 6 open a row each; 4 goes beside 6 and 3 beside 7
    packed = pack(np.array([3, 7, 4, 6]), 10)
    rows = {frozenset(packed.document[packed.row == row].tolist()) for row in range(packed.rows)}
    assert rows == {frozenset({0, 1}), frozenset({2, 3})}
