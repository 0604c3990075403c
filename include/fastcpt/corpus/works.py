"""Finds documents that contain others, to treat them as one work if their work is not named.

An extract and its act, or an act with and without its annexes, have a low Jaccard similarity, but the
longer contains nearly all of the shorter. Containment is estimated from the sketches (``fingerprint``).
Documents shorter than about a thousand words have too small a sketch; the build later compares held-out
documents exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]
Sketches = Callable[[], Iterable[tuple[Ints, Hashes]]]

CONTAINED = 0.5  # share of the smaller sketch that is in the larger one
LEAST = 8  # n-grams: a smaller sketch gives no estimate
FORMULA_DOCUMENTS = 20  # an n-gram in more documents is a formula and is ignored
AT_ONCE = 1 << 25  # n-grams in memory


def contained(rows: Ints, named: npt.NDArray[np.bool_], sketches: Sketches) -> Ints:
    """Pairs of rows, (n, 2), where one document mostly contains the other.

    ``named``: which rows name their work; two such rows are not paired, as their names decide.
    ``sketches`` can be iterated repeatedly and yields indices into ``rows`` with one n-gram each.
    """
    nothing = np.empty((0, 2), dtype=np.int64)
    if named.all():
        return nothing
    total = sum(len(sequences) for _, sequences in sketches())
    # the n-grams in several passes, to limit memory
    ranges = 1 << max(0, (total // AT_ONCE).bit_length())
    sizes = np.zeros(len(rows), dtype=np.int64)
    found, counts = np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64)
    for number in range(ranges):
        places, sequences = _in_range(sketches, number, ranges)
        pairs, more = _shared(places, sequences, sizes, named)
        found, counts = _added(np.concatenate([found, pairs]), np.concatenate([counts, more]))
    left = (found >> np.uint64(32)).astype(np.int64)
    right = (found & np.uint64(0xFFFFFFFF)).astype(np.int64)
    lesser = np.minimum(sizes[left], sizes[right])
    mostly = (lesser >= LEAST) & (counts >= CONTAINED * lesser)
    return np.stack([rows[left[mostly]], rows[right[mostly]]], axis=1)


def _in_range(sketches: Sketches, number: int, ranges: int) -> tuple[Ints, Hashes]:
    places: list[Ints] = [np.empty(0, dtype=np.int64)]
    sequences: list[Hashes] = [np.empty(0, dtype=np.uint64)]
    for some, hashes in sketches():
        here = hashes % np.uint64(ranges) == number
        places.append(some[here])
        sequences.append(hashes[here])
    return np.concatenate(places), np.concatenate(sequences)


def _shared(
    places: Ints, sequences: Hashes, sizes: Ints, named: npt.NDArray[np.bool_]
) -> tuple[Hashes, Ints]:
    """Pairs of indices, packed into 64 bits, with the number of n-grams that they share.

    Adds to ``sizes`` the number of n-grams counted for each index.
    """
    order = np.lexsort((places, sequences))
    places, sequences = places[order], sequences[order]
    begins = np.flatnonzero(np.concatenate([[True], sequences[1:] != sequences[:-1]]))
    many = np.diff(np.append(begins, len(sequences)))
    kept = np.repeat(many <= FORMULA_DOCUMENTS, many) if len(sequences) else np.empty(0, bool)
    places, sequences = places[kept], sequences[kept]
    sizes += np.bincount(places, minlength=len(sizes))
    pairs, counts = np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64)
    for apart in range(1, FORMULA_DOCUMENTS):
        same = sequences[apart:] == sequences[:-apart]
        left, right = places[:-apart][same], places[apart:][same]
        unnamed = ~(named[left] & named[right])
        packed = (left[unnamed].astype(np.uint64) << np.uint64(32)) | right[unnamed].astype(
            np.uint64
        )
        pairs, counts = _added(
            np.concatenate([pairs, packed]),
            np.concatenate([counts, np.ones(len(packed), dtype=np.int64)]),
        )
        if not same.any():
            break
    return pairs, counts


def _added(pairs: Hashes, counts: Ints) -> tuple[Hashes, Ints]:
    """Merge equal pairs and add up their counts."""
    unique, index = np.unique(pairs, return_inverse=True)
    return unique, np.bincount(index, weights=counts, minlength=len(unique)).astype(np.int64)
