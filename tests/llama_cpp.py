"""A plain, slow implementation of llama.cpp's rules for a GGUF's byte-level BPE tokenizer.

From its ``llama-vocab.cpp``: special tokens are cut out of the text first, the longest first; what is
left is split by the expressions of ``tokenizer.ggml.pre``, one after another, each within what the
one before left; bytes become letters; the pair of the lowest rank is joined, the leftmost first,
until no pair is a merge; a symbol that is no token yields nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import regex

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
SPLITS = {"smollm": [r"\p{N}", GPT2], "gpt-2": [GPT2]}
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4


def letters() -> dict[int, str]:
    """GPT-2's letter for each byte: itself where it is printable, one from U+0100 on otherwise."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    found = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in found:
            found[byte] = chr(256 + len(found) - len(printable))
    return found


LETTERS = letters()


class LlamaCpp:
    """A tokenizer from a GGUF's ``tokens``, ``token_type``, ``merges`` and ``pre``."""

    def __init__(
        self, tokens: Sequence[str], kinds: Sequence[int], merges: Sequence[str], pre: str
    ) -> None:
        self.ids = {token: n for n, token in enumerate(tokens)}
        self.ranks = {tuple(pair.split(" ")): n for n, pair in enumerate(merges)}
        self.kinds = dict(zip(tokens, kinds, strict=True))
        self.expressions = SPLITS[pre]

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        cut_out = {USER_DEFINED, CONTROL, UNKNOWN} if parse_special else {USER_DEFINED}
        special = [token for token, kind in self.kinds.items() if kind in cut_out]
        parts: list[str | int] = [text]
        for token in sorted(special, key=len, reverse=True):
            parts = [piece for part in parts for piece in _cut(part, token, self.ids[token])]
        found: list[int] = []
        for part in parts:
            found += [part] if isinstance(part, int) else self._ordinary(part)
        return found

    def _ordinary(self, text: str) -> list[int]:
        pieces = [text]
        for expression in self.expressions:
            pieces = [piece for whole in pieces for piece in _split(whole, expression)]
        found = []
        for piece in pieces:
            symbols = _merged([LETTERS[byte] for byte in piece.encode()], self.ranks)
            found += [self.ids[symbol] for symbol in symbols if symbol in self.ids]
        return found


def _cut(part: str | int, token: str, number: int) -> list[str | int]:
    if isinstance(part, int):
        return [part]
    found: list[str | int] = []
    for n, piece in enumerate(part.split(token)):
        found += [number] if n else []
        found += [piece] if piece else []
    return found


def _split(text: str, expression: str) -> list[str]:
    """The matches, and what lies between them."""
    found, end = [], 0
    for match in regex.finditer(expression, text):
        found += [text[end : match.start()], match.group()]
        end = match.end()
    return [piece for piece in [*found, text[end:]] if piece]


def _merged(symbols: list[str], ranks: dict[tuple[str, ...], int]) -> list[str]:
    while True:
        pairs = [ranks.get((a, b)) for a, b in pairwise(symbols)]
        known = [rank for rank in pairs if rank is not None]
        if not known:
            return symbols
        at = pairs.index(min(known))
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
