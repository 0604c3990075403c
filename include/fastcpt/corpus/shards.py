"""Writes training shards and validation sets: Parquet files, the same on any machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fastcpt.corpus.fingerprint import spread
from fastcpt.corpus.pack import Packed, pack
from fastcpt.corpus.processes import in_processes
from fastcpt.corpus.selected import BuildError, Selected
from fastcpt.corpus.token_ids import TokenIds
from fastcpt.corpus.tokens import TokenFiles
from fastcpt.files import sha256_of_file, whole_file
from fastcpt.manifests import HeldOutShard, Shard
from fastcpt.progress import Progress
from fastcpt.recipe import Recipe

Ints = npt.NDArray[np.int64]

ROWS_OF_GROUP = 256  # sequences read at once when the order is random

AREAS = pa.list_(pa.string())
SHARD_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("lengths", pa.list_(pa.int32())),
        ("areas", pa.list_(AREAS)),
    ]
)
VALIDATION_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("bytes", pa.int64()),
        ("year", pa.int32()),
        ("doc_type", pa.string()),
        ("areas", AREAS),
    ]
)


@dataclass
class DocumentAreas:
    """The areas of the training documents: ``names[code[n]]`` for document n."""

    names: list[list[str] | None]
    code: Ints

    @classmethod
    def of(cls, documents: Selected, train: Ints, general: int) -> DocumentAreas:
        """The areas of the legal documents, then None for ``general`` general ones."""
        areas = documents.about["areas"]
        numbers: dict[tuple[str, ...], int] = {}
        code = np.empty(len(train) + general, dtype=np.int64)
        for begin in range(0, len(train), 1 << 16):
            some = train[begin : begin + (1 << 16)]
            for n, names in enumerate(areas.take(pa.array(some)).to_pylist(), start=begin):
                code[n] = numbers.setdefault(tuple(names), len(numbers))
        code[len(train) :] = len(numbers)
        return cls([*map(list, numbers), None], code)


def check_adapters(areas: DocumentAreas, recipe: Recipe) -> None:
    """Raise ``BuildError`` if an adapter of ``lora.areas`` has no documents to train on."""
    there = {subject for names in areas.names for subject in names or ()}
    for adapter, subjects in recipe.lora.areas.items() if recipe.lora else ():
        if there.isdisjoint(subjects):
            raise BuildError(
                f"lora.areas.{adapter}: no training document names {' or '.join(subjects) or 'it'}; "
                "give subject matters that the documents have, or take more documents"
            )


def plan_rows(training: TokenIds, recipe: Recipe) -> Packed:
    """Pack the documents and shuffle the rows by the seed; row n goes to shard n modulo ``num_shards``."""
    size, shards = recipe.corpus.max_seq_length, recipe.corpus.num_shards
    plan = pack(training.length, size)
    if plan.rows < shards:
        raise BuildError(
            f"{int(training.length.sum()):,} tokens make {plan.rows} sequences of {size} for "
            f"{shards} shards; take more documents, or lower corpus.num_shards or max_seq_length"
        )
    drawn = spread(np.arange(plan.rows), recipe.corpus.seed)
    # dealt round-robin from the fullest row on: shards differ by at most one row's tokens
    tokens = np.bincount(plan.row, weights=plan.length, minlength=plan.rows)
    shard = np.empty(plan.rows, dtype=np.int64)
    shard[np.lexsort((drawn, -tokens))] = np.arange(plan.rows) % shards
    order = np.lexsort((drawn, shard))
    first = np.searchsorted(shard[order], shard[order])
    place = np.empty(plan.rows, dtype=np.int64)
    place[order] = (np.arange(plan.rows) - first) * shards + shard[order]
    row = place[plan.row]
    order = np.argsort(row, kind="stable")
    return Packed(
        row[order], plan.document[order], plan.begin[order], plan.length[order], plan.rows
    )


def write_shards(
    folder: Path,
    plan: Packed,
    training: TokenIds,
    areas: DocumentAreas,
    shards: int,
    processes: int | None,
) -> list[Shard]:
    calls = []
    for shard in range(shards):
        segments = np.flatnonzero(plan.row % shards == shard)
        document = plan.document[segments]
        calls.append(
            (
                folder / f"cpt_train_shard_{shard:02}.parquet",
                training.files,
                training.file[document],
                training.offset[document] + plan.begin[segments],
                plan.length[segments],
                plan.row[segments],
                areas.code[document],
                areas.names,
            )
        )
    progress = Progress("write", "shards", shards)
    written: dict[int, Shard] = {}
    for shard, facts in in_processes(write_shard, calls, processes):
        written[shard] = facts
        progress.add(1)
    return [written[shard] for shard in range(shards)]


def write_shard(
    path: Path,
    files: list[str],
    file: Ints,
    offset: Ints,
    length: Ints,
    row: Ints,
    area: Ints,
    areas: list[list[str] | None],
) -> Shard:
    """Write one shard from segments of token files, in order; ``row`` groups them into sequences.

    ``area`` is each segment's index into ``areas``. An existing shard is complete and is not rewritten.
    """
    firsts = np.flatnonzero(np.diff(row, prepend=-1))
    names = pa.array(areas, AREAS)
    if not path.exists():
        ends = np.append(firsts[1:], len(row))
        with (
            whole_file(path) as aside,
            _writer(aside, SHARD_SCHEMA) as writer,
            TokenFiles(files) as source,
        ):
            for begin in range(0, len(firsts), ROWS_OF_GROUP):
                some = slice(firsts[begin], ends[min(begin + ROWS_OF_GROUP, len(firsts)) - 1])
                rows = firsts[begin : begin + ROWS_OF_GROUP] - some.start
                values = source.read(file[some], offset[some], length[some])
                segments = length[some].astype(np.int32)
                tokens_before = np.concatenate([[0], np.cumsum(segments)])
                writer.write_table(
                    pa.table(
                        [
                            _lists(np.append(tokens_before[rows], len(values)), pa.array(values)),
                            _lists(np.append(rows, len(segments)), pa.array(segments)),
                            _lists(
                                np.append(rows, len(segments)), names.take(pa.array(area[some]))
                            ),
                        ],
                        schema=SHARD_SCHEMA,
                    )
                )
    return {
        "file": path.name,
        "rows": len(firsts),
        "tokens": int(length.sum()),
        "bytes": path.stat().st_size,
        "sha256": sha256_of_file(path),
    }


def _lists(offsets: Ints, values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    # a dictionary of a 100,000-entry vocabulary costs more than it saves
    return pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        compression_level=6,
        use_dictionary=False,
        data_page_size=4 << 20,  # one page per row group, so that zstd compresses it as a whole
    )


def write_validation(folder: Path, split: str, about: pa.Table, ids: TokenIds) -> HeldOutShard:
    """Write one set of held-out documents, one row each, ordered by id."""
    name = f"{split}/validation_shard_00.parquet"
    names = about["id"].to_pylist()
    order = np.array(sorted(range(len(names)), key=lambda row: names[row]))
    about, ids = about.take(pa.array(order)), ids.of(order)
    with (
        whole_file(folder / name) as aside,
        _writer(aside, VALIDATION_SCHEMA) as writer,
        TokenFiles(ids.files) as source,
    ):
        for begin in range(0, len(order), 64):
            some = slice(begin, begin + 64)
            values = source.read(ids.file[some], ids.offset[some], ids.length[some])
            facts = about.slice(begin, 64)
            offsets = np.concatenate([[0], np.cumsum(ids.length[some])])
            year = facts["year"].cast(pa.int32())
            columns = [
                facts["id"],
                _lists(offsets, pa.array(values)),
                facts["bytes"],
                pc.if_else(pc.equal(year, 0), pa.scalar(None, pa.int32()), year),
                pc.if_else(pc.equal(facts["doc_type"], ""), None, facts["doc_type"]),
                facts["areas"],
            ]
            writer.write_table(pa.table(columns, schema=VALIDATION_SCHEMA))
    path = folder / name
    return {
        "file": name,
        "set": split,
        "rows": len(order),
        "tokens": int(ids.length.sum()),
        "bytes": path.stat().st_size,
        "sha256": sha256_of_file(path),
    }
