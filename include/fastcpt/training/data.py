"""Packed rows -> micro-batches, in an order that only the seed decides.

A row holds pieces of several documents. Positions begin anew at every piece, no piece attends to
another, and no token is asked to predict the first token of the next piece.

The shards are decoded once a host into one flat file of tokens that every rank maps into memory:
shuffling over the whole corpus then costs no memory and no reader processes. The n-th sample of
a training is a function of the seed and of n alone, so the order is the same for any number of
ranks, and a resumed training goes on where it stopped.

An adapter of a legal area is trained on the pieces of its area, packed anew: rows of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as parquet
import torch

from fastcpt.files import digest_of, read_json, sha256_of_file, whole_file

Ints = npt.NDArray[np.int32]
NO_LOSS = -100


class DataError(ValueError):
    """The training data cannot be used; the message names the file and what to do."""


class Row(NamedTuple):
    """One packed sequence; ``labels`` are not shifted, -100 asks for nothing, None for all."""

    input_ids: Ints
    lengths: Ints  # of the pieces; their sum is the number of tokens
    labels: Ints | None = None


class Rows(Protocol):
    """A set of rows to train on; ``size`` is the length that rows are padded to."""

    size: int

    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> Row: ...


class ListRows:
    """Rows held in memory."""

    def __init__(self, rows: list[Row], size: int) -> None:
        self.rows, self.size = rows, size

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Row:
        return self.rows[number]


class CorpusRows:
    """The rows of a corpus folder, mapped from one flat file in ``scratch``.

    The files are decoded by ``decode_corpus`` before. ``size`` is the recipe's ``max_seq_length``.
    """

    def __init__(self, scratch: Path, size: int) -> None:
        self.size = size
        self.tokens: Ints = np.load(scratch / "tokens.npy", mmap_mode="r")
        self.lengths: Ints = np.load(scratch / "lengths.npy", mmap_mode="r")
        self.starts = np.load(scratch / "starts.npy")  # [rows + 1, 2]: first token, first piece

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> Row:
        (token, piece), (token_end, piece_end) = self.starts[number : number + 2]
        return Row(self.tokens[token:token_end], self.lengths[piece:piece_end])


class AreaRows(CorpusRows):
    """The pieces of one area, packed into rows of their own; ``area`` counts from 0."""

    def __init__(self, scratch: Path, size: int, area: int) -> None:
        super().__init__(scratch, size)
        pieces = np.flatnonzero(np.load(scratch / "areas.npy")[:, area])
        ends = self.lengths.cumsum(dtype=np.int64)
        self.packed = [pieces[row] for row in packed(self.lengths[pieces].tolist(), size)]
        self.begins = ends - self.lengths  # [pieces]: the first token of each

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(self, number: int) -> Row:
        pieces = self.packed[number]
        lengths = self.lengths[pieces]
        tokens = [
            self.tokens[begin : begin + length]
            for begin, length in zip(self.begins[pieces], lengths, strict=True)
        ]
        return Row(np.concatenate(tokens), lengths)


def packed(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Rows of at most ``size`` tokens, as numbers of the pieces of these ``lengths`` in them.

    The longest first, each into the fullest row that still has room for it.
    """
    by_room: list[list[list[int]]] = [[] for _ in range(size + 1)]  # rows by the tokens left
    rooms = 0  # bit n: some row has n tokens left
    for piece in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        need = lengths[piece]
        fitting = rooms >> need
        room = need + (fitting & -fitting).bit_length() - 1 if fitting else size
        row = by_room[room].pop() if fitting else []
        if fitting and not by_room[room]:
            rooms &= ~(1 << room)
        row.append(piece)
        by_room[room - need].append(row)
        rooms |= 1 << (room - need)
    return [row for rows in by_room for row in rows]


