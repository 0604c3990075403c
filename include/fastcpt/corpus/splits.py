"""Holds out documents: whole works by their hash, and the newest acts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from fastcpt.corpus.duplicates import groups_of
from fastcpt.corpus.score_columns import SPLITS, ScoreColumns
from fastcpt.held_out import comparison
from fastcpt.recipe import Recipe

Ints = npt.NDArray[np.int64]


class Frozen(NamedTuple):
    """Works and texts of the frozen set that models are compared on."""

    digest: str
    works: npt.NDArray[np.uint64]
    texts: npt.NDArray[np.uint64]

    @classmethod
    def of(cls, home: Path, recipe: str, digest: str) -> Frozen:
        """The frozen set of a recipe, which has that digest."""
        file = comparison(home, recipe) / "documents.parquet"
        table = pq.read_table(file, columns=["work_hash", "content"])
        return cls(digest, table["work_hash"].to_numpy(), table["content"].to_numpy())

    def holds(self, corpus: ScoreColumns, rows: Ints) -> npt.NDArray[np.bool_]:
        """Which rows belong to its works or have one of its texts."""
        same_work = np.isin(corpus.work[rows], self.works)
        return same_work | np.isin(corpus.content[rows], self.texts)


def split_by_work(
    corpus: ScoreColumns,
    taken: Ints,
    reserve: Ints,
    pairs: npt.NDArray[np.int64],
    tokens: Ints,
    recipe: Recipe,
    frozen: Frozen | None = None,
) -> None:
    """Hold out whole works: those chosen by their own hash, then the newest acts.

    A work is an act with its versions, corrigenda and translations. Two works are kin if any of their
    documents are near-duplicates (dropped ones too), or if one contains the other. Kin of a held-out work
    are not trained on, and are held out only if their own hash says so.

    With a ``frozen`` comparison set, its works replace those chosen by hash, which are then not used at
    all; no document of the set's works or texts is taken from the folder.
    """
    settings = recipe.corpus
    most = settings.validation_tokens
    kin = _joined_works(corpus, pairs)
    judged = taken[frozen.holds(corpus, taken)] if frozen else taken[:0]
    by_hash = _held_out_by_hash(
        corpus.work[taken], settings.validation_share, settings.seed, at_least_one=not frozen
    )
    drawn = np.setdiff1d(taken[by_hash], judged)
    names = _groups_in_order(corpus.work[drawn], settings.seed)
    first = _first_groups(names, corpus.work[drawn], len(drawn), tokens[drawn], most)
    is_read = np.isin(corpus.work[drawn], first) & (frozen is None)
    corpus.split[drawn[is_read]] = SPLITS.index("validation")
    corpus.drop(drawn[~is_read], "held_out_unread")
    of_held_out = np.unique(kin[np.concatenate([drawn, judged])])
    is_kin = np.isin(kin[taken], of_held_out)
    corpus.drop(np.setdiff1d(taken[is_kin], drawn), "of_a_held_out_work")

    others = taken[~is_kin]
    newest_first = _groups_in_order(kin[others], settings.seed, -_act_day(corpus)[others])
    count = math.ceil(settings.newest_share * len(taken))
    newest = _first_groups(newest_first, kin[others], count, tokens[others], most)
    is_newest = np.isin(kin[others], newest)
    corpus.split[others[is_newest]] = SPLITS.index("validation_newest")
    corpus.split[others[~is_newest]] = SPLITS.index("train")
    unread = _held_out_by_hash(
        corpus.work[reserve], settings.validation_share, settings.seed, at_least_one=False
    )
    corpus.drop(reserve[unread], "held_out_unread")
    reserve = reserve[~unread]
    lost = np.isin(kin[reserve], np.union1d(of_held_out, newest))
    if frozen:
        lost |= frozen.holds(corpus, reserve)
    corpus.drop(reserve[lost], "of_a_held_out_work")
    corpus.split[reserve[~lost]] = SPLITS.index("reserve")


def _held_out_by_hash(
    works: npt.NDArray[np.uint64], share: float, seed: int, at_least_one: bool
) -> npt.NDArray[np.bool_]:
    """Which works are held out: about ``share``, each independently of the others in the corpus.

    ``at_least_one``: if a small corpus would have none, hold out the first in the seed's order.
    """
    drawn = _drawn(works, seed)
    limit = np.uint64(share * 2**64)
    return drawn <= (max(limit, drawn.min()) if at_least_one and len(drawn) else limit)


def _joined_works(corpus: ScoreColumns, pairs: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Each row's work; works joined by ``pairs`` share the smallest of their hashes."""
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
    """The date of the original act, yyyymmdd: a later version does not make it new."""
    day = corpus.date.astype(np.int64)
    of_act = corpus.act_year.astype(np.int64) * 10_000
    return np.where((day // 10_000 == corpus.act_year) & (day > 0), day, of_act)


def _groups_in_order(
    works: npt.NDArray[np.uint64], seed: int, first: Ints | None = None
) -> npt.NDArray[np.uint64]:
    """Works ordered by the smallest ``first`` of their documents, then at random by the seed."""
    names, index = np.unique(works, return_inverse=True)
    turned = _drawn(names, seed)
    if first is None:
        return names[np.argsort(turned, kind="stable")]
    least = np.full(len(names), np.iinfo(np.int64).max)
    np.minimum.at(least, index, first)
    return names[np.lexsort((turned, least))]


def _drawn(works: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.uint64]:
    """A uniform 64-bit number for each work, from the work's hash and the seed alone."""
    turned = (works ^ np.uint64(seed * 0x9E3779B97F4A7C15 % (1 << 64))) * np.uint64(
        0xBF58476D1CE4E5B9
    )
    turned ^= turned >> np.uint64(31)
    return turned * np.uint64(0x94D049BB133111EB)


def _first_groups(
    order: npt.NDArray[np.uint64],
    works: npt.NDArray[np.uint64],
    documents: int,
    tokens: Ints,
    most: int,
) -> npt.NDArray[np.uint64]:
    """The first works of ``order`` that hold at least ``documents`` of the rows.

    They stop before their (estimated) ``tokens`` exceed ``most``, but there is at least one work.
    """
    if documents <= 0 or not len(order):
        return order[:0]
    names, index, counts = np.unique(works, return_inverse=True, return_counts=True)
    places = np.searchsorted(names, order)
    enough = int(np.searchsorted(np.cumsum(counts[places]), documents)) + 1
    sums = np.cumsum(np.bincount(index, weights=tokens)[places])
    return order[: min(enough, max(1, int(np.searchsorted(sums, most, side="right"))))]
