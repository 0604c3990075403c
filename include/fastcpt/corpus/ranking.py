"""Ranks the documents: adds the score's components that depend on the whole corpus, then sorts.

Ties: the newer document first, then the smaller hash of the id.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fastcpt.corpus.score_columns import ScoreColumns, batches_of
from fastcpt.manifests import ScoresFolder
from fastcpt.progress import Progress
from fastcpt.recipe import Recipe

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

HALF_LIFE_YEARS = 15.0  # an act this much older than the corpus's newest has half its recency


def rank_by_score(corpus: ScoreColumns, tables: Sequence[ScoresFolder], recipe: Recipe) -> None:
    """Add the components that depend on the corpus, then order by score."""
    if recipe.score.method == "legal":
        weights = recipe.score.weights
        works = Works(tables, corpus)
        year = _last_changed(tables, corpus, works)
        age = np.maximum(0, corpus.newest_year - year)
        # documents without a date get the middle value
        recency = np.where(year > 0, 0.5 ** (age / HALF_LIFE_YEARS), 0.5)
        corpus.recency = recency.astype(np.float32)
        corpus.citations = _citations(tables, corpus, works).astype(np.float32)
        corpus.note_spread("recency", corpus.recency)
        corpus.note_spread("citations", corpus.citations)
        corpus.score = (
            corpus.score
            + weights.recency * corpus.recency.astype(np.float64)
            + weights.citations * corpus.citations.astype(np.float64)
        )
    order = np.lexsort(
        (corpus.position, corpus.id_hash, -corpus.date.astype(np.int64), -corpus.score)
    )
    corpus.rank[order] = np.arange(len(order))


class Works:
    """The corpus's works, and how others refer to them: by the work, or by an act's name.

    A name that two works have refers to neither.
    """

    def __init__(self, tables: Sequence[ScoresFolder], corpus: ScoreColumns) -> None:
        works, self.of_row = np.unique(corpus.work, return_inverse=True)
        self.count = len(works)
        pairs = [(names, self.of_row[rows]) for names, rows, _ in _listed(tables, "own_names")]
        names, of_name = (np.concatenate(column) for column in zip(*pairs, strict=True))
        names, place = np.unique(names, return_inverse=True)
        low, high = np.full(len(names), self.count), np.full(len(names), -1)
        np.minimum.at(low, place, of_name)
        np.maximum.at(high, place, of_name)
        one = low == high
        self.refers, first = np.unique(np.concatenate([works, names[one]]), return_index=True)
        self.work_of = np.concatenate([np.arange(self.count), low[one]])[first]

    def named(self, hashes: npt.NDArray[np.uint64]) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """The works that ``hashes`` refer to, and which of them are in the corpus."""
        place = np.minimum(np.searchsorted(self.refers, hashes), len(self.refers) - 1)
        return self.work_of[place], self.refers[place] == hashes


def _listed(
    tables: Sequence[ScoresFolder], column: str
) -> Iterator[tuple[npt.NDArray[np.uint64], Ints, int]]:
    """The entries of a column of lists, batch by batch, each with its row; and the batch's rows."""
    row = 0
    for table in tables:
        for batch in batches_of(table, [column]):
            lists = batch.column(column)
            rows = row + np.repeat(np.arange(batch.num_rows), np.diff(lists.offsets.to_numpy()))
            row += batch.num_rows
            yield np.asarray(lists.flatten()), rows, batch.num_rows


def _last_changed(
    tables: Sequence[ScoresFolder], corpus: ScoreColumns, works: Works
) -> npt.NDArray[np.int64]:
    """The year of each document, or of the newest consolidated version or act that amended it."""
    newest = np.zeros(works.count, dtype=np.int64)
    for hashes, rows, _ in _listed(tables, "amends"):
        work, known = works.named(hashes)
        np.maximum.at(newest, work[known], corpus.year[rows[known]].astype(np.int64))
    version = np.where(corpus.year > 0, corpus.version // 10_000, 0)
    changed = np.maximum(newest[works.of_row], version)
    changed[changed > corpus.newest_year] = 0
    return np.maximum(corpus.year, changed)


def _citations(tables: Sequence[ScoresFolder], corpus: ScoreColumns, works: Works) -> Floats:
    """The citations component, 0..1: citations received from documents of the act's own topics.

    A citation counts by the share of the citing document's subject matters that the cited act also has,
    so an act that everyone cites for its procedure gains little. The sum is compared with the 95th
    percentile of the act's topics. Duplicates' citations do not count. Sums are of integers, so their
    order does not matter.
    """
    topics = _topics(tables)
    topics_of_work = np.zeros(works.count, dtype=np.uint64)
    np.bitwise_or.at(topics_of_work, works.of_row, topics)
    received = np.zeros(works.count, dtype=np.int64)
    progress = Progress("count citations", "documents", len(corpus.part))
    for hashes, citing, count in _listed(tables, "cites"):
        work, known = works.named(hashes)
        counted = known & (corpus.reason[citing] == 0)
        work, of_citing = work[counted], topics[citing[counted]]
        shared = np.bitwise_count(of_citing & topics_of_work[work]).astype(np.int64)
        own = np.bitwise_count(of_citing).astype(np.int64)
        # a quarter if the citing document names no topic
        value = np.where(own > 0, 1024 * shared // np.maximum(own, 1), 256)
        np.add.at(received, work, value)
        progress.add(count)
    return _against_topic(received, topics_of_work)[works.of_row]


def _against_topic(received: Ints, topics: npt.NDArray[np.uint64]) -> Floats:
    """log(1 + received), divided by that of the 95th percentile of the cited works of its topics."""
    citations = received / 1024
    cited = citations > 0
    if not cited.any():
        return np.zeros(len(received))
    overall = np.quantile(citations[cited], 0.95)
    total = np.zeros(len(received))
    count = np.zeros(len(received))
    for topic in range(64):
        of_topic = (topics >> np.uint64(topic)) & np.uint64(1) == 1
        if not (of_topic & cited).any():
            continue
        total[of_topic] += np.quantile(citations[of_topic & cited], 0.95)
        count[of_topic] += 1
    usual = np.where(count > 0, total / np.maximum(count, 1), overall)
    return np.minimum(1.0, np.log1p(citations) / np.log1p(usual))


def _topics(tables: Sequence[ScoresFolder]) -> npt.NDArray[np.uint64]:
    """Each document's subject matters as a bit set of the corpus's 64 most frequent ones."""
    seen: Counter[str] = Counter()
    for table in tables:
        for batch in batches_of(table, ["subjects"]):
            for entry in pc.value_counts(batch.column("subjects").flatten()).to_pylist():
                seen[entry["values"]] += entry["counts"]
    frequent = [name for name, _ in sorted(seen.items(), key=lambda item: (-item[1], item[0]))[:64]]
    names = pa.array(frequent, pa.string())
    found = []
    for table in tables:
        for batch in batches_of(table, ["subjects"]):
            subjects = batch.column("subjects")
            bit = pc.index_in(subjects.flatten(), value_set=names)
            row = np.repeat(np.arange(batch.num_rows), np.diff(subjects.offsets.to_numpy()))
            known = np.asarray(bit.is_valid())
            bits = np.asarray(bit.fill_null(0)).astype(np.uint64)
            topics = np.zeros(batch.num_rows, dtype=np.uint64)
            np.bitwise_or.at(topics, row[known], np.uint64(1) << bits[known])
            found.append(topics)
    return np.concatenate(found) if found else np.empty(0, dtype=np.uint64)
