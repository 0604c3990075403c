"""Words, pieces and similarity."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpus.made import text_of
from fastcpt.corpus import fingerprint as fingerprint_module
from fastcpt.corpus.fingerprint import (
    fingerprint,
    ngram_hashes,
    pieces_of,
    word_hashes,
    word_spans,
)


@given(st.text(alphabet="aAéß1 .,\n’漢\U0001f600", max_size=60))
def test_words_are_runs_of_letters_and_digits_in_lower_case(text: str) -> None:
    words = "".join(c.lower() if c.isalnum() else " " for c in text).split()
    hashes = word_hashes(text)
    assert len(hashes) == len(words)
    # equal words have equal hashes wherever they stand, others do not
    assert len(np.unique(hashes)) == len(set(words))
    alone = [int(word_hashes(word)[0]) for word in words]
    assert hashes.tolist() == alone


@pytest.mark.parametrize(
    ("text", "pieces"),
    [("", 0), ("Article 5", 2), ("1234567", 3), ("a, b.", 4), ("x  y\n\nz", 3)],
)
def test_pieces_are_words_groups_of_three_digits_and_signs(text: str, pieces: int) -> None:
    assert pieces_of(text) == pieces


def test_running_text_is_told_from_figures() -> None:
    prose = "The controller shall keep records of the processing.\n"
    table = "1,5\n|\n2,7\n"
    assert fingerprint(prose * 10).running == 530
    assert fingerprint(table * 10).running == 0
    assert fingerprint("Article 5\n").running == 10


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_the_signature_estimates_jaccard_similarity(share: float) -> None:
    rng = random.Random(1)
    common = [f"w{rng.random()}" for _ in range(int(4000 * share))]
    texts = [
        " ".join(common + [f"u{rng.random()}" for _ in range(4000 - len(common))]) for _ in range(2)
    ]
    sets = [set(ngram_hashes(word_hashes(text), 5).tolist()) for text in texts]
    exact = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    one, other = (fingerprint(text).signature for text in texts)
    assert abs(float((one == other).mean()) - exact) < 0.13  # three standard errors


def test_short_and_empty_texts_have_signatures() -> None:
    assert fingerprint("... !").words == 0
    one, other = fingerprint("one two").signature, fingerprint("one three").signature
    assert (one == fingerprint("One TWO!").signature).all()
    assert (one == other).mean() < 0.1


def test_long_texts_are_looked_at_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [text_of(n, 3 + n % 40) + ("," if n % 3 else " 12 345 678\n\n") for n in range(300)]
    text = "\n".join(lines)
    whole, words, spans = fingerprint(text), word_hashes(text), word_spans(text)
    assert [text[begin:end] for begin, end in spans[:3].tolist()] == text.split()[:3]
    monkeypatch.setattr(fingerprint_module, "WINDOW", 1000)
    assert word_hashes(text).tolist() == words.tolist()
    assert word_spans(text).tolist() == spans.tolist()
    for one, other in zip(fingerprint(text), whole, strict=True):
        assert np.array_equal(one, other)
    # a line that is longer than a window is cut between words
    monkeypatch.setattr(fingerprint_module, "WINDOW", 50)
    assert word_hashes(text).tolist() == words.tolist()
