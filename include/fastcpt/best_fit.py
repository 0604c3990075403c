"""Best-fit decreasing bin packing: items of different lengths into rows of one size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Pack items of these ``lengths`` into rows of at most ``size`` tokens; the items' numbers by row.

    Items are placed longest first, each into the fullest row with room for it. The fullest rows come
    first. Lengths are from 1 to ``size``.
    """
    rows: list[list[int]] = []
    by_room: list[list[int]] = [
        [] for _ in range(size + 1)
    ]  # numbers of the rows with n tokens left
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
