"""Token ids in files: 2 bytes each where none is above 65,535, 3 otherwise (up to 16.7 million).

Little-endian and nothing but the ids. They are read where they lie: a memory map's pages would
count as the process's own memory, and a shuffled reading touches all of them.
"""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]


def width_of(largest: int) -> int:
    """Bytes an id, where ``largest`` is the largest of a file."""
    if not 0 <= largest < 1 << 24:
        raise ValueError(f"{largest} is no token id: they go from 0 to {(1 << 24) - 1:,}")
    return 2 if largest < 1 << 16 else 3


def to_bytes(ids: Ids, width: int) -> npt.NDArray[np.uint8]:
    """The ids as they are stored; ``ids`` fit into ``width`` bytes."""
    four = np.ascontiguousarray(ids, dtype="<i4").view(np.uint8).reshape(-1, 4)
    return np.ascontiguousarray(four[:, :width]).reshape(-1)


def from_bytes(stored: npt.NDArray[np.uint8], width: int) -> Ids:
    """What ``to_bytes`` stored."""
    if width == 2:
        return stored.view("<u2").astype(np.int32)
    four = np.zeros((len(stored) // width, 4), dtype=np.uint8)
    four[:, :width] = stored.reshape(-1, width)
    return four.view("<i4").reshape(-1)


def read_ids(descriptor: int, width: int, begin: int, count: int) -> Ids:
    """``count`` ids of an open file from the ``begin``-th on; any number of threads may read."""
    stored = np.empty(count * width, dtype=np.uint8)
    done = 0
    while done < len(stored):
        # pread alone: not every Python on macOS has preadv; nor does macOS read 2 GB at once
        piece = os.pread(descriptor, min(len(stored) - done, 1 << 30), begin * width + done)
        if not piece:
            raise EOFError(f"the file ends before id {begin + count}")
        stored[done : done + len(piece)] = np.frombuffer(piece, dtype=np.uint8)
        done += len(piece)
    return from_bytes(stored, width)
