"""Citations of EU acts: however they are written, one act is one CELEX number."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcpt.training.citations import check_citations, citations


@pytest.mark.parametrize(
    ("text", "acts"),
    [
        ("Regulation (EU) 2016/679 of 27 April 2016", ["32016R0679"]),
        ("REGULATION (EU) 2016/679", ["32016R0679"]),
        ("Regulation\u00a0(EU)\n2016/679", ["32016R0679"]),
        ("Commission Delegated Regulation (EU) 2019/945", ["32019R0945"]),
        ("Regulation (EC) No 45/2001", ["32001R0045"]),
        ("Regulation (EC) 45/2001", ["32001R0045"]),
        ("Regulation (EU, Euratom) No 966/2012", ["32012R0966"]),
        ("Regulation (Euratom, EC) No 2185/96", ["31996R2185"]),
        ("Council Regulation (EEC) No 2840/72", ["31972R2840"]),
        # both parts can be years: "No" decides
        ("Regulation (EC) No 1999/2001", ["32001R1999"]),
        ("Regulation (EU) 2019/2020", ["32019R2020"]),
        # a slip that cannot be meant: no act is of the year 679
        ("Regulation (EU) No 2016/679", ["32016R0679"]),
        ("Directive 95/46/EC", ["31995L0046"]),
        ("Directive (EU) 2015/2366", ["32015L2366"]),
        ("Directive 2002/58/EC's rules", ["32002L0058"]),
        ("Decision 2010/87/EU", ["32010D0087"]),
        ("Decision No 1082/2013/EU", ["32013D1082"]),
        ("Council Decision No 87/209/EEC", ["31987D0209"]),
        ("Council Decision (CFSP) 2015/1333", ["32015D1333"]),
        ("Council Decision 2010/88/CFSP/JHA", ["32010D0088"]),
        ("Framework Decision 2008/977/JHA", ["32008F0977"]),
        ("Joint Action 96/277/JHA", ["31996F0277"]),
        ("Joint Action 2008/124/CFSP", ["32008E0124"]),
        ("Common position 97/661/JHA", ["31997F0661"]),
        ("Common Position 2005/69/JHA", ["32005E0069"]),
        ("Commission Recommendation 2003/361/EC", ["32003H0361"]),
        ("Case C-131/12 Google Spain", ["62012CJ0131"]),
        ("Case T-201/04", ["62004TJ0201"]),
        ("CELEX 32016R0679.", ["32016R0679"]),
        ("02016R0679-20160504", ["32016R0679"]),
        ("32016R0679R(02)", ["32016R0679"]),
        ("22003A0719(01)", ["22003A0719(01)"]),
        (
            "Regulations (EC) No 1/2003, (EC) No 139/2004 and (EU) 2016/679",
            ["32003R0001", "32004R0139", "32016R0679"],
        ),
        ("Regulations (EEC) Nos 1191/69 and 1107/70", ["31969R1191", "31970R1107"]),
        (
            "Directives 92/50/EEC, 93/36/EEC, and 2014/24/EU or Decision 768/2008/EC",
            ["31992L0050", "31993L0036", "32014L0024", "32008D0768"],
        ),
        ("Directives 89/618/Euratom, 90/641/Euratom", ["31989L0618", "31990L0641"]),
    ],
)
def test_acts_are_found_in_every_way_they_are_written(text: str, acts: list[str]) -> None:
    assert citations(text) == set(acts)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "the General Data Protection Regulation",
        "OJ L 119/1, 4.5.2016",
        "the 2016/2017 season",
        "Article 5 of the Directive",
        "Directive 12/3456/EC",  # no directive is of 1912
        "UNSCR 1325/2000",
        "A32016R0679",
    ],
)
def test_what_is_no_citation_is_none(text: str) -> None:
    assert citations(text) == set()


@given(
    year=st.integers(2015, 2099),
    number=st.integers(1, 9999),
    body=st.sampled_from(["EU", "EU, Euratom"]),
)
def test_words_and_celex_of_a_new_act_are_the_same(year: int, number: int, body: str) -> None:
    celex = f"3{year}R{number:04}"
    assert citations(f"in Regulation ({body}) {year}/{number}, which") == {celex}
    assert citations(celex) == {celex}


@given(st.text(max_size=200))
def test_any_text_can_be_read(text: str) -> None:
    for act in citations(text):
        assert citations(act) == {act}


def test_an_answer_is_right_where_its_reference_cites_the_same_acts() -> None:
    reference = "It repeals Directive 95/46/EC. See Regulation (EU) 2016/679 and Case C-131/12."
    answer = "32016R0679 repeals Directive 95/46/EC and Directive 95/46/EC, not Directive 97/66/EC."
    # three acts, two of them right; a citation that is repeated counts once
    assert check_citations(answer, reference) == (3, 2)
    assert check_citations("It repeals nothing.", reference) == (0, 0)
    assert check_citations(answer, "No act is named.") == (3, 0)


def test_what_the_prompt_names_can_be_left_out() -> None:
    prompt = "Summarise Regulation (EU) 2016/679"
    reference = "Regulation (EU) 2016/679 repeals Directive 95/46/EC."
    answer = "Regulation (EU) 2016/679 repeals Directive 97/66/EC."
    assert check_citations(answer, reference) == (2, 1)
    assert check_citations(answer, reference, given=prompt) == (1, 0)
