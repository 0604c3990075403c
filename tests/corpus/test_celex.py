"""Works and the acts a text cites."""

from __future__ import annotations

import pytest

from fastcpt.corpus.celex import cited_works, parse_celex


@pytest.mark.parametrize(
    ("celex", "base", "year", "version", "corrigendum"),
    [
        ("32016R0679", "32016R0679", 2016, 0, False),
        ("02016R0679-20160504", "32016R0679", 2016, 20160504, False),
        ("32016R0679R(02)", "32016R0679", 2016, 0, True),
        ("21972A0722(03)", "21972A0722(03)", 1972, 0, False),
        ("62014CJ0362", "62014CJ0362", 2014, 0, False),
    ],
)
def test_a_number_says_which_work(
    celex: str, base: str, year: int, version: int, corrigendum: bool
) -> None:
    found = parse_celex(celex)
    assert found is not None
    assert (found.base, found.year, found.version, found.corrigendum) == (
        base,
        year,
        version,
        corrigendum,
    )


@pytest.mark.parametrize(
    ("celex", "base", "part"),
    [
        ("12012P/TXT", "12012P", "/TXT"),
        ("12016ME/TXT", "12016ME", "/TXT"),
        ("12016E267", "12016E", "267"),
        ("12012E/PRO/02", "12012E", "/PRO/02"),
        ("12007L/AFI/DCL/A1", "12007L", "/AFI/DCL/A1"),
        ("11957E", "11957E", ""),
        ("11992M/AFI/DCL", "11992M", "/AFI/DCL"),
        ("02016M/TXT-20200301", "12016M", "/TXT"),
        ("12016P047", "12016P", "047"),
        ("62014CJ0362_SUM", "62014CJ0362", ""),
        ("62014CJ0362_RES", "62014CJ0362", ""),
        ("91997E002334", "91997E002334", ""),
        ("52012DC0010(01)", "52012DC0010(01)", ""),
        ("E2019C0305(01)", "E2019C0305(01)", ""),
        ("72016L0680DEU_202001234", "72016L0680DEU_202001234", ""),
        ("C2008/115/01", "C2008/115/01", ""),
        ("C/2024/01234", "C2024/01234", ""),
        ("CELEX:32016R0679", "32016R0679", ""),
        ("celex:02016R0679-20160504", "32016R0679", ""),
    ],
)
def test_every_form_of_number(celex: str, base: str, part: str) -> None:
    found = parse_celex(celex)
    assert found is not None
    assert (found.base, found.part) == (base, part)
    assert found.year == int(base[1:5])


@pytest.mark.parametrize(
    "text", ["", "contract 7", "12016E and more", "1-2-3", "١٢٣٤٥R٠٦٧٩", "copy-of-32016R0679", None]
)
def test_what_is_no_number(text: str | None) -> None:
    assert parse_celex(text) is None


@pytest.mark.parametrize(
    ("text", "works"),
    [
        ("Regulation (EU) 2016/679 of", {"32016R0679"}),
        ("Regulation (EC) No 45/2001,", {"32001R0045"}),
        ("Council Regulation (EEC) No 2913/92 of", {"31992R2913"}),
        ("DIRECTIVE 95/46/EC", {"31995L0046"}),
        ("Directive (EU) 2015/1535", {"32015L1535"}),
        ("Framework Decision 2008/977/JHA", {"32008D0977"}),
        ("Decision No 1082/2013/EU", {"32013D1082"}),
        ("Directive 95/46/EC and again Directive 95/46/EC", {"31995L0046"}),
        ("Article 12/2000, page 95/46, Regulations are", set()),
    ],
)
def test_citations_are_found_in_every_form_of_number(text: str, works: set[str]) -> None:
    assert cited_works(text) == works
