"""Locates the token ids of a selection's documents, and tokenizes those that have none yet."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastcpt.corpus.passages import Stretches
from fastcpt.corpus.processes import over_parts
from fastcpt.corpus.selected import Selected
from fastcpt.corpus.tokenizer import CorpusTokenizer
from fastcpt.corpus.tokens import read_index, token_folder, tokenize_part
from fastcpt.manifests import Tokenized
from fastcpt.progress import Progress
from fastcpt.recipe_sections import Fields

log = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]


@dataclass
class TokenIds:
    """Locations of token ids, one entry per document."""

    files: list[str]
    file: Ints
    offset: Ints
    length: Ints

    def of(self, rows: Ints) -> TokenIds:
        return TokenIds(self.files, self.file[rows], self.offset[rows], self.length[rows])

    def in_segments(self, rows: Ints, stretches: Stretches) -> TokenIds:
        """The ids of ``rows``, where documents in ``stretches`` come as several segments."""
        ids = self.of(rows)
        ids.files = [*ids.files, str(stretches.file)]
        for row, lengths in stretches.length.items():
            of_row = rows == row
            if of_row.any():
                ids.file[of_row] = len(self.files)
                ids.offset[of_row], ids.length[of_row] = stretches.offset[row], lengths
        return ids

    def first_of_each(self, rows: Ints, most: int) -> tuple[Ints, TokenIds]:
        """The first ``most`` tokens of each row over its consecutive segments; rows and ids."""
        before = np.cumsum(self.length) - self.length
        before -= before[np.searchsorted(rows, rows)]
        left = np.clip(most - before, 0, self.length)
        kept = left > 0
        return rows[kept], TokenIds(self.files, self.file[kept], self.offset[kept], left[kept])

    def and_(self, other: TokenIds) -> TokenIds:
        return TokenIds(
            self.files + other.files,
            np.concatenate([self.file, other.file + len(self.files)]),
            np.concatenate([self.offset, other.offset]),
            np.concatenate([self.length, other.length]),
        )


def tokenize_rows(
    documents: Selected,
    rows: Ints,
    tokenizer: CorpusTokenizer,
    home: Path,
    processes: int | None,
) -> Tokenized:
    """Tokenize the rows that are not tokenized yet."""
    parts = list(documents.by_part(rows))
    numbers = {path: number for number, (path, _) in enumerate(documents.parts)}
    progress = Progress("tokenize", "characters", float(documents.characters[rows].sum()))
    sizes = [
        int(documents.characters[documents.rows_at(numbers[part], positions)].sum())
        for part, _, positions in parts
    ]
    calls = [
        (part, source, documents.fields, tokenizer, positions, home)
        for part, source, positions in parts
    ]
    done: Tokenized = {"documents": 0, "tokens": 0}
    for call, result in over_parts(tokenize_part, calls, sizes, processes):
        progress.add(sizes[call])
        done["documents"] += result["documents"]
        done["tokens"] += result["tokens"]
    log.info("tokenized %d documents, %d tokens of them now", len(rows), done["tokens"])
    return done


def ids_of_all(
    documents: Selected, tokenizer: CorpusTokenizer, home: Path, processes: int | None
) -> TokenIds:
    """Tokenize all remaining documents if necessary; the locations of their ids."""
    rows = np.flatnonzero(~np.isin(documents.split, ["overlaps_held_out", "common_text"]))
    tokenize_rows(documents, rows, tokenizer, home, processes)
    found = find_ids(list(documents.by_part(rows)), documents.fields, tokenizer, home)
    nothing = np.zeros(len(documents.split), dtype=np.int64)
    ids = TokenIds(found.files, nothing.copy(), nothing.copy(), nothing.copy())
    # both rows and found ids are ordered by part and position
    ids.file[rows], ids.offset[rows], ids.length[rows] = found.file, found.offset, found.length
    return ids


def find_ids(
    parts: Sequence[tuple[str, str, Ints]], fields: Fields, tokenizer: CorpusTokenizer, home: Path
) -> TokenIds:
    """Locations of the ids of some parts' tokenized documents, given by position."""
    ids = TokenIds([], *np.empty((3, 0), dtype=np.int64))
    for _, source, positions in parts:
        found = read_index(token_folder(source, fields, tokenizer, home))
        order = np.argsort(found.position, kind="stable")
        at = order[np.searchsorted(found.position[order], positions)]
        ids = ids.and_(TokenIds(found.files, found.file[at], found.offset[at], found.length[at]))
    return ids
