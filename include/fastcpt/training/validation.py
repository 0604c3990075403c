"""Reads a corpus's held-out documents, and splits them into windows for a model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as parquet

from fastcpt.files import read_json
from fastcpt.manifests import CorpusManifest

COLUMNS = ("id", "input_ids", "bytes", "year", "areas")


class EvaluationError(ValueError):
    """The evaluation cannot be done as asked; the message says what to change."""


class HeldOutDocument(NamedTuple):
    id: str
    input_ids: npt.NDArray[np.int32]
    bytes: int  # of its text in UTF-8
    year: int | None
    areas: tuple[str, ...]


class Window(NamedTuple):
    """``input_ids[begin:end]`` of a document; tokens from ``first`` on are predicted."""

    document: int
    begin: int
    first: int
    end: int


def validation_files(folder: Path) -> dict[str, list[Path]]:
    """The files of each validation set: ``random`` (validation/), ``newest`` (validation_newest/).

    For the folder of a single set, only that set. ``EvaluationError`` if there is none.
    """

    def shards(place: Path) -> list[Path]:
        return sorted(place.glob("validation_shard_*.parquet"))

    def name(place: Path) -> str:
        return place.name.removeprefix("validation").removeprefix("_") or "random"

    if shards(folder):
        return {name(folder) if folder.name.startswith("validation") else "random": shards(folder)}
    # "validation" sorts before "validation_newest"
    found = {name(place): shards(place) for place in sorted(folder.glob("validation*"))}
    found = {name: files for name, files in found.items() if files}
    if not found:
        raise EvaluationError(
            f"--validation_data {folder}: no validation/validation_shard_*.parquet there; give a "
            "built corpus folder or the validation folder in it"
        )
    return found


def sequence_length(validation: Path) -> int:
    """The sequence length of the corpus that a validation folder is or belongs to."""
    for folder in (validation, validation.parent):
        manifest = folder / "corpus_manifest.json"
        if manifest.is_file():
            corpus: CorpusManifest = read_json(manifest)
            return corpus["max_seq_length"]
    raise EvaluationError(
        f"{validation}: no corpus_manifest.json there tells the sequence length; give the recipe "
        "with --config"
    )


def read_held_out(files: Iterable[Path]) -> list[HeldOutDocument]:
    """The documents of validation shards. ``EvaluationError`` for any other kind of file."""
    documents = []
    for file in files:
        try:
            table = parquet.read_table(file)
        except pa.ArrowInvalid as error:
            raise EvaluationError(f"{file}: {error}; send the corpus again") from error
        missing = [column for column in COLUMNS if column not in table.column_names]
        if missing:
            raise EvaluationError(f"{file}: no column {', '.join(missing)}; build the corpus again")
        columns = [table[column].to_pylist() for column in COLUMNS if column != "input_ids"]
        ids = table["input_ids"].combine_chunks()
        ends = ids.value_lengths().to_numpy().cumsum()
        tokens = np.split(ids.flatten().to_numpy().astype(np.int32, copy=False), ends[:-1])
        for row, (name, size, year, areas) in enumerate(zip(*columns, strict=True)):
            documents.append(HeldOutDocument(name, tokens[row], size, year, tuple(areas or ())))
    if not any(len(document.input_ids) > 1 for document in documents):
        raise EvaluationError(f"{', '.join(map(str, files))}: no document of two tokens or more")
    return documents


def tokens_read(validation: Path, size: int) -> int:
    """Tokens that a model reads to evaluate all sets of a corpus in windows of ``size``.

    Tokens in two windows count twice.
    """
    lengths = [
        length
        for files in validation_files(validation).values()
        for file in files
        for length in parquet.read_table(file, columns=["input_ids"])["input_ids"]
        .combine_chunks()
        .value_lengths()
        .to_pylist()
    ]
    return sum(window.end - window.begin for window in windows_of(lengths, size))


def windows_of(lengths: Iterable[int], size: int) -> list[Window]:
    """Windows of ``size`` tokens with a stride of half a window, over documents of these lengths."""
    stride = size // 2
    windows = []
    for document, length in enumerate(lengths):
        first, begin = 1, 0  # a document's first token is not predicted
        while first < length:
            end = min(begin + size, length)
            windows.append(Window(document, begin, first, end))
            first, begin = end, begin + stride
    return windows
