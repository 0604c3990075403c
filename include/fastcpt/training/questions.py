"""Questions made from held-out documents, without a person (docs/evaluation.md).

Each has four answers, of which a model chooses the one that it finds likeliest, so that a guess is
right once in four times. A document is asked about:

- ``citation``, ``date``, ``number``: which act, date or number stands here, after what stands before;
- ``title``: which title belongs to this text;
- ``sentence``: which sentence goes on here.

Nothing is asked whose answer could be copied: no answer stands in what is given. Wrong answers are
of the same form, from anywhere in the set, so that form and length tell nothing. What is asked is
drawn by hashes: the same documents give the same questions on every machine.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastcpt.files import hash_of
from fastcpt.intervals import ratio
from fastcpt.training.validation import Document

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

ANSWERS = 4
BEFORE, LEAST_BEFORE, AFTER = 600, 200, 24  # characters given around what is asked
BODY = 800  # characters of the text whose title is asked
TITLE, LEAST_WORDS, HEAD = 400, 5, 12  # characters and words of a title, in these first lines
FIRST_PAGES = 5_000  # characters
SENTENCE = (60, 300)
A_DOCUMENT = 2  # questions of a kind about one document: long acts are not most of a set
READ = 60_000  # characters of a document in which questions are looked for

# In this order: what is part of a citation or a date is no number.
_FORMS = {
    "citation": re.compile(r"(?<![\w/])(?:[A-Z]-)?\d{1,4}/\d{2,4}(?:/[A-Z]{2,8})?(?![\w/])"),
    "date": re.compile(
        r"(?<!\w)\d{1,2}(?:er|st|nd|rd|th|º|\.)? (?:de )?[^\W\d_]{3,10} (?:de )?(?:19|20)\d\d(?!\d)"
        r"|(?<![\d.])\d{1,2}\.\d{1,2}\.(?:19|20)\d\d(?!\d)"
    ),
    "number": re.compile(r"(?<![\w/.,-])\d{2,}(?:[ .,\u00a0\u202f]\d+)*(?![\w/-])"),
}
_ACT = re.compile(r"\d+/\d+|\d{5,}")  # what would be found in both, not understood
_WORD = re.compile(r"[^\W\d_]{2,}")
_END = re.compile(r"(?<=[.;:!?])\s+(?=[^\W\d_a-z]|[(\d])")


class Question(NamedTuple):
    kind: str
    document: str  # id of the document that it is about
    given: list[str]  # a text for each answer: the answer in its place
    alone: list[str]  # what of it says nothing of the answer's place; empty where all are alike
    right: int


def questions_of(documents: Sequence[Document], texts: Sequence[str], most: int) -> list[Question]:
    """At most ``most`` questions of each kind about documents with these texts."""
    asked: list[Question] = []
    about = [(document.id, text[:READ]) for document, text in zip(documents, texts, strict=True)]
    for kind, candidates in _candidates(about).items():
        candidates.sort(key=lambda one: one.order)
        of_document: Counter[str] = Counter()
        for one in candidates:
            if of_document.total() == most:
                break
            if of_document[one.document] == A_DOCUMENT:
                continue
            if question := _question(kind, one, candidates):
                asked.append(question)
                of_document[one.document] += 1
    return asked


class _Candidate(NamedTuple):
    document: str
    answer: str
    form: str  # of a citation, date or number
    before: str
    after: str
    order: int  # drawn from what it is


def _candidates(about: Sequence[tuple[str, str]]) -> dict[str, list[_Candidate]]:
    found: dict[str, list[_Candidate]] = {kind: [] for kind in (*_FORMS, "title", "sentence")}
    places = [
        (document, place)
        for document, text in about
        for place in (*_places(text), *_sentences(text))
    ]
    for document, (kind, answer, before, after) in (*places, *_titles(about)):
        form = _form(answer) if kind in _FORMS else ""
        order = hash_of(kind, document, answer, before[-50:])
        found[kind].append(_Candidate(document, answer, form, before, after, order))
    return found


def _places(text: str) -> Iterator[tuple[str, str, str, str]]:
    taken = np.zeros(len(text), dtype=np.bool_)
    for kind, form in _FORMS.items():
        for match in form.finditer(text):
            begin, end = match.span()
            before = text[max(0, begin - BEFORE) : begin]
            counts = kind == "number" and before.endswith("(")  # the next of (1), (2), (3)
            if not taken[begin:end].any() and len(before) >= LEAST_BEFORE and not counts:
                yield kind, match[0], before, text[end : end + AFTER]
            taken[begin:end] = True


def _titles(about: Sequence[tuple[str, str]]) -> Iterator[tuple[str, tuple[str, str, str, str]]]:
    """The first line of each document that no other one begins with, and the text behind it."""
    heads = {document: [line.strip() for line in _head(text)] for document, text in about}
    often = Counter(line for lines in heads.values() for line in set(lines))
    for document, text in about:
        title = next((line for line in heads[document] if _is_title(line, often)), None)
        if title is None:
            continue
        # publishers print it twice: the text begins behind the last of the first pages
        begin = text.rfind(title, 0, FIRST_PAGES) + len(title)
        body = text[begin:].strip()[:BODY]
        numbered = any(number in body for number in _ACT.findall(title))
        if len(body) >= LEAST_BEFORE and not numbered:
            yield document, ("title", title, "", "\n\n" + body)


def _head(text: str) -> list[str]:
    return text.strip().split("\n", HEAD)[:HEAD]


def _is_title(line: str, often: Mapping[str, int]) -> bool:
    words = [word for word in _WORD.findall(line) if not word.isupper()]  # "COUNCIL DECISION"
    return often[line] == 1 and len(line) <= TITLE and len(words) >= LEAST_WORDS


def _sentences(text: str) -> Iterator[tuple[str, str, str, str]]:
    begin = 0
    for end in [*(match.start() for match in _END.finditer(text)), len(text)]:
        sentence = text[begin:end].strip()
        before = text[max(0, begin - BEFORE) : begin]
        if SENTENCE[0] <= len(sentence) <= SENTENCE[1] and len(before) >= LEAST_BEFORE:
            yield "sentence", sentence, before.rstrip() + " ", ""
        begin = end


def _question(kind: str, one: _Candidate, candidates: Sequence[_Candidate]) -> Question | None:
    """A question about this place, or None where there are no three wrong answers of its form."""
    given = one.before + one.after
    if one.answer in given:
        return None
    wrong: list[str] = []
    begin = one.order % len(candidates)
    for place in range(begin, begin + len(candidates)):
        other = candidates[place % len(candidates)]
        text = other.answer
        if not _alike(kind, one, other) or text in (one.answer, *wrong) or text in given:
            continue
        wrong.append(text)
        if len(wrong) == ANSWERS - 1:
            break
    else:
        return None
    right = one.order // len(candidates) % ANSWERS
    answers = [*wrong[:right], one.answer, *wrong[right:]]
    begins = "\n" if kind == "title" else one.before
    return Question(
        kind,
        one.document,
        [f"{begins}{answer}{one.after}" for answer in answers],
        # a rare title is not held against its text, nor a rare sentence against its place
        [f"\n{answer}" for answer in answers] if kind in ("title", "sentence") else [],
        right,
    )


def _alike(kind: str, one: _Candidate, other: _Candidate) -> bool:
    """Whether the other's answer could stand in this one's place, by its form or its length."""
    if kind in _FORMS:
        return other.form == one.form
    if other.document == one.document:
        return False
    return kind == "title" or 0.7 <= len(other.answer) / len(one.answer) <= 1.4


def _form(answer: str) -> str:
    """``2016/679`` and ``1999/468`` are alike, ``95/46/EC`` is not; months are."""
    return re.sub(r"[^\W\d_]{3,}", "a", re.sub(r"\d", "0", answer))


def texts_of(
    questions: Sequence[Question], tokenize: Callable[[str], Sequence[int]]
) -> list[Document]:
    """The texts whose losses answer the questions, in the order that ``answered`` takes."""
    return [
        Document(
            question.document, np.array(tokenize(text), np.int32), len(text.encode()), None, ()
        )
        for question in questions
        for text in (*question.given, *question.alone)
    ]


def answered(questions: Sequence[Question], losses: Floats) -> Bools:
    """Which questions are answered rightly; of equally likely answers none is chosen.

    ``losses`` are the summed negative log likelihoods of the tokens but the first of each of
    ``texts_of``; the first token is the same for all answers of a question.
    """
    found = iter(losses.tolist())
    right = []
    for question in questions:
        given = np.array([next(found) for _ in question.given])
        alone = np.array([next(found) for _ in question.alone]) if question.alone else 0.0
        scores = given - alone
        chosen = np.flatnonzero(scores == scores.min())
        right.append(chosen.tolist() == [question.right])
    return np.array(right, dtype=np.bool_)


def table_of(
    questions: Sequence[Question], right: Bools, base: Bools | None = None
) -> dict[str, Any]:
    """For each kind and for ``all``: the share of ``right`` answers, and what it is beside the base's.

    ``value``, ``low``, ``high`` (95 %, documents drawn) and the number ``asked``; with a base also
    ``gain``, the same of the difference on the same questions. ``right`` has a digit a question,
    in order, so that another model can be compared later.
    """
    kinds = np.array([question.kind for question in questions])
    documents = np.unique([question.document for question in questions], return_inverse=True)[1]
    table: dict[str, Any] = {}
    for kind in (*dict.fromkeys(kinds.tolist()), "all"):
        its = (kinds == kind) | (kind == "all")
        of = np.unique(documents[its], return_inverse=True)[1]
        asked = np.bincount(of)
        row: dict[str, Any] = {
            "asked": int(its.sum()),
            **ratio(np.bincount(of, right[its]), asked),
        }
        if base is not None:
            row["gain"] = ratio(np.bincount(of, right[its] * 1.0 - base[its]), asked)
        table[kind] = row
    return {"table": table, "right": "".join("01"[one] for one in right.tolist())}


def read_right(table: Mapping[str, Any]) -> Bools:
    """``right`` of an earlier ``table_of``."""
    return np.array([letter == "1" for letter in table["right"]], dtype=np.bool_)
