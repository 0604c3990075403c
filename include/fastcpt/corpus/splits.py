"""Which documents are held out: whole works, the newest acts and others at random."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from fastcpt.corpus.duplicates import groups_of
from fastcpt.corpus.score_columns import SPLITS, ScoreColumns
from fastcpt.recipe import Recipe

Ints = npt.NDArray[np.int64]


def split_by_work(
    corpus: ScoreColumns,
    taken: Ints,
    reserve: Ints,
    pairs: npt.NDArray[np.int64],
    tokens: Ints,
    recipe: Recipe,
) -> None:
    """Hold out whole works: the newest acts first, then works at random.

    A work is an act with its versions, corrigenda and translations; works of which any documents
    are near-duplicates (dropped ones too), or one is contained in the other, count as one.
    """
    settings = recipe.corpus
    works = _joined_works(corpus, pairs)
    most = settings.validation_tokens
    newest_first = _groups_in_order(works[taken], settings.seed, -_act_day(corpus)[taken])
    count = math.ceil(settings.newest_share * len(taken))
    newest = _first_groups(newest_first, works[taken], count, tokens[taken], most)
    is_newest = np.isin(works[taken], newest)
    corpus.split[taken[is_newest]] = SPLITS.index("validation_newest")
    others = taken[~is_newest]
    at_random = _groups_in_order(works[others], settings.seed)
    count = max(1, math.ceil(settings.validation_share * len(taken)))
    drawn = _first_groups(at_random, works[others], count, tokens[others], most)
    is_drawn = np.isin(works[others], drawn)
    corpus.split[others[is_drawn]] = SPLITS.index("validation")
    corpus.split[others[~is_drawn]] = SPLITS.index("train")
    lost = np.isin(works[reserve], np.union1d(newest, drawn))
    corpus.drop(reserve[lost], "of_a_held_out_work")
    corpus.split[reserve[~lost]] = SPLITS.index("reserve")


def _joined_works(corpus: ScoreColumns, pairs: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Each row's work; works joined by near-duplicates share the least of their hashes."""
    works = corpus.work.copy()
    if not len(pairs):
        return works
    names, index = np.unique(works[pairs], return_inverse=True)
    joined = groups_of(index.reshape(pairs.shape))
    together = np.array([joined[n] for n in range(len(names))])
    place = np.minimum(np.searchsorted(names, works), len(names) - 1)
    known = names[place] == works
    works[known] = names[together[place[known]]]
    return works


def _act_day(corpus: ScoreColumns) -> Ints:
    """When the act itself was made, yyyymmdd: a later version of it does not make it new."""
    day = corpus.date.astype(np.int64)
    of_act = corpus.act_year.astype(np.int64) * 10_000
    return np.where((day // 10_000 == corpus.act_year) & (day > 0), day, of_act)


def _groups_in_order(
    works: npt.NDArray[np.uint64], seed: int, first: Ints | None = None
) -> npt.NDArray[np.uint64]:
    """Works by the least ``first`` of their documents, then in an order drawn from the seed."""
    names, index = np.unique(works, return_inverse=True)
    turned = (names ^ np.uint64(seed * 0x9E3779B97F4A7C15 % (1 << 64))) * np.uint64(
        0xBF58476D1CE4E5B9
    )
    turned ^= turned >> np.uint64(31)
    turned *= np.uint64(0x94D049BB133111EB)
    if first is None:
        return names[np.argsort(turned, kind="stable")]
    least = np.full(len(names), np.iinfo(np.int64).max)
    np.minimum.at(least, index, first)
    return names[np.lexsort((turned, least))]


def _first_groups(
    order: npt.NDArray[np.uint64],
    works: npt.NDArray[np.uint64],
    documents: int,
    tokens: Ints,
    most: int,
) -> npt.NDArray[np.uint64]:
    """The first works of ``order`` that hold at least ``documents`` of the rows.

    They end before ``most`` of the rows' ``tokens`` (estimated) are passed; one work is taken in
    any case.
    """
    if documents <= 0 or not len(order):
        return order[:0]
    names, index, counts = np.unique(works, return_inverse=True, return_counts=True)
    places = np.searchsorted(names, order)
    enough = int(np.searchsorted(np.cumsum(counts[places]), documents)) + 1
    sums = np.cumsum(np.bincount(index, weights=tokens)[places])
    return order[: min(enough, max(1, int(np.searchsorted(sums, most, side="right"))))]
