"""Turns packed rows into micro-batches, in an order that depends only on the seed.

A row consists of segments: whole documents or parts of them. Positions restart at every segment, no
segment attends to another, and no token has the first token of the next segment as its target.

Each host decodes the shards once, one row group at a time, into a flat file of tokens. Every rank reads
its own rows from it, one step ahead, so shuffling the whole corpus needs neither memory nor reader
processes. Of other ranks' rows it reads only the lengths. The n-th sample is a function of the seed and
n, so the order is the same for any number of ranks, and a resumed training continues where it stopped.

The adapter of a legal area is trained on that area's segments, packed into rows of their own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as parquet
import torch

from fastcpt.best_fit import best_fit
from fastcpt.files import digest_of, read_json, sha256_of_file, whole_file
from fastcpt.ids import read_ids, to_bytes, width_of
from fastcpt.manifests import CorpusManifest, FileEntry

Ints = npt.NDArray[np.int32]
IGNORE_INDEX = -100  # the label that masks a token out of the loss
FORMAT = 2  # of decoded corpora


class DataError(ValueError):
    """The training data cannot be used; the message names the file and what to do."""


class Row(NamedTuple):
    """One packed sequence. ``labels`` are not shifted; -100 masks a token, None means all tokens count."""

    input_ids: Ints
    lengths: Ints  # of the segments; their sum is the number of tokens
    labels: Ints | None = None


class Rows(Protocol):
    """A set of rows to train on; ``size`` is the length that rows are padded to."""

    size: int

    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> Row: ...
    def lengths_of(self, number: int) -> Ints:
        """The lengths of a row's segments, without reading its tokens."""

    def targets_in(self, number: int) -> int:
        """How many of a row's targets count in the loss (not -100 in ``targets_of``)."""


class ListRows:
    """Rows held in memory."""

    def __init__(self, rows: list[Row], size: int) -> None:
        self.rows, self.size = rows, size

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Row:
        return self.rows[number]

    def lengths_of(self, number: int) -> Ints:
        return self.rows[number].lengths

    def targets_in(self, number: int) -> int:
        return int((targets_of(self.rows[number]) != IGNORE_INDEX).sum())


class CorpusRows:
    """The rows of a corpus folder, read from one flat file in ``scratch``.

    ``decode_corpus`` writes it. ``size`` is the recipe's ``max_seq_length``.
    """

    def __init__(self, scratch: Path, size: int) -> None:
        self.size = size
        (tokens,) = scratch.glob("tokens.ids?")
        self.file, self.width = os.open(tokens, os.O_RDONLY), int(tokens.name[-1])
        self.lengths: Ints = np.load(scratch / "lengths.npy")
        self.starts = np.load(scratch / "starts.npy")  # [rows + 1, 2]: first token, first segment

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> Row:
        begin, end = self.starts[number : number + 2, 0].tolist()
        return Row(read_ids(self.file, self.width, begin, end - begin), self.lengths_of(number))

    def lengths_of(self, number: int) -> Ints:
        begin, end = self.starts[number : number + 2, 1]
        return self.lengths[begin:end]

    def targets_in(self, number: int) -> int:
        lengths = self.lengths_of(number)
        return int(lengths.sum()) - len(lengths)  # all tokens except each segment's first


class AreaRows(CorpusRows):
    """The segments of one area, packed into rows of their own; ``area`` counts from 0."""

    def __init__(self, scratch: Path, size: int, area: int) -> None:
        super().__init__(scratch, size)
        segments = np.flatnonzero(np.load(scratch / "areas.npy")[:, area])
        ends = self.lengths.cumsum(dtype=np.int64)
        self.packed = [segments[row] for row in best_fit(self.lengths[segments].tolist(), size)]
        self.begins = ends - self.lengths  # [segments]: the first token of each

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(self, number: int) -> Row:
        lengths = self.lengths_of(number)
        tokens = [
            read_ids(self.file, self.width, begin, length)
            for begin, length in zip(
                self.begins[self.packed[number]].tolist(), lengths.tolist(), strict=True
            )
        ]
        return Row(np.concatenate(tokens), lengths)

    def lengths_of(self, number: int) -> Ints:
        return self.lengths[self.packed[number]]


