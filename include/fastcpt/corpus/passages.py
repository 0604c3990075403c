"""Removes from training documents the passages that a held-out document also has.

An amending act may consist mostly of quotations from a large act. If it is held out, only those
passages leave training, not the large act. The text before, between and after them is tokenized again,
each stretch as its own segment, so that text is never joined across a gap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastcpt.corpus import leakage
from fastcpt.corpus.documents import Document, read_documents
from fastcpt.corpus.tokenizer import CorpusTokenizer
from fastcpt.corpus.tokens import write_ids
from fastcpt.recipe_sections import Fields

Ints = npt.NDArray[np.int64]


@dataclass
class Stretches:
    """The stretches left of some documents: by row, where their ids are in ``file``."""

    file: Path
    offset: dict[int, Ints]
    length: dict[int, Ints]

    @classmethod
    def written(cls, file: Path, left: Mapping[int, list[npt.NDArray[np.int32]]]) -> Stretches:
        """Write the ids of what is left, by row."""
        rows = sorted(left)
        ids = [segment for row in rows for segment in left[row]]
        file = write_ids(file, np.concatenate([np.empty(0, dtype=np.int32), *ids]))
        length = {row: np.array([len(segment) for segment in left[row]]) for row in rows}
        ends = np.cumsum([0, *(int(length[row].sum()) for row in rows)])
        offset = {
            row: end + np.cumsum(length[row]) - length[row]
            for row, end in zip(rows, ends.tolist(), strict=False)
        }
        return cls(file, offset, length)

    def segments(self, rows: Ints) -> Ints:
        """The rows, each as often as it has segments."""
        counts = np.ones(len(rows), dtype=np.int64)
        for place in np.flatnonzero(np.isin(rows, list(self.length))).tolist():
            counts[place] = len(self.length[int(rows[place])])
        return np.repeat(rows, counts)


def ids_without(
    part: str,
    fields: Fields,
    quoted: Mapping[int, Sequence[int]],
    folder: Path,
    tokenizer: CorpusTokenizer,
) -> list[tuple[int, int, list[npt.NDArray[np.int32]]]]:
    """What is left of a part's documents: position, characters, the ids of each stretch.

    ``quoted``: by position, the held-out documents (numbers in ``leakage``'s table) that share passages.
    The first stretch gets the BOS token, the last the end token.
    """
    encode = tokenizer.encoder()
    found = []
    for document in read_documents(part, fields, wanted=set(quoted)):
        if isinstance(document, Document):
            texts = leakage.stretches_without(document.text, quoted[document.position], folder)
            segments = encode(texts)
            if segments:
                bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
                segments[0] = np.concatenate([np.array(bos, dtype=np.int32), segments[0]])
                segments[-1] = np.append(segments[-1], np.int32(tokenizer.end_id))
            segments = [segment for segment in segments if len(segment)]
            found.append((document.position, sum(map(len, texts)), segments))
    return found
