"""The columns of the score tables that the selection uses, one entry per document."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fastcpt.corpus.dates import newest_plausible
from fastcpt.corpus.duplicates import SignatureStore
from fastcpt.corpus.fingerprint import BINS
from fastcpt.corpus.score import (
    LEGAL_COMPONENTS,
    PUBLISHED_COMPONENTS,
    kind_name,
    named_in,
    naming,
)
from fastcpt.manifests import ScoresFolder
from fastcpt.progress import Progress
from fastcpt.recipe import Recipe

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

BATCH = 65_536

REASONS = (
    "",
    "superseded",
    "exact_duplicate",
    "older_version",
    "near_duplicate",
    "too_short",
    "too_old",
    "other_kind",
    "other_subject",
    "below_threshold",
    "outside_top_share",
    "over_budget",
    "of_a_held_out_work",
    "held_out_unread",
)
SPLITS = ("", "train", "validation", "validation_newest", "reserve")


_NUMBERS: dict[str, Any] = {
    "position": np.int64,
    "id_hash": np.uint64,
    "content": np.uint64,
    "work_hash": np.uint64,
    "named": bool,
    "version": np.int32,
    "version_of": np.uint64,
    "date": np.int32,
    "year": np.int16,
    "act_year": np.int16,
    "characters": np.int32,
    "pieces": np.int32,
}
NAMING = ("subjects", "title", "directory_code")
_WANTED = ("doc_type", "signature", *NAMING)


class ScoreColumns:
    """The score tables' numbers as columns, one entry per document, ordered by the parts' names."""

    def __init__(self, tables: Sequence[ScoresFolder], recipe: Recipe, store: SignatureStore):
        count = sum(table["documents"] for table in tables)
        columns = {name: np.empty(count, dtype) for name, dtype in _NUMBERS.items()}
        self.part = np.empty(count, dtype=np.int32)
        self.of_wanted_kind = np.empty(count, dtype=bool)
        self.of_wanted_subject = np.empty(count, dtype=bool)
        self.score = np.empty(count, dtype=np.float64)
        self.spread: dict[str, tuple[float, float]] = {}  # minimum and maximum of each component
        progress = Progress("read scores", "documents", count)
        row = 0
        for number, table in enumerate(tables):
            for batch in batches_of(table, [*_NUMBERS, *_WANTED, *_components(recipe)]):
                rows = slice(row, row + batch.num_rows)
                row += batch.num_rows
                for name, column in columns.items():
                    column[rows] = _numbers(batch, name)
                self.part[rows] = number
                self.of_wanted_kind[rows] = _of_wanted_kind(batch, recipe)
                self.of_wanted_subject[rows] = _of_wanted_subject(batch, recipe)
                self.score[rows] = _points(batch, recipe)
                for name in _components(recipe):
                    self.note_spread(name.removeprefix("score_"), _numbers(batch, name))
                store.append(_signatures(batch))
                progress.add(batch.num_rows)
        self.position, self.id_hash = columns["position"], columns["id_hash"]
        self.content, self.work = columns["content"], columns["work_hash"]
        self.named = columns["named"]
        self.version, self.version_of = columns["version"], columns["version_of"]
        self.date, self.year, self.act_year = columns["date"], columns["year"], columns["act_year"]
        self.characters, self.pieces = columns["characters"], columns["pieces"]
        self.reason = np.zeros(count, dtype=np.int8)
        self.split = np.zeros(count, dtype=np.int8)
        self.rank = np.full(count, -1, dtype=np.int64)
        self.recency = np.zeros(count, dtype=np.float32)
        self.citations = np.zeros(count, dtype=np.float32)
        self.newest_year = newest_plausible(self.year)
        self.oddly_dated = self._forget_odd_dates()

    def _forget_odd_dates(self) -> Ints:
        """Remove dates after the newest plausible year; returns their rows."""
        odd = np.flatnonzero(self.year > self.newest_year)
        self.date[odd] = 0
        # a CELEX number also gives the act's year
        act_year = self.act_year[odd]
        self.act_year[odd] = np.where(act_year > self.newest_year, 0, act_year)
        self.year[odd] = self.act_year[odd]
        return odd

    def note_spread(self, component: str, values: npt.NDArray[Any]) -> None:
        if len(values):
            low, high = self.spread.get(component, (np.inf, -np.inf))
            least, greatest = float(values.min()), float(values.max())
            self.spread[component] = min(low, least), max(high, greatest)

    def same_for_all(self) -> list[str]:
        """Components with the same value for all documents, which do not affect the order."""
        return [name for name, (low, high) in self.spread.items() if low == high]

    def alive(self) -> Ints:
        """Rows that no step has dropped yet."""
        return np.flatnonzero(self.reason == 0)

    def drop(self, rows: Ints | Bools, reason: str) -> None:
        """Drop rows for a reason; rows that were dropped before keep theirs."""
        if rows.dtype == bool:
            rows = np.flatnonzero(rows)
        rows = rows[self.reason[rows] == 0]
        self.reason[rows] = REASONS.index(reason)

    def tokens(self, ratio: float) -> Ints:
        """Estimated tokens, including BOS and end of text."""
        return np.ceil(self.pieces * ratio).astype(np.int64) + 2


def _components(recipe: Recipe) -> list[str]:
    names = LEGAL_COMPONENTS if recipe.score.method == "legal" else PUBLISHED_COMPONENTS
    return [f"score_{name}" for name in names]


def batches_of(table: ScoresFolder, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(Path(table["path"]) / "scores.parquet") as file:
        yield from file.iter_batches(batch_size=BATCH, columns=list(columns))


def _numbers(batch: pa.RecordBatch, name: str) -> Any:
    return batch.column(name).to_numpy(zero_copy_only=False)


def _signatures(batch: pa.RecordBatch) -> npt.NDArray[np.uint16]:
    column = batch.column("signature")
    width = BINS * 2
    content = np.frombuffer(column.buffers()[1], dtype=np.uint8)
    begin = column.offset * width
    content = content[begin : begin + len(column) * width]
    return content.view(np.uint16).reshape(-1, BINS)


def sketches_of(
    tables: Sequence[ScoresFolder], rows: Ints
) -> Iterator[tuple[Ints, npt.NDArray[np.uint64]]]:
    """For sorted ``rows``, batch by batch: indices into ``rows`` and sketch entries, in parallel arrays."""
    row = 0
    for table in tables:
        for batch in batches_of(table, ["sketch"]):
            begin, end = np.searchsorted(rows, [row, row + batch.num_rows]).tolist()
            sketches = batch.column("sketch").take(pa.array(rows[begin:end] - row))
            row += batch.num_rows
            counts = np.diff(sketches.offsets.to_numpy())
            yield np.repeat(np.arange(begin, end), counts), np.asarray(sketches.flatten())


def _points(batch: pa.RecordBatch, recipe: Recipe) -> Floats:
    """The part of the score that depends on one document alone."""
    total = np.zeros(batch.num_rows, dtype=np.float64)
    weights = recipe.score.weights.model_dump()
    for name in _components(recipe):
        weight = weights[name.removeprefix("score_")] if recipe.score.method == "legal" else 1.0
        total += weight * _numbers(batch, name).astype(np.float64)
    return total


def _of_wanted_kind(batch: pa.RecordBatch, recipe: Recipe) -> Bools:
    kinds = recipe.selection.doc_types
    if not kinds:
        return np.ones(batch.num_rows, dtype=bool)
    wanted = pa.array([kind_name(kind) for kind in kinds])
    return np.asarray(pc.is_in(batch.column("doc_type"), value_set=wanted))


def _of_wanted_subject(batch: pa.RecordBatch, recipe: Recipe) -> Bools:
    subjects = recipe.selection.subjects
    if not subjects:
        return np.ones(batch.num_rows, dtype=bool)
    return np.array([bool(named_in(named, subjects)) for named in namings(batch)], dtype=bool)


def namings(batch: pa.RecordBatch) -> Iterator[str]:
    """``naming`` of each document of a batch."""
    columns = (batch.column(name).to_pylist() for name in NAMING)
    for subjects, title, directory_code in zip(*columns, strict=True):
        yield naming(subjects, title, directory_code)


def ids_of(tables: Sequence[ScoresFolder], rows: Ints) -> dict[int, str]:
    found: dict[int, str] = {}
    row = 0
    for table in tables:
        for batch in batches_of(table, ["id"]):
            begin, end = np.searchsorted(rows, [row, row + batch.num_rows]).tolist()
            here = rows[begin:end]
            ids = batch.column("id").take(pa.array(here - row)).to_pylist()
            found |= dict(zip(here.tolist(), ids, strict=True))
            row += batch.num_rows
    return found
