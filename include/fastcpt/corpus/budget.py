"""Chooses the best documents that fit into a budget of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

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

TOKENS_PER_PIECE = 1.15  # if there is no tokenizer yet
SAMPLED = 512  # excerpts tokenized for the estimate
# Share tokenized beyond the estimated budget, so that the exact count can still fill it
RESERVE, RESERVE_UNTRAINED = 0.05, 0.35


def tokens_per_piece(tables: Sequence[ScoresFolder], tokenizer: CorpusTokenizer | None) -> float:
    """Tokens per piece (``fingerprint``), counted on the excerpts in the score tables."""
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


class Filled(NamedTuple):
    """The documents within share and budget."""

    taken: Ints  # rows, the best first
    reserve: Ints  # rows beyond the budget, the best first
    cut: int | None  # at most so many tokens of a document are trained on; None: all
    by_target: bool  # whether target_tokens sets the cut: the build then recomputes it exactly


def fill(corpus: ScoreColumns, recipe: Recipe, ratio: float, exact: bool) -> Filled:
    """Fill share and budget with the best documents, or (``auto``) with the starts of all."""
    selection = recipe.selection
    rows = corpus.alive()
    rows = rows[np.argsort(corpus.rank[rows])]
    if selection.max_document_tokens == "auto":
        return _beginnings(corpus, rows, recipe, ratio)
    cut = selection.max_document_tokens
    if selection.top_share is not None:
        # in pieces, which are exact, not in estimated tokens
        pieces = corpus.pieces[rows]
        if cut is not None:
            pieces = np.minimum(pieces, math.ceil(cut / ratio))
        taken = take_within(pieces, _share_of_pieces(corpus, selection.top_share))
        corpus.drop(rows[~taken], "outside_top_share")
        rows = rows[taken]
    if selection.target_tokens is None:
        return Filled(rows, rows[:0], cut, False)
    tokens = corpus.tokens(ratio)
    if cut is not None:
        tokens = np.minimum(tokens, cut)
    taken = take_within(tokens[rows], selection.target_tokens)
    beyond = math.ceil(selection.target_tokens * (RESERVE if exact else RESERVE_UNTRAINED))
    left = rows[~taken]
    reserved = take_within(tokens[left], beyond)
    corpus.drop(left[~reserved], "over_budget")
    return Filled(rows[taken], left[reserved], cut, False)


def _beginnings(corpus: ScoreColumns, rows: Ints, recipe: Recipe, ratio: float) -> Filled:
    """All rows, and the cut at which they fill the share and the budget; no cut if all of them fit."""
    selection, tokens = recipe.selection, corpus.tokens(ratio)[rows]
    longest = cut = int(tokens.max(initial=0))
    if selection.top_share is not None:
        pieces = cut_for(corpus.pieces[rows], _share_of_pieces(corpus, selection.top_share))
        cut = min(cut, math.ceil(pieces * ratio) + 2)
    by_target = False
    if selection.target_tokens is not None:
        of_target = cut_for(tokens, selection.target_tokens)
        cut, by_target = min(cut, of_target), of_target <= cut
    return Filled(rows, rows[:0], cut if cut < longest else None, by_target)


def _share_of_pieces(corpus: ScoreColumns, share: float) -> int:
    """Pieces in a share of the corpus, duplicates not counted."""
    first_unwanted = REASONS.index("too_short")
    single = (corpus.reason == 0) | (corpus.reason >= first_unwanted)
    return math.floor(int(corpus.pieces[single].sum()) * share)


def cut_for(sizes: npt.NDArray[Any], budget: int) -> int:
    """The greatest size at which all items can be cut so that their sum is at most ``budget``."""
    low, high = 0, int(sizes.max(initial=0))
    while low < high:
        middle = (low + high + 1) // 2
        fits = int(np.minimum(sizes, middle).sum(dtype=np.int64)) <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def take_within(sizes: npt.NDArray[Any], budget: int) -> Bools:
    """A mask of the items taken greedily, in order: each one that still fits.

    Their sum is at most ``budget``, and no other item would fit into the rest of it.
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
