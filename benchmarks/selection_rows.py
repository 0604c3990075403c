"""Packed rows of an arm for the product's trainer, read straight from the pool's ids."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from selection_pool import Pool

from fastcpt.corpus.pack import pack
from fastcpt.training.data import Ints, Row


class SpanRows:
    """Spans of a pool as rows of ``size`` tokens, packed like a corpus."""

    def __init__(self, pool: Pool, spans: npt.NDArray[np.int64], size: int) -> None:
        self.ids, self.size = pool.ids, size
        begin, length = at_pieces(spans, pool.pieces)
        plan = pack(length, size)
        order = np.argsort(plan.row, kind="stable")
        self.begin = (begin[plan.document] + plan.begin)[order]
        self.length = plan.length[order].astype(np.int32)
        self.first = np.searchsorted(plan.row[order], np.arange(plan.rows + 1))

    def __len__(self) -> int:
        return len(self.first) - 1

    def __getitem__(self, number: int) -> Row:
        some = slice(self.first[number], self.first[number + 1])
        parts = [
            self.ids[begin : begin + length]
            for begin, length in zip(self.begin[some], self.length[some], strict=True)
        ]
        return Row(np.concatenate(parts), self.lengths_of(number))

    def lengths_of(self, number: int) -> Ints:
        return self.length[self.first[number] : self.first[number + 1]]

    def targets_in(self, number: int) -> int:
        lengths = self.lengths_of(number)
        return int(lengths.sum()) - len(lengths)  # all but each segment's first


def at_pieces(
    spans: npt.NDArray[np.int64], pieces: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Begin and length of spans (in order), cut where a piece of the pool begins inside one."""
    ends = spans.sum(axis=1)
    owner = np.searchsorted(spans[:, 0], pieces, side="right") - 1
    inside = (owner >= 0) & (pieces > spans[owner, 0]) & (pieces < ends[owner])
    begin = np.sort(np.concatenate([spans[:, 0], pieces[inside]]))
    of = np.searchsorted(spans[:, 0], begin, side="right") - 1
    following = np.append(begin[1:], np.iinfo(np.int64).max)
    return begin, np.minimum(following, ends[of]) - begin
