"""Scores: the published one worked out by hand, the project's own component by component."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from corpus.made import act, record, text_of
from fastcpt.corpus.documents import Document
from fastcpt.corpus.score import (
    areas_of,
    formula_share,
    kind_of_act,
    published_points,
    score_document,
    score_part,
)
from fastcpt.recipe import Recipe
from fastcpt.recipe_score import Score


def document(text: str = "text", **facts: Any) -> Document:
    empty: dict[str, Any] = {
        "position": 0,
        "id": "x",
        "title": "",
        "date": None,
        "doc_type": "",
        "subjects": (),
        "language": None,
        "celex": None,
        "in_force": None,
        "directory_code": None,
    }
    return Document(text=text, **(empty | facts))


@pytest.mark.parametrize(
    ("facts", "length", "year", "points"),
    [
        ({"doc_type": "regulation", "subjects": ("Data protection",)}, 5001, 2020, 250),
        ({"doc_type": "directive", "subjects": ("Consumers", "Environment")}, 2001, 2015, 160),
        ({"doc_type": "decision", "subjects": ("Agriculture",)}, 2000, 2014, 0),
        ({"doc_type": "Regulation", "subjects": ("Digital single market",)}, 5000, 2019, 180),
        ({}, 5001, 0, 40),
    ],
)
def test_published_points(facts: dict[str, Any], length: int, year: int, points: float) -> None:
    found = published_points(document("x" * length, **facts), year)
    assert sum(found.values()) == points


def test_subjects_are_matched_by_whole_words() -> None:
    settings = Score(subjects={"consumer": 1.0, "data protection": 0.8, "art": 0.1})

    def areas(*subjects: str, title: str = "") -> list[str]:
        return areas_of(document(subjects=subjects, title=title), settings)

    assert areas("Consumers") == ["consumer"]
    assert areas("consumerism", "Data of protection", "artefacts") == []
    assert areas(title="on Data Protection in schools") == ["data protection"]
    # the end of one subject and the start of the next are no phrase
    assert areas("Open data", "protection of animals") == []


def test_the_directory_code_names_subjects_too() -> None:
    settings = Score(subjects={"consumer protection": 1.0, "environment": 0.5})
    assert areas_of(document(directory_code="15.20.30.00"), settings) == ["consumer protection"]


@pytest.mark.parametrize(
    ("facts", "value"),
    [
        ({"doc_type": "regulation"}, 1.0),
        ({"doc_type": "regulation", "title": "Commission Implementing Regulation (EU)"}, 0.7),
        ({"doc_type": "decision"}, 0.6),
        ({"doc_type": "poem"}, 0.3),
        ({"celex": "32016L0680"}, 1.0),
        ({"celex": "62014CJ0362"}, 0.8),
        ({"doc_type": "regulation", "celex": "32016R0679R(02)"}, 0.1),
    ],
)
def test_kind_of_act(facts: dict[str, Any], value: float) -> None:
    from fastcpt.corpus.celex import parse_celex

    kinds = Score().kinds
    assert kind_of_act(document(**facts), parse_celex(facts.get("celex")), kinds) == value


def test_another_countrys_kinds_subjects_and_languages() -> None:
    settings = Score(law="luxembourg")
    law = document(doc_type="Loi", language="fr", title="Loi relative à la protection des données")
    decree = document(doc_type="Règlement grand-ducal", language="en")
    rows = [score_document(one, settings) for one in (law, decree)]
    assert [row["score_kind_of_act"] for row in rows] == pytest.approx([1.0, 0.6])
    assert [row["score_subject_matter"] for row in rows] == pytest.approx([1.0, 0.0])
    assert [row["score_language"] for row in rows] == pytest.approx([1.0, 0.0])
    # the recipe's own takes the set's place
    own = Score(law="luxembourg", kinds={"loi": 0.5})
    assert score_document(law, own)["score_kind_of_act"] == pytest.approx(0.5)
    assert own.languages == ["fr", "de", "lb"]


def test_an_unknown_law_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ValueError, match="no set 'ruritania'; there are eu, germany, france"):
        Score(law="ruritania")


def test_components_of_a_document() -> None:
    text = "The controller shall keep records. " * 400  # 2,000 words, 14,000 characters
    row = score_document(
        document(
            text, celex="32016R0679", doc_type="regulation", language="EN", in_force=True,
            subjects=("Consumers",), date="2016-04-27",
        ),
        Score(subjects={"consumer": 0.9}, languages=["en"]),
    )  # fmt: skip
    assert {name: value for name, value in row.items() if name.startswith("score_")} == {
        "score_kind_of_act": 1.0,
        "score_subject_matter": 0.9,
        "score_length": 1.0,
        "score_running_text": 1.0,
        "score_boilerplate": 1.0,
        "score_in_force": 1.0,
        "score_language": 1.0,
    }
    assert (row["work"], row["year"], row["date"]) == ("32016R0679", 2016, 20160427)


def test_length_grows_with_the_logarithm_of_the_words() -> None:
    def length(words: int) -> float:
        row = score_document(document("word " * words), Score())
        return float(row["score_length"])

    assert length(50) == 0.0
    assert length(2000) == 1.0
    assert length(316) == pytest.approx(0.5, abs=0.001)  # sqrt(50 * 2000)


def test_formulas_are_boilerplate() -> None:
    assert formula_share("HAS ADOPTED THIS") == 1.0
    row = score_document(document("Having regard to the Treaty " * 50), Score())
    assert row["score_boilerplate"] == 0.0


def test_an_undated_act_has_its_number_s_year() -> None:
    row = score_document(document(celex="32009R0810"), Score())
    assert (row["year"], row["date"], row["act_year"]) == (2009, 0, 2009)


def test_a_part_is_scored_once(
    documents: Callable[..., Path], recipe_for: Callable[..., Recipe], home: Path
) -> None:
    folder = documents([act(1), act(2), record("bad", "")])
    part = str(folder / "part-00.jsonl")
    first = score_part(part, recipe_for(folder), home)
    assert (first["documents"], first["unreadable"], first["reused"]) == (2, 1, False)
    # weights and thresholds score nothing again, other subjects do
    again = score_part(
        part,
        recipe_for(folder, selection__quality_threshold=80.0, score__weights={"recency": 1.0}),
        home,
    )
    assert again["reused"]
    assert again["digest"] == first["digest"]
    other = score_part(part, recipe_for(folder, score__subjects={"fish": 1.0}), home)
    assert not other["reused"]


def test_a_killed_scoring_leaves_nothing_that_counts(
    documents: Callable[..., Path], recipe_for: Callable[..., Recipe], home: Path
) -> None:
    folder = documents([act(1), act(2)])
    part = str(folder / "part-00.jsonl")
    first = score_part(part, recipe_for(folder), home)
    # what a kill before the manifest leaves behind
    (Path(first["path"]) / "manifest.json").unlink()
    (Path(first["path"]) / "scores.parquet").write_bytes(b"half")
    again = score_part(part, recipe_for(folder), home)
    assert not again["reused"]
    assert pq.read_table(Path(again["path"]) / "scores.parquet")["id"].to_pylist() == [
        "32020R0001",
        "32020R0002",
    ]


def test_an_excerpt_is_part_of_its_text() -> None:
    for number in range(60):
        text = text_of(number, 1000)
        row = score_document(document(text, id=f"d{number}"), Score())
        assert row["excerpt"] is None or row["excerpt"] in text


def test_progress_counts_the_bytes_of_every_format(tmp_path: Path) -> None:
    from fastcpt.corpus.documents import list_parts, read_documents, size_of
    from fastcpt.corpus.sample import generate_sample
    from fastcpt.progress import Progress
    from fastcpt.recipe_sections import Documents, Fields

    generate_sample(tmp_path, documents=40)
    for part in list_parts(Documents(path=str(tmp_path / "parsed"))):
        progress = Progress("read", "bytes", size_of(part))
        assert list(read_documents(part, Fields(), progress))
        assert progress.done == pytest.approx(progress.total)
        assert progress.total == Path(part).stat().st_size
