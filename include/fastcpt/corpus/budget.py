"""Which documents fit into a budget of tokens, the best first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from fastcpt.corpus.fingerprint import pieces_of
from fastcpt.corpus.score_columns import REASONS, ScoreColumns, batches_of
from fastcpt.corpus.tokenizer import CorpusTokenizer
from fastcpt.manifests import ScoresFolder
from fastcpt.recipe import Recipe

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

TOKENS_PER_PIECE = 1.15  # where there is no tokenizer yet
SAMPLED = 512  # excerpts whose tokens are counted for the estimate
# Documents beyond the estimated budget that are tokenized too, so that the counted budget is full
RESERVE, RESERVE_UNTRAINED = 0.05, 0.35


def tokens_per_piece(tables: Sequence[ScoresFolder], tokenizer: CorpusTokenizer | None) -> float:
    """Tokens a piece (``fingerprint``), counted on the excerpts in the score tables."""
    if tokenizer is None:
        return TOKENS_PER_PIECE
    excerpts: list[tuple[int, str]] = []
    for table in tables:
        for batch in batches_of(table, ["id_hash", "excerpt"]):
            batch = batch.filter(pc.is_valid(batch.column("excerpt")))
            excerpts += zip(
                batch.column("id_hash").to_pylist(),
                batch.column("excerpt").to_pylist(),
                strict=True,
            )
            excerpts = sorted(excerpts)[:SAMPLED]
    pieces = sum(pieces_of(text) for _, text in excerpts)
    if not pieces:
        return TOKENS_PER_PIECE
    encoded = tokenizer.load().encode_batch_fast(
        [text for _, text in excerpts], add_special_tokens=False
    )
    return sum(len(item) for item in encoded) / pieces


def fill(corpus: ScoreColumns, recipe: Recipe, ratio: float, exact: bool) -> tuple[Ints, Ints]:
    """Rows taken by share and budget, the best first, and the reserve beyond the budget."""
    selection = recipe.selection
    rows = corpus.alive()
    rows = rows[np.argsort(corpus.rank[rows])]
    if selection.top_share is not None:
        # the share of the corpus without its duplicates; in pieces, so that no estimate enters
        first_unwanted = REASONS.index("too_short")
        single = (corpus.reason == 0) | (corpus.reason >= first_unwanted)
        whole = int(corpus.pieces[single].sum())
        taken = take_within(corpus.pieces[rows], math.floor(whole * selection.top_share))
        corpus.drop(rows[~taken], "outside_top_share")
        rows = rows[taken]
    if selection.target_tokens is None:
        return rows, rows[:0]
    tokens = corpus.tokens(ratio)[rows]
    taken = take_within(tokens, selection.target_tokens)
    beyond = math.ceil(selection.target_tokens * (RESERVE if exact else RESERVE_UNTRAINED))
    left = rows[~taken]
    reserved = take_within(corpus.tokens(ratio)[left], beyond)
    corpus.drop(left[~reserved], "over_budget")
    return rows[taken], left[reserved]


def take_within(sizes: npt.NDArray[Any], budget: int) -> Bools:
    """Which items are taken, from the first on, when each is taken that still fits.

    The sum of what is taken is at most ``budget``, and no item that was left out would fit into
    what remains of it.
    """
    taken = np.zeros(len(sizes), dtype=bool)
    left = np.arange(len(sizes))
    while len(left):
        left = left[sizes[left] <= budget]
        sums = np.cumsum(sizes[left], dtype=np.int64)
        fit = int(np.searchsorted(sums, budget, side="right"))
        if fit == 0:
            break
        taken[left[:fit]] = True
        budget -= int(sums[fit - 1])
        left = left[fit:]
    return taken