def decode_corpus(
    corpus: Path, size: int, scratch: Path, areas: Mapping[str, Sequence[str]] | None = None
) -> Path:
    """Verify a corpus folder's shards and decode them to flat files; returns their folder.

    Run by one process per host. Needs 2 or 3 bytes per token under ``scratch`` (``fastcpt.ids``), the
    memory of one row group and 4 bytes per segment; a finished folder is reused. ``areas`` maps an area
    to the subjects of its segments, for ``AreaRows``. Raises ``DataError`` for a missing or altered
    shard, a row that is longer than ``size`` tokens or does not match its segments, or an area without
    segments.
    """
    shards = _shards(corpus)
    made_from = [FORMAT, [digest for _, digest in shards], size, areas or None]
    folder = scratch / digest_of(made_from)
    if (folder / "starts.npy").is_file():
        return folder
    lengths: list[Ints] = []
    row_tokens: list[Ints] = []
    row_segments: list[Ints] = []
    of_areas: list[npt.NDArray[np.bool_]] = []
    width = max(_width(shard, areas) for shard, _ in shards)
    with whole_file(folder / f"tokens.ids{width}") as aside, aside.open("wb") as out:
        for shard, _ in shards:
            for group in _row_groups(shard, size, areas):
                to_bytes(group.tokens, width).tofile(out)
                lengths.append(group.lengths)
                row_tokens.append(group.row_tokens)
                row_segments.append(group.row_segments)
                of_areas.append(group.areas)
    if areas:
        chosen = np.concatenate(of_areas)
        for n, name in enumerate(areas):
            if not chosen[:, n].any():
                raise DataError(f"lora.areas.{name}: no segment of the corpus is of its subjects")
        _save(folder / "areas.npy", chosen)
    sizes = np.stack([np.concatenate(row_tokens), np.concatenate(row_segments)], axis=1)
    _save(folder / "lengths.npy", np.concatenate(lengths))
    # the last of these completes the folder
    starts = np.concatenate([np.zeros((1, 2), np.int64), sizes.cumsum(axis=0, dtype=np.int64)])
    _save(folder / "starts.npy", starts)
    return folder


def manifest_of(corpus: Path) -> CorpusManifest:
    """The manifest of a corpus folder; ``DataError`` where there is none."""
    file = corpus / "corpus_manifest.json"
    if not file.is_file():
        raise DataError(f"{file} is missing: --data_dir must be a built corpus folder")
    manifest: CorpusManifest = read_json(file)
    return manifest


def _shards(corpus: Path) -> list[tuple[Path, str]]:
    """The verified shards of a corpus folder with their digests."""
    manifest = manifest_of(corpus)
    files = [
        entry
        for entry in manifest["files"]
        if Path(entry["file"]).name.startswith("cpt_train_shard_")
    ]
    if not files:
        raise DataError(
            f"{corpus}/corpus_manifest.json: 'files' names no cpt_train_shard_*.parquet"
        )
    files.sort(key=lambda entry: str(entry["file"]))
    for entry in files:
        _verify(corpus / entry["file"], entry)
    return [(corpus / entry["file"], entry["sha256"]) for entry in files]


def _width(shard: Path, areas: Mapping[str, Sequence[str]] | None) -> int:
    """Bytes per id that a shard needs, from its Parquet statistics; also checks its columns."""
    metadata = parquet.read_metadata(shard)
    if areas and "areas" not in metadata.schema.to_arrow_schema().names:
        raise DataError(f"{shard}: no column areas, which lora.areas needs; build the corpus again")
    columns = [n for n, column in enumerate(metadata.schema) if column.path.startswith("input_ids")]
    largest = 0
    for group in range(metadata.num_row_groups):
        known = metadata.row_group(group).column(columns[0]).statistics
        if known is None or not known.has_min_max:
            return 3
        largest = max(largest, known.max)
    return width_of(largest)


class _RowGroup(NamedTuple):
    tokens: Ints
    lengths: Ints  # of the segments
    row_tokens: Ints  # of each row
    row_segments: Ints
    areas: npt.NDArray[np.bool_]  # [segments, areas]


def _row_groups(
    shard: Path, size: int, areas: Mapping[str, Sequence[str]] | None
) -> Iterator[_RowGroup]:
    """Decode and check a shard's row groups one by one."""
    columns = ["input_ids", "lengths", *(["areas"] if areas else [])]
    before = 0  # rows
    with parquet.ParquetFile(shard) as file:
        for number in range(file.num_row_groups):
            table = file.read_row_group(number, columns=columns)
            ids, segments = (table[name].combine_chunks() for name in ("input_ids", "lengths"))
            group = _RowGroup(
                ids.flatten().to_numpy().astype(np.int32, copy=False),
                segments.flatten().to_numpy().astype(np.int32, copy=False),
                ids.value_lengths().to_numpy(),
                segments.value_lengths().to_numpy(),
                _of_areas(table["areas"].combine_chunks().flatten(), areas)
                if areas
                else np.empty((0, 0), np.bool_),
            )
            _check_rows(shard, before, group, size)
            yield group
            before += len(group.row_tokens)


def _save(file: Path, content: npt.NDArray[Any]) -> None:
    with whole_file(file) as aside, aside.open("wb") as out:
        np.save(out, content)


def _of_areas(segments: Any, areas: Mapping[str, Sequence[str]]) -> npt.NDArray[np.bool_]:
    """[segments, areas]: whether a segment has one of the area's subjects; general text has none."""
    values = segments.flatten().to_pylist()
    owner = np.repeat(np.arange(len(segments)), segments.value_lengths().fill_null(0).to_numpy())
    chosen = np.zeros((len(segments), len(areas)), np.bool_)
    for n, subjects in enumerate(areas.values()):
        chosen[owner[np.isin(values, list(subjects))], n] = True
    return chosen


