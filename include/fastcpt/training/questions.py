"""Multiple-choice questions generated from held-out documents (docs/evaluation.md).

Each question has four answers; the model chooses the one with the highest likelihood, so guessing is right
one time in four. The kinds:

- ``citation``, ``date``, ``number``: which act, date or number comes next in the text;
- ``title``: which title belongs to a text;
- ``sentence``: which sentence comes next.

No answer can be copied, as none appears in the given text. Wrong answers have the same form and come from
anywhere in the set, so form and length give no hint. Questions are drawn by hashes: the same documents
give the same questions on every machine.
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
from fastcpt.training.validation import HeldOutDocument

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

ANSWERS = 4
BEFORE, LEAST_BEFORE, AFTER = 600, 200, 24  # characters of context before and after the answer
BODY = 800  # characters of text given with a title
TITLE, LEAST_WORDS, HEAD = 400, 5, 12  # most characters and fewest words of a title; lines searched
FIRST_PAGES = 5_000  # characters
SENTENCE = (60, 300)
A_DOCUMENT = 2  # most questions of a kind about one document, so that long acts do not dominate
READ = 60_000  # characters of a document that are searched for questions

# In this order: part of a citation or date is not a number.
_FORMS = {
    "citation": re.compile(r"(?<![\w/])(?:[A-Z]-)?\d{1,4}/\d{2,4}(?:/[A-Z]{2,8})?(?![\w/])"),
    "date": re.compile(
        r"(?<!\w)\d{1,2}(?:er|st|nd|rd|th|º|\.)? (?:de )?[^\W\d_]{3,10} (?:de )?(?:19|20)\d\d(?!\d)"
        r"|(?<![\d.])\d{1,2}\.\d{1,2}\.(?:19|20)\d\d(?!\d)"
    ),
    "number": re.compile(r"(?<![\w/.,-])\d{2,}(?:[ .,\u00a0\u202f]\d+)*(?![\w/-])"),
}
_ACT = re.compile(r"\d+/\d+|\d{5,}")  # a number in both title and text would give the answer away
_WORD = re.compile(r"[^\W\d_]{2,}")
_END = re.compile(r"(?<=[.;:!?])\s+(?=[^\W\d_a-z]|[(\d])")


class Question(NamedTuple):
    kind: str
    document: str  # id of the document that it is about
    given: list[str]  # for each answer, the text with that answer
    alone: list[str]  # for each answer, the answer without context; empty if the forms are alike
    right: int


def questions_of(
    documents: Sequence[HeldOutDocument], texts: Sequence[str], most: int
) -> list[Question]:
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
    order: int  # pseudo-random, from the content


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
            counts = kind == "number" and before.endswith("(")  # an item of (1), (2), (3)
            if not taken[begin:end].any() and len(before) >= LEAST_BEFORE and not counts:
                yield kind, match[0], before, text[end : end + AFTER]
            taken[begin:end] = True


def _titles(about: Sequence[tuple[str, str]]) -> Iterator[tuple[str, tuple[str, str, str, str]]]:
    """For each document its first line that is not in another document's head, and the text after it."""
    heads = {document: [line.strip() for line in _head(text)] for document, text in about}
    often = Counter(line for lines in heads.values() for line in set(lines))
    for document, text in about:
        title = next((line for line in heads[document] if _is_title(line, often)), None)
        if title is None:
            continue
        # publishers print the title twice: the text begins after its last occurrence on the first pages
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
    """A question for this candidate; None if the set has no three wrong answers of the same form."""
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
        # scored relative to the answer alone, so that a rare title or sentence is no disadvantage
        [f"\n{answer}" for answer in answers] if kind in ("title", "sentence") else [],
        right,
    )


def _alike(kind: str, one: _Candidate, other: _Candidate) -> bool:
    """Whether the other's answer could replace this one, by form or length."""
    if kind in _FORMS:
        return other.form == one.form
    if other.document == one.document:
        return False
    return kind == "title" or 0.7 <= len(other.answer) / len(one.answer) <= 1.4


def _form(answer: str) -> str:
    """The form of an answer: ``2016/679`` and ``1999/468`` have the same, ``95/46/EC`` another; months are alike."""
    return re.sub(r"[^\W\d_]{3,}", "a", re.sub(r"\d", "0", answer))


def texts_of(
    questions: Sequence[Question], tokenize: Callable[[str], Sequence[int]]
) -> list[HeldOutDocument]:
    """The texts whose losses answer the questions, in the order that ``answered`` expects."""
    return [
        HeldOutDocument(
            question.document, np.array(tokenize(text), np.int32), len(text.encode()), None, ()
        )
        for question in questions
        for text in (*question.given, *question.alone)
    ]


def answered(questions: Sequence[Question], losses: Floats) -> Bools:
    """Which questions are answered correctly; a tie counts as wrong.

    ``losses``: the summed negative log likelihoods of each of ``texts_of``, without the first token, which
    is the same for all answers of a question.
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
    """For each kind and for ``all``, the share of ``right`` answers, and its gain over the base's.

    Each row has ``value``, ``low``, ``high`` (95 %, bootstrap over documents) and the number ``asked``;
    with a base also ``gain``, the same for the difference on the same questions. ``right`` has one digit
    per question, in order, so that another model can be compared later.
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
    """Read ``right`` of an earlier ``table_of``."""
    return np.array([letter == "1" for letter in table["right"]], dtype=np.bool_)
