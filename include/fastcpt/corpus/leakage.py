"""Overlap of training documents with held-out ones, by shared 13-grams of words.

The overlap of a pair is the share of either document's 13-grams that are in the other. Boilerplate and
citations make nearly all acts share some: among 140,000 pairs of EU acts 0.5 % overlap by more than
0.05, and 9 pairs by more than 0.3, all of them sister acts written from one draft. An n-gram that is in
many documents is a formula (boilerplate) and counts in no overlap. All counts are exact: call
``write_table`` for the held-out documents, ``matches`` for each part, ``write_formulas`` once all parts
are counted, then ``overlaps``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastcpt.corpus.documents import Document, read_documents
from fastcpt.corpus.fingerprint import OVERLAP, ngram_hashes, word_hashes, word_spans
from fastcpt.files import whole_file
from fastcpt.progress import Progress
from fastcpt.recipe_sections import Fields

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Hashes = npt.NDArray[np.uint64]

MAX_OVERLAP = 0.3
FORMULA_DOCUMENTS = 20  # an n-gram in more documents, held-out ones included, is a formula
MAX_FORMULAS = 0.7  # share of formulas above which a held-out document has too little of its own
_PLACES = 16  # bits of the filter per held-out n-gram: one in 16 other n-grams passes it


class Matches(NamedTuple):
    """The n-grams (as indices into the table) that a part's documents share with held-out ones.

    ``seen``: the n-grams; ``documents``: in how many of the part's documents each one is. For documents
    that may overlap: their ``position``, number of n-grams (``sequences``), and, for the n-th of them,
    the shared n-grams ``places[begins[n]:begins[n + 1]]``, each found ``times`` in it.
    """

    seen: Ints
    documents: Ints
    position: Ints
    sequences: Ints
    begins: Ints
    places: Ints
    times: Ints


class Overlaps(NamedTuple):
    """Pairs that share more than ``MAX_OVERLAP``: a position in the part and a held-out number.

    ``of_own``: the shared part of the training document; ``of_held_out``: of the held-out one.
    """

    position: Ints
    held_out: Ints
    of_own: Floats
    of_held_out: Floats


class _Table(NamedTuple):
    """The n-th n-gram, in sorted order, is in the held-out documents ``numbers[begins[n]:begins[n + 1]]``."""

    hashes: Hashes
    begins: Ints
    numbers: npt.NDArray[np.int32]
    sizes: Ints  # sequences of each held-out document
    filter: npt.NDArray[np.uint8]

    @classmethod
    def at(cls, folder: Path) -> _Table:
        # memory-mapped: all processes share one copy
        return cls(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in cls._fields))

    def places_of(self, sequences: Hashes) -> Ints:
        """Each n-gram's index in the table, in order; -1 if it is not held out."""
        found = np.full(len(sequences), -1, dtype=np.int64)
        bits = len(self.filter).bit_length() + 2
        leading = _leading(sequences, bits)
        # the filter removes nearly all
        likely = np.flatnonzero((self.filter[leading >> 3] >> (leading & 7)) & 1 == 1)
        if len(self.hashes):
            places = np.searchsorted(self.hashes, sequences[likely])
            places = np.minimum(places, len(self.hashes) - 1)
            same = self.hashes[places] == sequences[likely]
            found[likely[same]] = places[same]
        return found

    def held_out_of(self, places: Ints) -> tuple[npt.NDArray[np.int32], Ints]:
        """The held-out documents that contain the n-grams, and how many contain each one."""
        spans = self.begins[places + 1] - self.begins[places]
        first = np.repeat(self.begins[places] - (np.cumsum(spans) - spans), spans)
        return self.numbers[first + np.arange(int(spans.sum()))], spans

    def shares(self, places: Ints, times: Ints, sequences: int) -> tuple[Floats, Floats]:
        """The share of a document, and of each held-out one, that these common n-grams make."""
        numbers, spans = self.held_out_of(places)
        count = len(self.sizes)
        own = np.bincount(numbers, weights=np.repeat(times, spans), minlength=count)
        other = np.bincount(numbers, minlength=count)
        return own / max(1, sequences), other / np.maximum(1, self.sizes)


def held_out_sequences(part: str, fields: Fields, positions: Ints) -> tuple[Ints, list[Hashes]]:
    """Positions and hashed n-grams of a part's held-out documents."""
    found: list[int] = []
    sequences = []
    for document in read_documents(part, fields, wanted=set(positions.tolist())):
        if isinstance(document, Document):
            found.append(document.position)
            sequences.append(np.unique(_sequences(document.text)))
            if len(found) == len(positions):
                break
    return np.array(found, dtype=np.int64), sequences


def _sequences(text: str) -> Hashes:
    return ngram_hashes(word_hashes(text), OVERLAP)


