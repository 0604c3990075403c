"""Questions made from held-out documents: what is asked, that it cannot be copied, how it is scored."""

from __future__ import annotations

import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcpt.training.questions import (
    A_DOCUMENT,
    ANSWERS,
    Question,
    answered,
    questions_of,
    read_right,
    table_of,
    texts_of,
)
from fastcpt.training.validation import HeldOutDocument

SUBJECTS = ["ships", "honey", "toys", "lifts", "fuels", "seeds", "banks", "trains"]


def act(number: int, subject: str) -> str:
    """An act in the form of EU law, with a title, citations, dates, numbers and sentences."""
    filler = f"Operators who deal in {subject} shall keep what the authority asks them to keep. "
    return (
        "Official Journal of the European Union\n"
        "COUNCIL DECISION OF THE EUROPEAN UNION\n"
        f"on common rules for the trade in {subject} between the Member States\n"
        f"{filler * 4}\nUnder Regulation (EC) No {100 + number}/{2001 + number} the maker of {subject} "
        f"has until {1 + number} March {2005 + number} to pay {3120 + 7 * number} euro. {filler * 3}"
        f"Whoever sells {subject} that are not marked shall take them back at once; "
        f"the authority may {subject} publish the name of the seller of these goods and of its maker. "
    )


ACTS = [(f"act-{n}", act(n, subject)) for n, subject in enumerate(SUBJECTS)]


def documents(texts: list[tuple[str, str]]) -> list[HeldOutDocument]:
    return [HeldOutDocument(name, np.zeros(2, np.int32), 0, None, ()) for name, _ in texts]


def made(texts: list[tuple[str, str]], most: int = 100) -> list[Question]:
    return questions_of(documents(texts), [text for _, text in texts], most)


def test_a_citation_is_asked_for_after_what_stands_before_it() -> None:
    asked = [one for one in made(ACTS) if one.kind == "citation" and one.document == "act-2"]
    (question,) = asked
    right = question.given[question.right]
    assert right.endswith("No 102/2003 the maker of toys has u")
    others = {text.split("No ")[-1].split(" ")[0] for text in question.given}
    assert len(others) == ANSWERS
    assert others < {f"{100 + n}/{2001 + n}" for n in range(8)}
    # nothing but the answer differs
    assert len({text.replace(o, "") for text in question.given for o in others if o in text}) == 1


@pytest.mark.parametrize(
    ("kind", "right"),
    [
        ("date", "3 March 2007"),
        ("number", "3134"),
        ("title", "on common rules for the trade in toys between the Member States"),
    ],
)
def test_dates_numbers_and_titles_are_found(kind: str, right: str) -> None:
    (question,) = [one for one in made(ACTS) if (one.kind, one.document) == (kind, "act-2")]
    assert right in question.given[question.right]
    assert sum(right in text for text in question.given) == 1


def test_what_every_document_begins_with_is_no_title() -> None:
    titles = [one for one in made(ACTS) if one.kind == "title"]
    assert len(titles) == len(ACTS)
    assert not any("Official Journal" in text for one in titles for text in one.given)


def test_a_sentence_is_asked_for_with_sentences_of_others() -> None:
    asked = [one for one in made(ACTS) if one.kind == "sentence"]
    assert asked
    for question in asked:
        subject = SUBJECTS[int(question.document[-1])]
        sentences = [text.rsplit("\n", 1)[-1] for text in question.alone]
        assert [subject in text for text in sentences].count(True) == 1
        assert subject in sentences[question.right]


def test_no_document_is_asked_about_more_than_twice_in_a_kind() -> None:
    long = ("long", "\n".join(text for _, text in ACTS))
    asked = made([*ACTS, long])
    for kind in {one.kind for one in asked}:
        assert sum((one.kind, one.document) == (kind, "long") for one in asked) <= A_DOCUMENT


def test_the_same_documents_give_the_same_questions_in_any_order() -> None:
    assert {one.given[one.right] for one in made(ACTS)} == {
        one.given[one.right] for one in made(ACTS[::-1])
    }


def test_of_each_kind_there_are_no_more_than_wanted() -> None:
    asked = made(ACTS, 3)
    assert {sum(one.kind == kind for one in asked) for kind in {one.kind for one in asked}} == {3}


words = st.text(string.ascii_letters + string.digits + " ./;()\n-éß\u00a0", max_size=1500)


@settings(max_examples=50, deadline=None)
@given(st.lists(words, min_size=1, max_size=6))
def test_whatever_the_documents_are_no_answer_can_be_copied(texts: list[str]) -> None:
    for question in made([*ACTS, *((f"odd-{n}", text) for n, text in enumerate(texts))]):
        assert len(set(question.given)) == ANSWERS
        first, last = (
            question.given[0],
            question.given[1],
        )
        common = 0
        while first[common] == last[common]:
            common += 1
        assert 0 <= question.right < ANSWERS
        assert question.given[question.right][common:] not in first[:common]


def test_who_knows_the_documents_answers_and_who_knows_nothing_guesses() -> None:
    asked = [one for one in made(ACTS) if one.kind in ("citation", "date", "number", "title")]
    texts = texts_of(asked, lambda text: list(text.encode()))
    known = [" ".join(text.split()) for _, text in ACTS]
    # a text that stands in a document as it is costs nothing, any other its letters
    found = [" ".join(bytes(one.input_ids.tolist()).decode().split()) for one in texts]
    losses = [len(text) * (not any(text in one for one in known)) for text in found]
    assert answered(asked, np.array(losses, np.float64)).all()
    assert not answered(asked, np.zeros(len(texts))).any()


def test_a_rare_title_is_not_held_against_its_text() -> None:
    question = Question("title", "d", ["abc", "abcd"], ["x", "xyz"], 1)
    # 4 beside the first title, 3 beside the second
    assert answered([question], np.array([5.0, 7.0, 1.0, 4.0])).tolist() == [True]


def test_the_table_has_shares_and_the_gain_over_the_base() -> None:
    questions = [
        Question(kind, document, [], [], 0)
        for kind in ("date", "number")
        for document in ("a", "a", "b", "c")
    ]
    right = np.array([1, 1, 1, 0, 1, 0, 0, 0], bool)
    base = np.array([1, 0, 0, 0, 1, 0, 0, 0], bool)
    found = table_of(questions, right, base)
    table = found["table"]
    assert [table[kind]["asked"] for kind in ("date", "number", "all")] == [4, 4, 8]
    assert [table[kind]["value"] for kind in ("date", "number", "all")] == [0.75, 0.25, 0.5]
    assert table["date"]["gain"]["value"] == 0.5
    assert table["number"]["gain"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    # documents are drawn with replacement: c alone is never right, b alone always
    assert (table["date"]["low"], table["date"]["high"]) == (0.0, 1.0)
    assert read_right(found).tolist() == right.tolist()
