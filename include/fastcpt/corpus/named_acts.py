"""Acts as texts and titles name them: which acts a document cites, which it amends, and its own name.

EU acts are found by their numbers (``celex``). Acts of other laws are found by the patterns of ``score.cited_by``
and ``score.named_by``. The named groups of a match identify the act, in the order of their names, as words
without case and accents: "Loi no 78-17" and "la loi n° 78-17 du 6 janvier 1978" are both ``loi 78 17``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from fastcpt.corpus.celex import cited_works
from fastcpt.corpus.wording import wording
from fastcpt.files import hash_of
from fastcpt.recipe_score import Score


def own_names(title: str, settings: Score) -> set[int]:
    """Hashes of the names by which others cite the document with this title."""
    if settings.named_by:
        return _named(title, settings.named_by)
    begins = re.sub(r"^\W+", "", title)
    found = (pattern.match(begins) for pattern in _compiled(tuple(settings.cited_by)))
    return {_identity(match) for match in found if match}


def cited(text: str, settings: Score) -> set[int]:
    """Hashes of the works and names of the acts that a text cites."""
    return {hash_of(base) for base in cited_works(text)} | _named(text, settings.cited_by)


def amended(title: str, settings: Score) -> set[int]:
    """Hashes of the works and names of the acts that a title says it amends."""
    lower = title.lower()
    places = [lower.find(words.lower()) for words in settings.amending]
    begin = min((place for place in places if place >= 0), default=len(title))
    return cited(title[begin:], settings)


def _named(text: str, patterns: Sequence[str]) -> set[int]:
    found = (pattern.finditer(text) for pattern in _compiled(tuple(patterns)))
    return {_identity(match) for matches in found for match in matches}


@lru_cache(maxsize=32)
def _compiled(patterns: tuple[str, ...]) -> list[re.Pattern[str]]:
    return [re.compile(pattern, re.IGNORECASE) for pattern in patterns]


def _identity(match: re.Match[str]) -> int:
    groups = sorted(match.groupdict(default="").items())
    return hash_of("act", " ".join(wording(value) for _, value in groups))
