"""CELEX numbers: which work a document is a version of, and which works a text cites.

A CELEX number is sector, year, type and number: ``32016R0679`` is Regulation 2016/679. Sector 0
holds consolidated versions (``02016R0679-20160504``), a suffix ``R(01)`` marks a corrigendum, ``_SUM``
a judgment's summary. Treaties (sector 1) have articles, protocols or the whole text in place of a
number (``12016E267``, ``12012E/PRO/01``, ``12012P/TXT``). See EUR-Lex, "How CELEX numbers are composed".
The *work* of a document is its base CELEX: the same for all its consolidated versions, corrigenda
and translations, and for all of a treaty.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_END = r"(?:_[A-Z]{3})?(?P<corrigendum>R\(\d+\))?(?:-(?P<version>\d{8}))?$"
_FORMS = [
    re.compile(form + _END, re.ASCII)
    for form in (
        # a treaty, and its article or protocol
        r"^(?P<sector>1)(?P<year>\d{4})(?P<type>[A-Z]{1,2}?)(?P<number>)"
        r"(?P<part>\d[A-Z\d]*(?:\(\d\d\))?|(?:/[A-Z\d]+)+|)",
        r"^0(?P<sector>)(?P<year>\d{4})(?P<type>[A-Z]{1,2})(?P<number>)(?P<part>(?:/[A-Z\d]+)+)",
        # all others; parliamentary questions have six digits
        r"^(?P<sector>[0-9CE])(?P<year>\d{4})(?P<type>[A-Z]{1,2})"
        r"(?P<number>\d{1,6}(?:\(\d\d\))?)(?P<part>)",
        # a national measure that implements a directive: a work of its own
        r"^(?P<sector>7)(?P<year>\d{4})(?P<type>[A-Z])(?P<number>\d{4}[A-Z]{3}(?:_\d+)?)(?P<part>)",
        # the Official Journal, series C: issue and notice
        r"^(?P<sector>C)(?P<year>\d{4})(?P<type>)(?P<number>/\d+[A-Z]?/\d+)(?P<part>)",
        r"^(?P<sector>C)/(?P<year>\d{4})(?P<type>)(?P<number>/\d+)(?P<part>)",
    )
]


class Celex(NamedTuple):
    """``base``: the work. ``version``: date of a consolidated version (yyyymmdd), else 0.

    ``part``: a treaty's article or protocol, else empty.
    """

    base: str
    sector: str
    year: int
    type: str
    version: int
    corrigendum: bool
    part: str = ""


def parse_celex(celex: str | None) -> Celex | None:
    """The parts of a CELEX number; None if ``celex`` is not one."""
    text = re.sub(r"^CELEX[:_ ]\s*", "", (celex or "").strip().upper())
    found = next(filter(None, (form.match(text) for form in _FORMS)), None)
    if not found:
        return None
    # a consolidated version belongs to the act of sector 3 (legislation), or to the treaty
    own = found["sector"] or "1"
    sector = "3" if own == "0" else own
    return Celex(
        base=f"{sector}{found['year']}{found['type']}{found['number']}",
        sector=own,
        year=int(found["year"]),
        type=found["type"],
        version=int(found["version"] or 0),
        corrigendum=bool(found["corrigendum"]),
        part=found["part"],
    )


# "Regulation (EU) 2016/679", "Regulation (EC) No 45/2001", "Directive 95/46/EC",
# "Framework Decision 2008/977/JHA", "DECISION No 1082/2013/EU"
_CITED = re.compile(
    r"(Regulation|Directive|Decision|REGULATION|DIRECTIVE|DECISION)[ \u00a0]"
    r"(?:\((?:EU|EC|EEC|Euratom|EU, Euratom|EC, Euratom|ECSC|CFSP)\)[ \u00a0])?"
    r"((?:No|NO|no)[ \u00a0])?([0-9]{1,4})/([0-9]{1,4})(?![0-9])"
)


def cited_works(text: str) -> set[str]:
    """Base CELEX numbers of the EU acts that a text names by number, each once.

    Acts named only in a list's second place ("Regulations (EC) No 1/2003 and (EC) No 2/2003") or
    by a short name ("the GDPR") are not found.
    """
    return {_cited_celex(*found) for found in set(_CITED.findall(text))} - {""}


def _cited_celex(kind: str, no: str, first: str, second: str) -> str:
    letter = {"regulation": "R", "directive": "L", "decision": "D"}[kind.lower()]
    # "number/year" in regulations until 2014 and after "No", else "year/number"
    number_first = bool(no) or (letter == "R" and not _is_year(first))
    year, number = (second, first) if number_first else (first, second)
    if len(year) == 2:
        year = f"19{year}"
    if len(year) != 4 or not 1950 <= int(year) <= 2100:
        return ""
    return f"3{year}{letter}{int(number):04}"


def _is_year(digits: str) -> bool:
    return len(digits) == 4 and 2015 <= int(digits) <= 2100
