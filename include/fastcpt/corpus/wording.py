"""Texts as they are compared: without case, accents and plural s."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache


@lru_cache(maxsize=65_536)
def wording(text: str) -> str:
    """Words in lower case without accents and plural s, separated by one space."""
    words = re.findall(r"[^\W_]+", without_accents(text))
    return " ".join(
        word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word
        for word in words
    )


def without_accents(text: str) -> str:
    """The text in lower case, its letters without accents."""
    plain = unicodedata.normalize("NFKD", text).lower()
    return "".join(c for c in plain if not unicodedata.combining(c))
