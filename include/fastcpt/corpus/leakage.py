"""Whether held-out documents are trained on after all, by the words they share.

A training document and a held-out one overlap by the share of either's 13-word sequences that
stand in the other, the greater of the two. Formulas and citations make nearly all acts share
some: among 140,000 pairs of EU acts 0.5 % overlap by more than 0.05, and 9 pairs by more than 0.3,
all of them sister acts written from one draft. Everything is counted exactly, from the texts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastcpt.corpus.documents import Document, read_documents
from fastcpt.corpus.fingerprint import OVERLAP, ngram_hashes, word_hashes
from fastcpt.corpus.processes import Progress
from fastcpt.files import whole_file
from fastcpt.recipe import Fields

Ints = npt.NDArray[np.int64]

MAX_OVERLAP = 0.3
_PLACES = 16  # of the filter, for each held-out sequence: one in 16 others passes it


class Overlaps(NamedTuple):
    """Pairs that share more than ``MAX_OVERLAP``: a position of the part, a held-out number."""

    position: Ints
    held_out: Ints
    share: npt.NDArray[np.float64]


def _sequences(text: str) -> npt.NDArray[np.uint64]:
    return np.unique(ngram_hashes(word_hashes(text), OVERLAP))


def held_out_sequences(
    part: str, fields: Fields, positions: Ints
) -> tuple[Ints, list[npt.NDArray[np.uint64]]]:
    """Positions and hashed word sequences of a part's held-out documents."""
    wanted = set(positions.tolist())
    found: list[int] = []
    sequences = []
    for document in read_documents(part, fields):
        if isinstance(document, Document) and document.position in wanted:
            found.append(document.position)
            sequences.append(_sequences(document.text))
            if len(found) == len(wanted):
                break
    return np.array(found, dtype=np.int64), sequences


def write_table(folder: Path, sequences: list[npt.NDArray[np.uint64]]) -> None:
    """All held-out documents' sequences, sorted, with the number of the document each is of."""
    sizes = np.array([len(item) for item in sequences], dtype=np.int64)
    hashes = np.concatenate([*sequences, np.empty(0, dtype=np.uint64)])
    numbers = np.repeat(np.arange(len(sequences), dtype=np.int32), sizes)
    order = np.lexsort((numbers, hashes))
    # bit n of the filter is set where some sequence's leading bits are n
    bits = max(16, (len(hashes) * _PLACES).bit_length())
    places = _leading(hashes, bits)
    maybe = np.zeros((1 << bits) // 8, dtype=np.uint8)
    np.bitwise_or.at(maybe, places >> 3, np.left_shift(1, places & 7).astype(np.uint8))
    columns = {"hashes": hashes[order], "numbers": numbers[order], "sizes": sizes, "filter": maybe}
    for name, column in columns.items():
        with whole_file(folder / f"{name}.npy") as aside, aside.open("wb") as file:
            np.save(file, column)


def overlaps(part: str, fields: Fields, positions: Ints, table: Path) -> Overlaps:
    """Which of a part's documents (by position) overlap with held-out ones."""
    # mapped: the processes of a machine share one copy in memory
    hashes, numbers, sizes, maybe = (
        np.load(table / f"{name}.npy", mmap_mode="r")
        for name in ("hashes", "numbers", "sizes", "filter")
    )
    bits = len(maybe).bit_length() + 2
    wanted = set(positions.tolist())
    progress = Progress(f"overlaps of {part.rsplit('/', 1)[-1]}", "documents", len(wanted))
    found: list[tuple[int, int, float]] = []
    for document in read_documents(part, fields) if wanted else ():
        if isinstance(document, Document) and document.position in wanted:
            own = ngram_hashes(word_hashes(document.text), OVERLAP)
            places = _leading(own, bits)
            # nearly all end here
            likely = np.sort(own[(maybe[places >> 3] >> (places & 7)) & 1 == 1])
            of_own = _counts(likely, hashes, numbers, len(sizes)) / max(1, len(own))
            of_other = _counts(np.unique(likely), hashes, numbers, len(sizes)) / sizes
            share = np.maximum(of_own, of_other)
            found += [
                (document.position, int(n), float(share[n]))
                for n in np.flatnonzero(share > MAX_OVERLAP)
            ]
            progress.add(1)
    columns: list[Any] = list(zip(*found, strict=True)) if found else [(), (), ()]
    return Overlaps(
        np.array(columns[0], dtype=np.int64),
        np.array(columns[1], dtype=np.int64),
        np.array(columns[2], dtype=np.float64),
    )


def _leading(hashes: npt.NDArray[np.uint64], bits: int) -> Ints:
    return (hashes >> np.uint64(64 - bits)).astype(np.int64)


def _counts(
    sequences: npt.NDArray[np.uint64],
    hashes: npt.NDArray[np.uint64],
    numbers: npt.NDArray[np.int32],
    count: int,
) -> Ints:
    """How many of the sequences stand in each held-out document."""
    first = np.searchsorted(hashes, sequences, side="left")
    spans = np.searchsorted(hashes, sequences, side="right") - first
    places = np.repeat(first - (np.cumsum(spans) - spans), spans) + np.arange(int(spans.sum()))
    return np.bincount(numbers[places], minlength=count)