def _verify(shard: Path, entry: FileEntry) -> None:
    if not shard.is_file():
        raise DataError(f"{shard} is missing; send the corpus again")
    if shard.stat().st_size != entry["bytes"] or sha256_of_file(shard) != entry["sha256"]:
        raise DataError(f"{shard}: its digest is not the manifest's; send the corpus again")


def _check_rows(shard: Path, before: int, group: _RowGroup, size: int) -> None:
    tokens = group.row_tokens
    too_long = np.flatnonzero(tokens > size)
    if len(too_long):
        row = int(too_long[0])
        raise DataError(
            f"{shard}: row {before + row} has {tokens[row]} tokens, more than max_seq_length "
            f"({size}); train with the recipe that the corpus was built with"
        )
    ends = np.concatenate([[0], group.lengths.cumsum(dtype=np.int64)])[group.row_segments.cumsum()]
    wrong = np.flatnonzero(ends != tokens.cumsum())
    if len(wrong):
        row = before + int(wrong[0])
        raise DataError(f"{shard}: row {row}: 'lengths' do not add up to 'input_ids'")
    if (group.lengths < 1).any():
        raise DataError(f"{shard}: 'lengths' has a segment without a token")


class Order:
    """The row of the n-th sample: every epoch is a new permutation from the seed."""

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed = rows, seed
        self._epoch = -1
        self._permutation = np.empty(0, np.int64)

    def __getitem__(self, sample: int) -> int:
        epoch, place = divmod(sample, self.rows)
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        return int(self._permutation[place])


class Batch(NamedTuple):
    """A micro-batch of B rows, padded to S tokens; padding is a separate segment without loss."""

    input_ids: torch.Tensor  # [B, S] int64
    targets: torch.Tensor  # [B, S] int64: the next token of the same segment, or -100
    position_ids: torch.Tensor  # [B, S] int64, from 0 at every segment
    lengths: list[int]  # of all segments, row by row, padding included: their sum is B * S


def targets_of(row: Row) -> Ints:
    """Each token's target: the next token of its segment, or -100."""
    labels = row.input_ids if row.labels is None else row.labels
    targets = np.full(len(row.input_ids), IGNORE_INDEX, np.int32)
    targets[:-1] = labels[1:]
    targets[np.cumsum(row.lengths) - 1] = IGNORE_INDEX
    return targets


def make_batch(rows: list[Row], size: int) -> Batch:
    """Pad rows to ``size`` tokens and stack them. Padding is token 0, in a segment of its own."""
    shape = (len(rows), size)
    input_ids = np.zeros(shape, np.int64)
    targets = np.full(shape, IGNORE_INDEX, np.int64)
    lengths: list[int] = []
    for n, row in enumerate(rows):
        used = len(row.input_ids)
        input_ids[n, :used] = row.input_ids
        targets[n, :used] = targets_of(row)
        lengths += [*map(int, row.lengths)] + ([size - used] if used < size else [])
    positions = np.concatenate([np.arange(length) for length in lengths]).reshape(shape)
    return Batch(
        torch.from_numpy(input_ids), torch.from_numpy(targets), torch.from_numpy(positions), lengths
    )


class Step(NamedTuple):
    """A rank's data for one step: its own micro-batches, and facts about all ranks' rows."""

    batches: list[Batch]
    lengths: list[Ints]  # the segments' lengths of each row of the step, over all ranks
    targets: int  # over all ranks


class Reader:
    """Reads a rank's part of every step in a thread, while the previous step is computed.

    In each of ``accumulation`` turns every rank takes its ``micro`` rows of the step's samples.
    """

    def __init__(
        self, rows: Rows, order: Order, micro: int, accumulation: int, rank: int, world: int
    ) -> None:
        self.rows, self.order, self.micro = rows, order, micro
        self.accumulation, self.rank, self.world = accumulation, rank, world
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reader")
        self.ahead: tuple[int, Future[Step]] | None = None

    def step(self, number: int) -> Step:
        """The step of this number (from 0); starts reading the next one."""
        if self.ahead is None or self.ahead[0] != number:
            self.ahead = number, self.thread.submit(self._read, number)
        step = self.ahead[1].result()
        self.ahead = number + 1, self.thread.submit(self._read, number + 1)
        return step

    def close(self) -> None:
        self.thread.shutdown(cancel_futures=True)

    def _read(self, number: int) -> Step:
        batch = self.micro * self.world * self.accumulation
        samples = [self.order[number * batch + n] for n in range(batch)]
        batches = []
        for turn in range(self.accumulation):
            own = (turn * self.world + self.rank) * self.micro
            rows = [self.rows[sample] for sample in samples[own : own + self.micro]]
            batches.append(make_batch(rows, self.rows.size))
        lengths = [self.rows.lengths_of(sample) for sample in samples]
        return Step(batches, lengths, sum(map(self.rows.targets_in, samples)))
