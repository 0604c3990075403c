"""EU acts that a text cites, as CELEX numbers, and how many of an answer's citations are right.

A citation is either a CELEX number itself (``32016R0679``, ``62012CJ0131``; consolidated versions
``02016R0679-20160504`` count as their act) or an act's or case's number in words: ``Regulation (EU)
2016/679``, ``Directive 95/46/EC``, ``Council Regulation (EC) No 1/2003``, ``Directives 2001/83/EC
and 2004/27/EC``, ``Framework Decision 2008/977/JHA``, ``Case C-131/12``. All become base CELEX
numbers, so that the same act named in two ways is one citation. docs/evaluation.md gives the rules
in full.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_CELEX = re.compile(
    r"(?<![\w/])(?P<sector>[0-9CE])(?P<year>(?:19|20)\d\d)(?P<type>[A-Z]{1,2})(?P<number>\d{4})"
    r"(?P<part>\(\d\d\))?(?:R\(\d\d\))?(?:-\d{8})?(?!\w)"
)

# A kind of act, and its letter in CELEX.
_LETTER = {
    "framework decision": "F",
    "joint action": "E",
    "common position": "E",
    "regulation": "R",
    "directive": "L",
    "decision": "D",
    "recommendation": "H",
}
# One number of an act, with what may stand around it: "(EU, Euratom) No 966/2012", "2010/88/CFSP".
_BODY = r"(?:EU|EC|EEC|ECSC|CFSP|JHA|Euratom)\b"
_NUMBER = (
    rf"(?:\(?{_BODY}(?:, ?{_BODY})*\)? ?)?(?:Nos?\.? ?)?"
    rf"\d{{1,4}}/\d{{1,4}}(?:/[A-Z]{{2,8}}\b)*(?:, Euratom\b)?"
)
_ACTS = re.compile(
    rf"\b(?P<kind>{'|'.join(_LETTER)})s? (?P<numbers>{_NUMBER}"
    rf"(?:(?:, | and |, and | or |, or ){_NUMBER})*)(?![\d/])",
    re.IGNORECASE,
)
_ONE = re.compile(
    r"(?P<no>Nos?\.? ?)?(?P<first>\d{1,4})/(?P<second>\d{1,4})(?P<bodies>(?:/[A-Z]+)*)",
    re.IGNORECASE,
)
_CASE = re.compile(r"\b(?P<court>[CTF])[-\u2010\u2011\u2013 ](?P<number>\d{1,4})/(?P<year>\d\d)\b")
_COURT = {"C": "CJ", "T": "TJ", "F": "FJ"}  # judgments of the Court, General Court, Civil Service


def citations(text: str) -> set[str]:
    """The base CELEX numbers of the acts and judgments that ``text`` cites."""
    text = re.sub(r"\s+", " ", text)  # also no-break spaces and line ends
    found = {_base(match) for match in _CELEX.finditer(text)}
    for acts in _ACTS.finditer(text):
        kind = _LETTER[acts["kind"].lower()]
        for one in _ONE.finditer(acts["numbers"]):
            # joint actions on police and justice before 1999 have the letter of framework decisions
            justice = kind == "E" and len(one["first"]) == 2 and "JHA" in one["bodies"].upper()
            letter = "F" if justice else kind
            found.add(_act(letter, bool(one["no"]), one["first"], one["second"]))
    for case in _CASE.finditer(text):
        year = int(case["year"])
        century = 1900 if year >= 50 else 2000
        found.add(f"6{century + year}{_COURT[case['court']]}{int(case['number']):04}")
    return found - {""}


def _base(match: re.Match[str]) -> str:
    # sector 0 holds consolidated versions of the acts of sector 3
    sector = "3" if match["sector"] == "0" else match["sector"]
    return f"{sector}{match['year']}{match['type']}{match['number']}{match['part'] or ''}"


def _act(letter: str, no: bool, first: str, second: str) -> str:
    """The CELEX number of "first/second"; empty if neither part can be a year.

    Since 2015 every act is year/number. Before, regulations and anything after "No" were number/year,
    directives and others year/number, with two-digit years until 1998. If the part that should be the
    year cannot be one, the other part is: "Decision No 87/209/EEC" is of 1987.
    """
    years = (_year(first), _year(second))
    number_first = no or (letter == "R" and not (len(first) == 4 and 2015 <= int(first) < 2100))
    if letter == "L":
        number_first = False
    if years[number_first] is None:
        number_first = not number_first
    year, number = years[number_first], (first if number_first else second)
    return "" if year is None else f"3{year}{letter}{int(number):04}"


def _year(digits: str) -> int | None:
    """The year written with two (until 1999) or four digits; None if it cannot be a year."""
    year = int(digits) + (1900 if len(digits) == 2 else 0)
    return year if 1952 <= year < 2100 else None


class CheckedCitations(NamedTuple):
    """Citations of one answer: how many there are, and how many of them are right."""

    counted: int
    right: int


def check_citations(answer: str, reference: str, given: str = "") -> CheckedCitations:
    """Check an answer's citations, each counted once, against those of the reference answer.

    Citations in the text ``given`` (the prompt) are left out: repeating them takes no knowledge.
    """
    named = citations(answer) - citations(given)
    return CheckedCitations(len(named), len(named & citations(reference)))
