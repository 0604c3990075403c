"""A text as arrays: words, pieces, hashed word n-grams, a MinHash signature.

All functions work on code points in numpy arrays, so a document costs a few passes over memory and no
Python loop over its words (about 60 MB of text per second and core).

*Words* are runs of letters and digits, compared in lower case. *Pieces* come from the first split of a
byte-pair tokenizer: runs of letters, groups of up to three digits, runs of other characters. A text has
about 1.1 tokens per piece; figures and tables have few characters per piece.

The signature is one-permutation MinHash (Li, Owen, Zhang 2012), with empty bins filled by rotation
(Shrivastava, Li 2014). The share of equal entries estimates the Jaccard similarity of two texts' sets of
word 5-grams, with a standard error of at most 1 / (2 sqrt(128)) = 0.044. The sketch keeps the 5-grams
whose hash is divisible by 128; the share of the smaller sketch that is in the larger estimates
containment (FracMinHash; Irber et al. 2022).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

SHINGLE = 5  # words of an n-gram for near-duplicates
OVERLAP = 13  # words of an n-gram that counts as copied (GPT-3's decontamination used 13)
BINS = 128
ONE_SKETCHED_IN = 128
WINDOW = 1 << 22  # characters processed together; each needs about 60 bytes
_BITS_OF_BIN = 7
_NOTHING, _LETTER, _DIGIT, _SIGN = 0, 1, 2, 3
_NEWLINE = 10


class Fingerprint(NamedTuple):
    """``signature``: (128,) uint16. ``running``: characters in lines of running text."""

    signature: npt.NDArray[np.uint16]
    sketch: Hashes  # sorted
    words: int
    pieces: int
    running: int


# 2^64 / golden ratio, and the finaliser of splitmix64: well-spread bits from weak ones
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mixed(values: Hashes) -> Hashes:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def spread(numbers: npt.NDArray[np.int64], seed: int) -> Hashes:
    """Hash numbers to uniform bits: a pseudo-random order for the seed, the same on every machine."""
    turned = numbers.astype(np.uint64) + np.uint64(1)
    return _mixed(turned * _GOLDEN + np.uint64(seed * 0xD6E8FEB86659FD93 % (1 << 64)))


@cache
def _tables() -> tuple[npt.NDArray[np.uint8], Hashes]:
    """Class and hashed lower case of each code point below 65,536; built in 0.1 s."""
    kinds = np.full(65_536, _SIGN, dtype=np.uint8)
    lower = np.arange(65_536, dtype=np.uint64)
    for code in range(65_536):
        sign = chr(code)
        if sign.isspace():
            kinds[code] = _NOTHING
        elif sign.isalpha():
            kinds[code] = _LETTER
        elif sign.isdigit():
            kinds[code] = _DIGIT
        if len(sign.lower()) == 1:
            lower[code] = ord(sign.lower())
    return kinds, _mixed((lower + np.uint64(1)) * _GOLDEN)


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    order = "utf-32-le" if sys.byteorder == "little" else "utf-32-be"
    # legal text has no words beyond the basic plane; map it all to one character
    codes = np.frombuffer(text.encode(order), dtype=np.uint32)
    return np.minimum(codes, np.uint32(0xFFFD))


def _windows(text: str) -> Iterator[str]:
    """Split a text into windows at line ends, or else at spaces, so that no word is split."""
    begin = 0
    while len(text) - begin > WINDOW:
        ends = (text.rfind(sign, begin, begin + WINDOW) + 1 for sign in "\n ")
        end = next(filter(None, ends), begin + WINDOW)
        yield text[begin:end]
        begin = end
    yield text[begin:]


def word_hashes(text: str) -> Hashes:
    """One hash per word, in order; words that differ only in case have equal hashes."""
    kinds, values = _tables()
    codes = map(_code_points, _windows(text))
    return np.concatenate([_word_hashes(values[some], kinds[some]) for some in codes])


def word_spans(text: str) -> npt.NDArray[np.int64]:
    """(words, 2): where each word of ``word_hashes`` begins and ends in the text."""
    begin = 0
    found = [np.empty((0, 2), dtype=np.int64)]
    for window in _windows(text):
        found.append(begin + _word_edges(_tables()[0][_code_points(window)]).reshape(-1, 2))
        begin += len(window)
    return np.concatenate(found)


def _word_edges(kinds: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Start and end of each word, alternating."""
    in_word = (kinds == _LETTER) | (kinds == _DIGIT)
    return np.flatnonzero(np.diff(in_word, prepend=False, append=False))


def _word_hashes(values: Hashes, kinds: npt.NDArray[np.uint8]) -> Hashes:
    edges = _word_edges(kinds)
    starts, ends = edges[::2], edges[1::2]
    if not len(starts):
        return np.empty(0, dtype=np.uint64)
    # a polynomial hash from prefix sums, shifted back to the word's start
    powers = _powers(len(values))
    sums = np.concatenate([[np.uint64(0)], np.cumsum(values * powers[0, : len(values)])])
    return _mixed((sums[ends] - sums[starts]) * powers[1, starts])


