"""Finds groups of near-duplicates by MinHash LSH.

Documents are compared if their signatures agree in all entries of at least one band. A pair is a
near-duplicate if the share of equal entries reaches the threshold; connected pairs form a group. Bands
are on disk and sorted one at a time, so ten million documents need some hundred megabytes, and their
order does not matter.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from fastcpt.corpus.fingerprint import BINS, Hashes
from fastcpt.progress import Progress

Rows = npt.NDArray[np.int64]
RECALL = 0.97  # for pairs exactly at the threshold; higher for closer ones
_ROWS_AT_ONCE = 1 << 16


def band_rows(threshold: float) -> int:
    """Signature entries per band: the most that still find ``RECALL`` of the pairs at the threshold."""
    for rows in range(16, 1, -1):
        if 1 - (1 - threshold**rows) ** (BINS // rows) >= RECALL:
            return rows
    return 1


class SignatureStore:
    """Signatures and band keys of rows 0, 1, 2, ... in files of a scratch folder."""

    def __init__(self, folder: Path, threshold: float):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.threshold = threshold
        self.rows_of_band = band_rows(threshold)
        self.bands = BINS // self.rows_of_band
        self.count = 0
        self._signatures = (folder / "signatures").open("w+b")
        self._bands: list[BinaryIO] = [
            (folder / f"band-{band}").open("w+b") for band in range(self.bands)
        ]

    def append(self, signatures: npt.NDArray[np.uint16]) -> None:
        """Add (n, 128) signatures as the next n rows."""
        self.count += len(signatures)
        self._signatures.write(np.ascontiguousarray(signatures).tobytes())
        for band, file in enumerate(self._bands):
            columns = signatures[:, band * self.rows_of_band : (band + 1) * self.rows_of_band]
            keys = np.zeros(len(signatures), dtype=np.uint64)
            for n in range(self.rows_of_band):
                keys = (keys ^ columns[:, n]) * np.uint64(0x9E3779B97F4A7C15)
                keys ^= keys >> np.uint64(29)
            file.write(keys.tobytes())

    def close(self) -> None:
        """Close the files; the caller removes the folder."""
        for file in (self._signatures, *self._bands):
            file.close()

    def pairs(self, preferred: Rows) -> npt.NDArray[np.int64]:
        """Near-duplicate pairs, (n, 2), among the rows of ``preferred`` (the best first)."""
        found = np.empty(0, dtype=np.uint64)
        progress = Progress("find near-duplicates", "bands", self.bands)
        for file in self._bands:
            file.seek(0)
            keys = np.fromfile(file, dtype=np.uint64)[preferred]
            found = np.union1d(found, _candidates(keys))
            progress.add(1)
        left = preferred[(found >> np.uint64(32)).astype(np.int64)]
        right = preferred[(found & np.uint64(0xFFFFFFFF)).astype(np.int64)]
        alike = self._similar(left, right)
        return np.stack([left[alike], right[alike]], axis=1)

    def _similar(self, left: Rows, right: Rows) -> npt.NDArray[np.bool_]:
        wanted = np.unique(np.concatenate([left, right]))
        table = self._read(wanted)
        alike = np.empty(len(left), dtype=bool)
        for begin in range(0, len(left), _ROWS_AT_ONCE):
            some = slice(begin, begin + _ROWS_AT_ONCE)
            one = table[np.searchsorted(wanted, left[some])]
            other = table[np.searchsorted(wanted, right[some])]
            alike[some] = (one == other).mean(axis=1) >= self.threshold
        return alike

    def _read(self, rows: Rows) -> npt.NDArray[np.uint16]:
        """Signatures of some rows (in order), in one pass over the file."""
        table = np.empty((len(rows), BINS), dtype=np.uint16)
        self._signatures.seek(0)
        for begin in range(0, self.count, _ROWS_AT_ONCE):
            block = np.fromfile(self._signatures, dtype=np.uint16, count=_ROWS_AT_ONCE * BINS)
            first, last = np.searchsorted(rows, [begin, begin + _ROWS_AT_ONCE]).tolist()
            table[first:last] = block.reshape(-1, BINS)[rows[first:last] - begin]
        return table


def _candidates(keys: Hashes) -> Hashes:
    """Pairs of indices with equal keys, each packed into 64 bits, the smaller index first.

    Each member of a bucket is paired with the bucket's first member and with the one before it.
    """
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    same = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
    if not len(same):
        return np.empty(0, dtype=np.uint64)
    begins = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    firsts = begins[np.searchsorted(begins, same, side="right") - 1]
    lesser = order[np.concatenate([firsts, same - 1])].astype(np.uint64)
    greater = order[np.concatenate([same, same])].astype(np.uint64)
    return np.unique((lesser << np.uint64(32)) | greater)


def groups_of(pairs: npt.NDArray[np.int64]) -> dict[int, int]:
    """A representative for each member of a pair; chains of pairs share one."""
    parent: dict[int, int] = {}

    def root(row: int) -> int:
        while parent.setdefault(row, row) != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for left, right in pairs.tolist():
        one, other = root(left), root(right)
        if one != other:
            parent[max(one, other)] = min(one, other)
    return {row: root(row) for row in parent}