def decode_corpus(
    corpus: Path, size: int, scratch: Path, areas: Mapping[str, Sequence[str]] | None = None
) -> Path:
    """Verify a corpus folder's shards and decode them to flat files; returns their folder.

    Run by one process of each host. Costs 4 bytes a token under ``scratch``, and nothing when it
    was done before. ``areas`` maps an area to the subjects of its pieces, for ``AreaRows``. Raises
    ``DataError`` for a missing or altered shard, rows that are longer than ``size`` tokens or whose
    pieces do not add up, or an area without pieces.
    """
    manifest_file = corpus / "corpus_manifest.json"
    if not manifest_file.is_file():
        raise DataError(f"{manifest_file} is missing: --data_dir must be a built corpus folder")
    files = [
        entry
        for entry in read_json(manifest_file)["files"]
        if Path(entry["file"]).name.startswith("cpt_train_shard_")
    ]
    if not files:
        raise DataError(f"{manifest_file}: 'files' names no cpt_train_shard_*.parquet")
    files.sort(key=lambda entry: str(entry["file"]))
    digests = [entry["sha256"] for entry in files]
    folder = scratch / (digest_of(digests, size, areas) if areas else digest_of(digests, size))
    if (folder / "starts.npy").is_file():
        return folder
    tokens: list[Ints] = []
    lengths: list[Ints] = []
    row_tokens: list[Ints] = []
    row_pieces: list[Ints] = []
    of_areas: list[npt.NDArray[np.bool_]] = []
    for entry in files:
        shard = corpus / entry["file"]
        _verify(shard, entry)
        columns = ["input_ids", "lengths", *(["areas"] if areas else [])]
        if areas and "areas" not in parquet.read_schema(shard).names:
            raise DataError(
                f"{shard}: no column areas, which lora.areas needs; build the corpus again"
            )
        table = parquet.read_table(shard, columns=columns)
        for column, flat, counts in (
            ("input_ids", tokens, row_tokens),
            ("lengths", lengths, row_pieces),
        ):
            values = table[column].combine_chunks()
            flat.append(values.flatten().to_numpy().astype(np.int32, copy=False))
            counts.append(values.value_lengths().to_numpy())
        _check_rows(shard, lengths[-1], row_tokens[-1], row_pieces[-1], size)
        if areas:
            of_areas.append(_of_areas(table["areas"].combine_chunks().flatten(), areas))
    if areas:
        chosen = np.concatenate(of_areas)
        for n, name in enumerate(areas):
            if not chosen[:, n].any():
                raise DataError(f"lora.areas.{name}: no piece of the corpus is of its subjects")
        with whole_file(folder / "areas.npy") as aside, aside.open("wb") as out:
            np.save(out, chosen)
    sizes = np.stack([np.concatenate(row_tokens), np.concatenate(row_pieces)], axis=1)
    starts = np.concatenate([np.zeros((1, 2), np.int64), sizes.cumsum(axis=0)])
    # the last of these completes the folder
    for name, content in (
        ("tokens", np.concatenate(tokens)),
        ("lengths", np.concatenate(lengths)),
        ("starts", starts),
    ):
        with whole_file(folder / f"{name}.npy") as aside, aside.open("wb") as out:
            np.save(out, content)
    return folder


def _of_areas(pieces: Any, areas: Mapping[str, Sequence[str]]) -> npt.NDArray[np.bool_]:
    """[pieces, areas]: whether a piece names one of the area's subjects; general text names none."""
    values = pieces.flatten().to_pylist()
    owner = np.repeat(np.arange(len(pieces)), pieces.value_lengths().fill_null(0).to_numpy())
    chosen = np.zeros((len(pieces), len(areas)), np.bool_)
    for n, subjects in enumerate(areas.values()):
        chosen[owner[np.isin(values, list(subjects))], n] = True
    return chosen


def _verify(shard: Path, entry: dict[str, object]) -> None:
    if not shard.is_file():
        raise DataError(f"{shard} is missing; send the corpus again")
    if shard.stat().st_size != entry["bytes"] or sha256_of_file(shard) != entry["sha256"]:
        raise DataError(f"{shard}: its digest is not the manifest's; send the corpus again")


def _check_rows(shard: Path, lengths: Ints, tokens: Ints, pieces: Ints, size: int) -> None:
    too_long = np.flatnonzero(tokens > size)
    if len(too_long):
        row = int(too_long[0])
        raise DataError(
            f"{shard}: row {row} has {tokens[row]} tokens, more than max_seq_length ({size}); "
            "train with the recipe that the corpus was built with"
        )
    ends = np.concatenate([[0], lengths.cumsum(dtype=np.int64)])[pieces.cumsum()]
    wrong = np.flatnonzero(ends != tokens.cumsum())
    if len(wrong):
        raise DataError(f"{shard}: row {int(wrong[0])}: 'lengths' do not add up to 'input_ids'")


class Order:
    """The row of the n-th sample: every epoch a new permutation drawn from the seed."""

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
    """A micro-batch of B rows, padded to S tokens; padding is a piece of its own, without loss."""

    input_ids: torch.Tensor  # [B, S] int64
    targets: torch.Tensor  # [B, S] int64: the next token of the same piece, or -100
    position_ids: torch.Tensor  # [B, S] int64, from 0 at every piece
    lengths: list[int]  # of all pieces, row after row, with the padding: their sum is B * S


def targets_of(row: Row) -> Ints:
    """What each token of a row is asked to predict: the next one of its piece, or -100."""
    labels = row.input_ids if row.labels is None else row.labels
    targets = np.full(len(row.input_ids), NO_LOSS, np.int32)
    targets[:-1] = labels[1:]
    targets[np.cumsum(row.lengths) - 1] = NO_LOSS
    return targets


def make_batch(rows: list[Row], size: int) -> Batch:
    """Pad rows to ``size`` tokens and stack them. Padding is token 0, whatever that is."""
    shape = (len(rows), size)
    input_ids = np.zeros(shape, np.int64)
    targets = np.full(shape, NO_LOSS, np.int64)
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
