"""Which acts texts and titles name: the patterns of each country's law, and a recipe's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.made import Record, record, text_of
from fastcpt.corpus.documents import list_parts
from fastcpt.corpus.named_acts import amended, cited, own_names
from fastcpt.corpus.score import score_parts
from fastcpt.corpus.select import select
from fastcpt.recipe import Recipe
from fastcpt.recipe_score import Score, law_sets

Writer = Callable[..., Path]
Recipes = Callable[..., Recipe]
Scored = Callable[[list[Record]], dict[str, Record]]

NAMES = [
    ("luxembourg", "Loi du 2 août 2002 relative à la protection", "la loi modifiée du 2 août 2002"),
    ("luxembourg", "Règlement grand-ducal du 1er mars 1999", "le règlement grand-ducal du 1er mars 1999,"),
    ("france", "LOI n° 78-17 du 6 janvier 1978 relative", "de la loi no 78-17 du 6 janvier 1978"),
    ("france", "Décret n°2005-1309 du 20 octobre 2005", "au décret n° 2005-1309"),
    ("france", "Code de la propriété intellectuelle", "L. 122-5 du code de la propriété intellectuelle"),
    ("germany", "Bundesdatenschutzgesetz (BDSG)", "nach § 26 Abs. 1 Satz 2 BDSG gilt"),
    ("germany", "Urheberrecht (Urheberrechtsgesetz - UrhG)", "die §§ 31 UrhG"),
    ("germany", "Gesetz über die Post vom 5. Mai 1980", "des Gesetzes vom 5. Mai 1980"),
    ("spain", "Ley Orgánica 3/2018, de 5 de diciembre", "la Ley Orgánica 3/2018"),
    ("spain", "Real Decreto-ley 5/2023, de 28 de junio", "el Real Decreto-ley 5/2023"),
    ("italy", "DECRETO LEGISLATIVO 30 giugno 2003, n. 196", "ai sensi del d.lgs. n. 196/2003"),
    ("italy", "Legge 7 agosto 1990, n. 241", "della legge 7 agosto 1990, n. 241"),
    ("uk", "Data Protection Act 1998", "under section 5 of the Data Protection Act 1998"),
    ("uk", "The Privacy and Communications (EC) Regulations 2003", "see The Privacy and Communications (EC) Regulations 2003"),
    ("us", "Public Law 104-191", "as amended by Pub. L. 104-191"),
    ("us", "15 U.S.C. 1681 Congressional findings", "under 15 USC § 1681"),
    ("us", "45 CFR 164 Security and privacy", "in 45 C.F.R. part 164"),
]  # fmt: skip


@pytest.mark.parametrize(("law", "title", "text"), NAMES)
def test_an_act_is_cited_by_the_name_in_its_title(law: str, title: str, text: str) -> None:
    score = Score(law=law)
    assert own_names(title, score)
    assert own_names(title, score) <= cited(text, score)
    # and by no other act's
    others = [other for other in NAMES if other[0] == law and other[1] != title]
    assert not any(own_names(title, score) & cited(other[2], score) for other in others)


def test_a_title_names_its_own_act_where_it_begins() -> None:
    score = Score(law="luxembourg")
    title = "# Règlement grand-ducal du 31 octobre 2008 modifiant la loi du 18 décembre 2007"
    assert own_names(title, score) == cited("le règlement grand-ducal du 31 octobre 2008", score)
    assert amended(title, score) == cited("la loi du 18 décembre 2007", score)
    assert not amended("Loi du 18 décembre 2007 relative aux postes", score)


def test_a_title_of_the_eu_says_which_act_it_amends() -> None:
    title = "Regulation (EU) 2018/2 amending Regulation (EU) 2016/679 and Directive 95/46/EC"
    score = Score()
    assert amended(title, score) == cited("Regulation (EU) 2016/679, Directive 95/46/EC", score)


@pytest.mark.parametrize("law", sorted(law_sets()))
@given(text=st.text("AaB bé12§/.°-’()\n", max_size=400))
@settings(max_examples=60, deadline=2000)
def test_no_text_makes_a_search_slow_or_fail(law: str, text: str) -> None:
    cited(text * 20, Score(law=law))


@pytest.mark.parametrize(
    ("pattern", "why"),
    [("(loi", "not a regular expression: "), (r"loi \d+", "has no named group to identify an act")],
)
def test_a_pattern_that_identifies_nothing_is_refused(pattern: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Score(cited_by=[pattern])


# What it does to the score


def law(day: int, year: int, about: str, *, more: str = "") -> Record:
    title = f"Loi du {day} août {year} {about}"
    return record(
        f"loi-{day}-{year}-{about}",
        f"{text_of(day * 10_000 + year, 120)} {more}",
        **{"title": title, "doc_type": "loi", "language": "fr", "date": f"{year}-08-{day:02}"},
    )  # fmt: skip


@pytest.fixture
def scored(documents: Writer, recipe_for: Recipes, home: Path) -> Scored:
    def run(records: list[Record]) -> dict[str, Record]:
        recipe = recipe_for(documents(records), score__law="luxembourg")
        parts = score_parts(list_parts(recipe.documents), recipe, home, 1)
        found = select([part["path"] for part in parts], recipe, home)
        rows = pq.read_table(Path(found["path"]) / "documents.parquet").to_pylist()
        return {row["id"]: row for row in rows}

    return run


def test_an_act_that_others_cite_by_its_date_gains(scored: Scored) -> None:
    citing = [law(n, 2010, "sur x", more="vu la loi du 1er août 1990") for n in range(11, 21)]
    twins = [law(2, 1990, "sur le bruit"), law(2, 1990, "sur la chasse")]
    unclear = [law(n, 2011, "sur y", more="vu la loi du 2 août 1990") for n in range(11, 21)]
    found = scored([law(1, 1990, "sur les eaux"), *twins, *citing, *unclear])
    assert found["loi-1-1990-sur les eaux"]["citations"] == 1.0
    # which of two acts of one day is meant is not known
    assert {found[one["id"]]["citations"] for one in twins} == {0.0}


def test_an_old_law_that_was_amended_lately_is_as_recent_as_the_act_that_amended_it(
    scored: Scored,
) -> None:
    others = [law(n, 2024, "sur x") for n in range(11, 21)]
    amending = law(5, 2009, "modifiant la loi du 1er août 1976")
    found = scored([law(1, 1976, "sur le bruit"), law(3, 1976, "sur x"), amending, *others])
    # half each 15 years before the newest
    assert found["loi-1-1976-sur le bruit"]["recency"] == pytest.approx(0.5)
    assert found["loi-3-1976-sur x"]["recency"] == pytest.approx(0.5 ** (48 / 15))


def test_a_consolidated_version_is_as_recent_as_its_date(scored: Scored) -> None:
    celex = {"celex": "02001R0045-20180501", "date": "2001-01-12", "doc_type": "regulation"}
    newest = [law(n, 2018, "sur x") for n in range(11, 22)]
    found = scored([record("c", text_of(7, 120), **celex), *newest])
    assert found["c"]["recency"] == 1.0