def write_table(folder: Path, sequences: list[Hashes]) -> None:
    """Write the sorted n-grams of all held-out documents, with the numbers of their documents."""
    sizes = np.array([len(item) for item in sequences], dtype=np.int64)
    every = np.concatenate([*sequences, np.empty(0, dtype=np.uint64)])
    numbers = np.repeat(np.arange(len(sequences), dtype=np.int32), sizes)
    order = np.lexsort((numbers, every))
    hashes, counts = np.unique(every, return_counts=True)
    # bit n of the filter is set if some n-gram's leading bits are n
    bits = max(16, (len(every) * _PLACES).bit_length())
    places = _leading(hashes, bits)
    maybe = np.zeros((1 << bits) // 8, dtype=np.uint8)
    np.bitwise_or.at(maybe, places >> 3, np.left_shift(1, places & 7).astype(np.uint8))
    begins = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    table = _Table(hashes, begins, numbers[order], sizes, maybe)
    for name, column in table._asdict().items():
        _write(folder / f"{name}.npy", column)
    (folder / "formula.npy").unlink(missing_ok=True)


def _write(path: Path, column: npt.NDArray[Any]) -> None:
    with whole_file(path) as aside, aside.open("wb") as file:
        np.save(file, column)


def matches(part: str, fields: Fields, positions: Ints, folder: Path) -> Matches:
    """The n-grams that a part's documents (by position) share with held-out ones."""
    table = _Table.at(folder)
    wanted = set(positions.tolist())
    progress = Progress(f"overlaps of {part.rsplit('/', 1)[-1]}", "documents", len(wanted))
    nothing = np.empty(0, dtype=np.int64)
    seen, likely = [nothing], []
    for document in read_documents(part, fields, wanted=wanted) if wanted else ():
        if isinstance(document, Document):
            own = _sequences(document.text)
            places = table.places_of(own)
            places, times = np.unique(places[places >= 0], return_counts=True)
            seen.append(places)
            # an upper bound: formulas are removed later
            shares = table.shares(places, times, len(own))
            if max(float(share.max(initial=0.0)) for share in shares) > MAX_OVERLAP:
                likely.append((document.position, len(own), places, times))
            progress.add(1)
    every, documents = np.unique(np.concatenate(seen), return_counts=True)
    lengths = [len(places) for _, _, places, _ in likely]
    return Matches(
        every,
        documents,
        np.array([position for position, _, _, _ in likely], dtype=np.int64),
        np.array([own for _, own, _, _ in likely], dtype=np.int64),
        np.cumsum([0, *lengths]),
        np.concatenate([nothing, *(places for _, _, places, _ in likely)]),
        np.concatenate([nothing, *(times for _, _, _, times in likely)]),
    )


def write_formulas(folder: Path, found: Sequence[Matches]) -> Floats:
    """Mark n-grams in many documents as formulas; the share of formulas of each held-out document."""
    table = _Table.at(folder)
    documents = np.diff(table.begins)
    for item in found:
        documents[item.seen] += item.documents
    formula = documents > FORMULA_DOCUMENTS
    _write(folder / "formula.npy", formula)
    numbers, _ = table.held_out_of(np.flatnonzero(formula))
    return np.bincount(numbers, minlength=len(table.sizes)) / np.maximum(1, table.sizes)


def overlaps(found: Matches, folder: Path) -> Overlaps:
    """The documents that overlap with held-out ones, formulas not counted."""
    table = _Table.at(folder)
    formula = np.load(folder / "formula.npy", mmap_mode="r")
    pairs: list[tuple[int, int, float, float]] = []
    for n, (position, sequences) in enumerate(
        zip(found.position.tolist(), found.sequences.tolist(), strict=True)
    ):
        some = slice(found.begins[n], found.begins[n + 1])
        own = ~formula[found.places[some]]
        of_own, of_held_out = table.shares(
            found.places[some][own], found.times[some][own], sequences
        )
        for number in np.flatnonzero(np.maximum(of_own, of_held_out) > MAX_OVERLAP).tolist():
            pairs.append((position, number, float(of_own[number]), float(of_held_out[number])))
    columns: list[Any] = list(zip(*pairs, strict=True)) if pairs else [(), (), (), ()]
    return Overlaps(
        np.array(columns[0], dtype=np.int64),
        np.array(columns[1], dtype=np.int64),
        np.array(columns[2], dtype=np.float64),
        np.array(columns[3], dtype=np.float64),
    )


def stretches_without(text: str, held_out: Sequence[int], folder: Path) -> list[str]:
    """What is left of a text after removing passages that are in the given held-out documents.

    A passage is a run of shared n-grams; formulas count only between them. What is left between two
    passages is dropped if it is shorter than an n-gram.
    """
    table = _Table.at(folder)
    formula = np.load(folder / "formula.npy", mmap_mode="r")
    spans = word_spans(text)
    places = table.places_of(_sequences(text))
    known = np.flatnonzero(places >= 0)
    known = known[~formula[places[known]]]
    numbers, counts = table.held_out_of(places[known])
    of_them = np.isin(numbers, held_out)
    known = np.unique(np.repeat(known, counts)[of_them])
    inside = np.zeros(len(spans), dtype=bool)
    for place in range(OVERLAP):
        inside[np.minimum(known + place, len(spans) - 1)] = True
    edges = np.flatnonzero(np.diff(~inside, prepend=False, append=False)).reshape(-1, 2)
    edges = edges[edges[:, 1] - edges[:, 0] >= OVERLAP]
    found = []
    for first, after in edges.tolist():
        begin = 0 if first == 0 else int(spans[first, 0])
        end = len(text) if after == len(spans) else int(spans[after - 1, 1])
        found.append(text[begin:end])
    return found


def _leading(hashes: Hashes, bits: int) -> Ints:
    return (hashes >> np.uint64(64 - bits)).astype(np.int64)
