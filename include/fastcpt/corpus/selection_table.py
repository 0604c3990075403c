"""The table of a selection: one row per document, with its reason or its split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from fastcpt.corpus.score import named_in
from fastcpt.corpus.score_columns import (
    NAMING,
    REASONS,
    SPLITS,
    ScoreColumns,
    batches_of,
    ids_of,
    namings,
)
from fastcpt.files import whole_file
from fastcpt.manifests import ScoresFolder
from fastcpt.progress import Progress
from fastcpt.recipe import Recipe

Ints = npt.NDArray[np.int64]

SELECTION_SCHEMA = pa.schema(
    [
        ("part", pa.int32()),  # index into the manifest's parts
        ("position", pa.int64()),
        ("id", pa.string()),
        ("work", pa.string()),
        ("content", pa.uint64()),
        ("work_hash", pa.uint64()),
        ("score", pa.float64()),
        ("recency", pa.float32()),
        ("citations", pa.float32()),
        ("reason", pa.dictionary(pa.int8(), pa.string())),  # null: taken
        ("split", pa.dictionary(pa.int8(), pa.string())),  # null: not taken
        ("rank", pa.int64()),  # 0 is the best; -1: not ranked
        ("duplicate_of", pa.string()),
        ("tokens", pa.int64()),  # estimated
        ("characters", pa.int32()),
        ("bytes", pa.int64()),
        ("year", pa.int16()),
        ("doc_type", pa.string()),
        ("areas", pa.list_(pa.string())),
    ]
)


def write_selection(
    path: Path,
    tables: Sequence[ScoresFolder],
    corpus: ScoreColumns,
    duplicate_of: Ints,
    ratio: float,
    of_adapters: Sequence[str],
) -> None:
    tokens = corpus.tokens(ratio)
    progress = Progress("write the selection", "documents", len(tokens))
    names = ids_of(tables, np.unique(duplicate_of[duplicate_of >= 0]))
    copied = ["id", "work", "content", "work_hash", "bytes", "doc_type"]
    row = 0
    with whole_file(path) as aside, pq.ParquetWriter(aside, SELECTION_SCHEMA) as writer:
        for table in tables:
            for batch in batches_of(table, [*copied, "areas", *NAMING]):
                rows = slice(row, row + batch.num_rows)
                row += batch.num_rows
                columns = {
                    "part": corpus.part[rows],
                    "position": corpus.position[rows],
                    "score": corpus.score[rows],
                    "recency": corpus.recency[rows],
                    "citations": corpus.citations[rows],
                    "reason": _words(corpus.reason[rows], REASONS),
                    "split": _words(corpus.split[rows], SPLITS),
                    "rank": corpus.rank[rows],
                    "duplicate_of": [names.get(n) for n in duplicate_of[rows].tolist()],
                    "tokens": tokens[rows],
                    "characters": corpus.characters[rows],
                    "year": corpus.year[rows],
                    "areas": _areas(batch, of_adapters),
                    **{name: batch.column(name) for name in copied},
                }
                arrays = [columns[name] for name in SELECTION_SCHEMA.names]
                writer.write_table(pa.table(arrays, schema=SELECTION_SCHEMA))
                progress.add(batch.num_rows)


def subjects_of_adapters(recipe: Recipe) -> list[str]:
    """The subjects in ``lora.areas`` that the score does not have."""
    areas = recipe.lora.areas.values() if recipe.lora else ()
    named = {subject for subjects in areas for subject in subjects}
    return sorted(named - recipe.score.subjects.keys())


def _areas(batch: pa.RecordBatch, of_adapters: Sequence[str]) -> pa.Array:
    areas = batch.column("areas")
    if not of_adapters:
        return areas
    added = (named_in(named, of_adapters) for named in namings(batch))
    both = [[*own, *more] for own, more in zip(areas.to_pylist(), added, strict=True)]
    return pa.array(both, areas.type)


def _words(codes: npt.NDArray[np.int8], words: Sequence[str]) -> pa.Array:
    indices = pa.array(codes, mask=codes == 0)
    return pa.DictionaryArray.from_arrays(indices, pa.array(words))
