"""Documents of any length -> sequences of at most one length, nothing lost and hardly a gap.

A document longer than a sequence is cut: whole sequences first, then the rest. The rests are
packed best-fit, the longest first: each goes where the least room stays. Where too much room is
still left over (many rests a little longer than half a sequence), the emptiest sequences are
taken apart and cut to fill the gaps of the others.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

MAX_PADDING = 0.004
LEAST_CUT = 32  # tokens: no shorter piece is made only to fill a gap


class Packed(NamedTuple):
    """Pieces by row: piece n is ``length[n]`` tokens of ``document[n]`` from ``begin[n]`` on."""

    row: Ints
    document: Ints
    begin: Ints
    length: Ints
    rows: int


def pack(lengths: Ints, size: int) -> Packed:
    """Pack documents of the given lengths into rows of at most ``size`` tokens.

    Every token of every document is in exactly one piece. Padding, ``1 - tokens / (rows * size)``,
    stays under 0.5 % where there are more than a few hundred rows.
    """
    whole = lengths // size
    rests = lengths % size
    count = int(whole.sum())
    document = np.repeat(np.arange(len(lengths)), whole)
    begin = (np.arange(count) - np.repeat(np.cumsum(whole) - whole, whole)) * size
    bins = _best_fit(rests, size)
    total = int(rests.sum())
    bins = _without_gaps(bins, total, count, size)
    pieces = [
        (count + n, item, begin_in_rest, length)
        for n, items in enumerate(bins)
        for item, begin_in_rest, length in items
    ]
    rest = np.array(pieces, dtype=np.int64).reshape(-1, 4)
    rest[:, 2] += (whole * size)[rest[:, 1]]
    return Packed(
        row=np.concatenate([np.arange(count), rest[:, 0]]),
        document=np.concatenate([document, rest[:, 1]]),
        begin=np.concatenate([begin, rest[:, 2]]),
        length=np.concatenate([np.full(count, size), rest[:, 3]]),
        rows=count + len(bins),
    )


# A piece of a rest: (document, begin within the rest, length)
Piece = tuple[int, int, int]


def _best_fit(rests: Ints, size: int) -> list[list[Piece]]:
    """Best-fit decreasing: rows as lists of whole rests."""
    order = np.lexsort((np.arange(len(rests)), -rests))
    order = order[rests[order] > 0]
    bins: list[list[Piece]] = []
    with_room: list[list[int]] = [[] for _ in range(size + 1)]
    rooms = 0  # bit r is set where some row has room for exactly r more
    for item, length in zip(order.tolist(), rests[order].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, chosen = size, len(bins)
            bins.append([])
        bins[chosen].append((item, 0, length))
        room -= length
        if room:
            with_room[room].append(chosen)
            rooms |= 1 << room
    return bins


def _without_gaps(
    bins: list[list[Piece]], total: int, other_rows: int, size: int
) -> list[list[Piece]]:
    """Take the emptiest rows apart until the padding of all rows is small enough."""

    def padding(rows: int) -> float:
        return (rows * size - total) / ((rows + other_rows) * size)

    if not bins or padding(len(bins)) <= MAX_PADDING:
        return bins
    fills = [sum(length for _, _, length in items) for items in bins]
    by_fill = sorted(range(len(bins)), key=lambda n: (-fills[n], n))
    gaps = [(-(size - fills[n]), n) for n in by_fill if size - fills[n] >= LEAST_CUT]
    heapq.heapify(gaps)
    room = sum(-gap for gap, _ in gaps)
    while len(by_fill) > 1 and padding(len(by_fill)) > MAX_PADDING:
        emptiest = by_fill[-1]
        room -= size - fills[emptiest] if size - fills[emptiest] >= LEAST_CUT else 0
        if room < fills[emptiest]:
            break
        by_fill.pop()
        room -= _spread(bins, emptiest, gaps)
    return [bins[n] for n in sorted(by_fill)]


def _spread(bins: list[list[Piece]], emptied: int, gaps: list[tuple[int, int]]) -> int:
    """Cut a row's pieces into the widest gaps of the others; returns the room they took."""
    taken = 0
    for item, begin, length in bins[emptied]:
        while length:
            gap, chosen = heapq.heappop(gaps)
            if chosen == emptied or not bins[chosen]:
                continue
            part = min(length, -gap)
            bins[chosen].append((item, begin, part))
            begin, length = begin + part, length - part
            left = -gap - part
            taken += part
            if left >= LEAST_CUT:
                heapq.heappush(gaps, (-left, chosen))
            else:
                taken += left
    bins[emptied] = []
    return taken
