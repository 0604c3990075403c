"""Token ids in files: 2 bytes each if none is above 65,535, else 3 (up to 16.7 million).

Files are little-endian ids without a header. They are read with pread, as a memory map's pages would count
as the process's memory, and shuffled reads touch all of them.
"""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]


def width_of(largest: int) -> int:
    """Bytes per id for a file with this largest id."""
    if not 0 <= largest < 1 << 24:
        raise ValueError(f"{largest} is no token id: they go from 0 to {(1 << 24) - 1:,}")
    return 2 if largest < 1 << 16 else 3


def to_bytes(ids: Ids, width: int) -> npt.NDArray[np.uint8]:
    """The ids as stored bytes; each fits into ``width`` bytes."""
    four = np.ascontiguousarray(ids, dtype="<i4").view(np.uint8).reshape(-1, 4)
    return np.ascontiguousarray(four[:, :width]).reshape(-1)


def from_bytes(stored: npt.NDArray[np.uint8], width: int) -> Ids:
    """The inverse of ``to_bytes``."""
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
        # not preadv, which some Pythons on macOS lack; and macOS cannot read 2 GB at once
        piece = os.pread(descriptor, min(len(stored) - done, 1 << 30), begin * width + done)
        if not piece:
            raise EOFError(f"the file ends before id {begin + count}")
        stored[done : done + len(piece)] = np.frombuffer(piece, dtype=np.uint8)
        done += len(piece)
    return from_bytes(stored, width)
