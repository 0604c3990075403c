"""Best-fit decreasing: items of different lengths into rows of one size, with little room left."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Rows of at most ``size`` tokens, as numbers of the items of these ``lengths`` in them.

    The longest first, each into the fullest row that still has room for it. The fullest rows come
    first. A length is at least 1 and at most ``size``.
    """
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(size + 1)]  # numbers of rows by the tokens left
    rooms = 0  # bit n: some row has n tokens left
    for item in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = lengths[item]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
            rows[row].append(item)
        else:
            room, row = size, len(rows)
            rows.append([item])
        by_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return [rows[row] for some in by_room for row in some]