_BASE = 0xD6E8FEB86659FD93  # odd, so that it has an inverse modulo 2^64


class _Powers:
    """A cache of powers of the base and its inverse, as long as the longest text so far."""

    table: Hashes = np.ones((2, 1), dtype=np.uint64)


def _powers(length: int) -> Hashes:
    have = _Powers.table.shape[1]
    if have < length:
        size = max(length, 1 << 16)
        steps = np.array([[_BASE], [pow(_BASE, -1, 1 << 64)]], dtype=np.uint64)
        table = np.repeat(steps, size, axis=1)
        table[:, 0] = 1
        _Powers.table = np.cumprod(table, axis=1, dtype=np.uint64)
    return _Powers.table


def ngram_hashes(words: Hashes, length: int) -> Hashes:
    """One hash per n-gram of ``length`` words; a shorter text is one n-gram."""
    if len(words) < length:
        length = max(1, len(words))
    count = len(words) - length + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    total = np.zeros(count, dtype=np.uint64)
    for n in range(length):
        factor = np.uint64(pow(0x9E3779B97F4A7C15, n + 1, 1 << 64))
        total += words[n : n + count] * factor
    return _mixed(total)


def signature_of(ngrams: Hashes) -> npt.NDArray[np.uint16]:
    """MinHash signature, (128,) uint16, of a set of n-grams; all zeros for an empty set."""
    signature = np.zeros(BINS, dtype=np.uint16)
    if not len(ngrams):
        return signature
    ordered = np.sort(ngrams)
    edges = np.arange(BINS, dtype=np.uint64) << np.uint64(64 - _BITS_OF_BIN)
    firsts = np.searchsorted(ordered, edges)
    ends = np.append(firsts[1:], len(ordered))
    full = firsts < ends
    # the low 16 bits of the smallest hash: its high bits are always small
    signature[full] = (ordered[firsts[full]] & np.uint64(0xFFFF)).astype(np.uint16)
    if not full.all():
        # an empty bin takes the entry of the next full one, shifted by the distance
        filled = np.flatnonzero(full)
        empty = np.flatnonzero(~full)
        following = filled[np.searchsorted(filled, empty) % len(filled)]
        distance = (following - empty) % BINS
        shifted = signature[following].astype(np.uint32) + distance.astype(np.uint32) * 40_503
        signature[empty] = (shifted & 0xFFFF).astype(np.uint16)
    return signature


def fingerprint(text: str) -> Fingerprint:
    """All figures of a text in one pass over its code points."""
    class_of, value_of = _tables()
    words: list[Hashes] = []
    pieces = running = 0
    for window in _windows(text):
        codes = _code_points(window)
        kinds = class_of[codes]
        words.append(_word_hashes(value_of[codes], kinds))
        begins = _piece_starts(kinds)
        pieces += int(np.count_nonzero(begins))
        running += _running_characters(codes, begins)
    hashes = np.concatenate(words)
    ngrams = ngram_hashes(hashes, SHINGLE)
    # by bits that the signature does not use
    sketched = (ngrams >> np.uint64(32)) % np.uint64(ONE_SKETCHED_IN) == 0
    return Fingerprint(
        signature=signature_of(ngrams),
        sketch=np.unique(ngrams[sketched]),
        words=len(hashes),
        pieces=pieces,
        running=running,
    )


def pieces_of(text: str) -> int:
    """Pieces of a text, about its tokens divided by 1.1."""
    return int(np.count_nonzero(_piece_starts(_tables()[0][_code_points(text)])))


def _piece_starts(kinds: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    changed = np.diff(kinds, prepend=np.uint8(_NOTHING)) != 0
    starts: npt.NDArray[np.bool_] = changed & (kinds != _NOTHING)
    # long numbers are cut into groups of three digits
    digits = kinds == _DIGIT
    if digits.any():
        places = np.arange(len(kinds))
        begin = np.maximum.accumulate(np.where(changed, places, 0))
        starts |= digits & ((places - begin) % 3 == 0)
    return starts


def _running_characters(codes: npt.NDArray[np.uint32], begins: npt.NDArray[np.bool_]) -> int:
    """Characters in lines with at least three characters per piece.

    Running text has 4 to 5, a cell of figures about 2. Length does not count: a short heading or
    numbered point is running text.
    """
    lines = np.flatnonzero(codes == _NEWLINE)
    starts = np.concatenate([[0], lines + 1])
    starts = starts[starts < len(codes)]
    if not len(starts):
        return 0
    lengths = np.diff(np.append(starts, len(codes)))
    pieces = np.add.reduceat(begins.astype(np.int64), starts)
    return int(lengths[lengths >= 3 * pieces].sum())
