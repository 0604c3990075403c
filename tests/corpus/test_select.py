"""Selection: every reason, exact budgets, splits by work, and the same outcome in any order."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corpus.made import Record, act, record, text_of
from fastcpt.corpus.budget import take_within
from fastcpt.corpus.documents import DocumentsError
from fastcpt.corpus.explain import UnknownDocumentError, ends_of_ranking, explain
from fastcpt.corpus.funnel import funnel_table
from fastcpt.corpus.select import SelectionError, select
from fastcpt.corpus.tokenizer import TokenizerError
from fastcpt.recipe import Recipe

Scores = Callable[[Recipe], list[str]]
Recipes = Callable[..., Recipe]
Writer = Callable[..., Path]


@pytest.fixture
def outcome(
    documents: Writer, recipe_for: Recipes, scores: Scores, home: Path
) -> Callable[..., dict[str, dict[str, Any]]]:
    """Selects records with settings; rows by id (the last of an id that comes twice)."""

    def run(records: list[Record], **choice: Any) -> dict[str, dict[str, Any]]:
        recipe = recipe_for(documents(records), **choice)
        result = select(scores(recipe), recipe, home)
        return {row["id"]: row for row in rows_of(result)}

    return run


def rows_of(selection: dict[str, Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(
        Path(selection["path"]) / "documents.parquet"
    ).to_pylist()
    return rows


def acts(count: int, **facts: Any) -> list[Record]:
    return [act(number, **facts) for number in range(1, count + 1)]


# Duplicates


def test_the_newest_version_of_an_act_stands_for_it(outcome: Any) -> None:
    versions = [
        record(celex, text_of(n, 200), celex=celex)
        for n, celex in enumerate(
            ["32010R0001", "02010R0001-20150101", "02010R0001-20190101", "32010R0001R(01)"]
        )
    ]
    found = outcome([*acts(20), *versions])
    assert found["32010R0001"]["reason"] == "older_version"
    assert found["02010R0001-20150101"]["reason"] == "older_version"
    assert found["32010R0001"]["duplicate_of"] == "02010R0001-20190101"
    assert found["02010R0001-20190101"]["reason"] is None
    # a corrigendum is no version, but of the same work
    assert found["32010R0001R(01)"]["reason"] is None
    assert found["32010R0001R(01)"]["split"] == found["02010R0001-20190101"]["split"]


def test_translations_are_no_versions_but_one_work(outcome: Any) -> None:
    german = record("de-1", text_of(900, 200), celex="32020R0001", language="de")
    found = outcome([*acts(20), german])
    assert found["de-1"]["reason"] is None
    assert found["de-1"]["split"] == found["32020R0001"]["split"]


def test_equal_and_nearly_equal_texts(outcome: Any) -> None:
    text = text_of(77, 400)
    copies = [
        record("a", text, date="2019-01-01"),
        record("b", text, date="2021-01-01"),
        # one word of 400 changed: 395 of 401 sequences are shared
        record("c", " ".join([*text.split()[:200], "changed", *text.split()[201:]])),
        # half of the text is its own
        record("d", " ".join([*text.split()[:200], *text_of(78, 200).split()])),
    ]
    found = outcome([*acts(20), *copies])
    assert found["a"]["reason"] == "exact_duplicate"
    assert found["c"]["reason"] == "near_duplicate"
    assert found["c"]["duplicate_of"] == found["a"]["duplicate_of"] == "b"
    assert found["b"]["reason"] is found["d"]["reason"] is None


def test_the_near_duplicate_threshold_is_the_recipe_s(outcome: Any) -> None:
    text = text_of(77, 1000).split()
    one = record("a", " ".join(text))
    # 100 of 1,000 words at the end replaced: Jaccard 896 / 1096 = 0.82
    other = record("b", " ".join([*text[:900], *text_of(78, 100).split()]))
    loose = outcome([*acts(20), one, other], selection__near_duplicate_threshold=0.6)
    assert {loose["a"]["reason"], loose["b"]["reason"]} == {"near_duplicate", None}
    strict = outcome([*acts(20), one, other], selection__near_duplicate_threshold=0.95)
    assert strict["a"]["reason"] is strict["b"]["reason"] is None


def test_a_document_whose_content_changed_replaces_its_old_self(
    documents: Writer, recipe_for: Recipes, scores: Scores, home: Path
) -> None:
    documents(acts(20), "part-00.jsonl")
    changed = record("32020R0003", text_of(4711), celex="32020R0003", date="2020-05-01")
    recipe = recipe_for(documents([changed], "part-01.jsonl"))
    rows = [
        row for row in rows_of(select(scores(recipe), recipe, home)) if row["id"] == changed["id"]
    ]
    assert [row["reason"] for row in rows] == ["superseded", None]


# Wishes of the recipe


def test_each_wish_has_its_reason(outcome: Any) -> None:
    records = [
        *acts(20, subject_matter=["Consumers"]),
        act(30, words=5, subject_matter=["Consumers"]),
        act(31, year=1999, subject_matter=["Consumers"]),
        act(32, doc_type="decision", subject_matter=["Consumers"]),
        act(33, subject_matter=["Consumerism"]),
        act(34, doc_type="Framework decision", subject_matter=["Consumers"]),
    ]
    found = outcome(
        records,
        selection__min_characters=100,
        selection__min_year=2015,
        selection__doc_types=["Regulation", "framework-decision"],
        selection__subjects=["consumer"],
    )
    reasons = {name: row["reason"] for name, row in found.items() if row["reason"]}
    assert reasons == {
        "32020R0030": "too_short",
        "31999R0031": "too_old",
        "32020R0032": "other_kind",
        "32020R0033": "other_subject",
    }


def test_the_threshold_is_inclusive(outcome: Any) -> None:
    found = outcome(acts(12), score__method="published", selection__quality_threshold=180.0)
    assert {row["reason"] for row in found.values()} == {None}  # 100 + 80 points exactly
    with pytest.raises(SelectionError, match=r"of 12 documents 12 below_threshold .*180\.0"):
        outcome(acts(12), score__method="published", selection__quality_threshold=180.5)


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(0, 400))
@settings(max_examples=300)
def test_a_budget_is_exact_to_one_document(sizes: list[int], budget: int) -> None:
    taken = take_within(np.array(sizes, dtype=np.int64), budget)
    left = budget
    for size, is_taken in zip(sizes, taken.tolist(), strict=True):
        # the first that does not fit ends nothing: later, smaller ones are still taken
        assert is_taken == (size <= left)
        left -= size if is_taken else 0


def test_a_share_of_the_corpus_s_tokens(outcome: Any) -> None:
    # equal lengths: a quarter of the tokens is a quarter of the documents, the newest ones
    records = [act(n, year=1990 + n % 30, words=100) for n in range(1, 121)]
    found = outcome(records, selection__top_share=0.25)
    taken = [row for row in found.values() if row["reason"] is None]
    assert 28 <= len(taken) <= 32
    assert {row["reason"] for row in found.values()} == {None, "outside_top_share"}
    worst = min(row["score"] for row in taken)
    assert all(row["score"] <= worst for row in found.values() if row["reason"])


@given(
    st.one_of(st.none(), st.floats(20, 60)),
    st.one_of(st.none(), st.floats(0.05, 1.0)),
    st.one_of(st.none(), st.integers(2_000, 20_000)),
)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_threshold_share_and_budget_alone_and_together(
    scores: Scores,
    recipe_for: Recipes,
    documents: Writer,
    home: Path,
    threshold: float | None,
    share: float | None,
    budget: int | None,
) -> None:
    """Each is taken from what the one before left, to the document, as counted one by one."""
    rng = random.Random(0)
    records = [act(n, year=1990 + n % 30, words=rng.randint(20, 300)) for n in range(1, 81)]
    recipe = recipe_for(
        documents(records),
        selection__quality_threshold=threshold,
        selection__top_share=share,
        selection__target_tokens=budget,
    )
    tables = scores(recipe)
    try:
        rows = rows_of(select(tables, recipe, home))
    except SelectionError:
        return
    pieces = pq.read_table(Path(tables[0]) / "scores.parquet")["pieces"].to_pylist()
    left_of_share = int(sum(pieces) * (1 if share is None else share))
    left_of_budget = 10**9 if budget is None else budget
    for row in sorted(rows, key=lambda row: row["rank"]):
        if threshold is not None and row["score"] < threshold:
            assert row["reason"] == "below_threshold"
        elif pieces[row["position"]] > left_of_share:
            assert row["reason"] == "outside_top_share"
        else:
            left_of_share -= pieces[row["position"]]
            if row["tokens"] > left_of_budget:
                # beyond the budget, or kept in reserve until tokens are counted
                assert row["reason"] in ("over_budget", "of_a_held_out_work", None)
                assert row["split"] in ("reserve", None)
            else:
                left_of_budget -= row["tokens"]
                assert row["reason"] is None
                assert row["split"] != "reserve"


def test_equal_scores_are_ordered_by_a_fixed_rule(outcome: Any) -> None:
    records = acts(30)
    ranks = {name: row["rank"] for name, row in outcome(records).items()}
    turned = {name: row["rank"] for name, row in outcome(records[::-1]).items()}
    assert ranks == turned
    assert sorted(ranks.values()) == list(range(30))


# Splits


def test_held_out_sets_have_about_their_shares(outcome: Any) -> None:
    records = [act(n, year=2000 + n % 20) for n in range(1, 101)]
    found = outcome(records, corpus__validation_share=0.1, corpus__newest_share=0.05)
    splits = Counter(row["split"] for row in found.values())
    assert splits["validation_newest"] == 5
    assert (
        4 <= splits["validation"] <= 16
    )  # of 100 works each is held out by its own hash: 10 +- 2 x 3
    assert splits["train"] == 95 - splits["validation"]
    newest = [row["year"] for row in found.values() if row["split"] == "validation_newest"]
    assert set(newest) <= {2018, 2019}


def test_what_is_held_out_does_not_depend_on_what_else_there_is(outcome: Any) -> None:
    records = [act(n, year=2000 + n % 20) for n in range(1, 101)]
    held_out = [
        {row["id"] for row in outcome(records[:count]).values() if row["split"] == "validation"}
        for count in (40, 70, 100)
    ]
    for fewer, count in ((held_out[0], 40), (held_out[1], 70)):
        assert fewer == held_out[2] & {one["id"] for one in records[:count]}
    # nor on how much of it is read: what is beyond the limit is not trained on either
    limited = outcome(records, corpus__validation_tokens=1000)
    unread = {row["id"] for row in limited.values() if row["reason"] == "held_out_unread"}
    read = {row["id"] for row in limited.values() if row["split"] == "validation"}
    assert unread
    assert read | unread == held_out[2]


def test_a_corpus_too_small_for_its_share_holds_one_work_out(outcome: Any) -> None:
    found = outcome(acts(12), corpus__validation_share=0.0001)
    assert sum(row["split"] == "validation" for row in found.values()) == 1


def test_held_out_sets_end_where_their_tokens_do(outcome: Any) -> None:
    records = [act(n, year=2000 + n % 20) for n in range(1, 101)]
    shares = {"corpus__validation_share": 0.4, "corpus__newest_share": 0.2}
    found = outcome(records, **shares, corpus__validation_tokens=1000)
    for split in ("validation", "validation_newest"):
        tokens = [row["tokens"] for row in found.values() if row["split"] == split]
        assert 1000 - max(row["tokens"] for row in found.values()) < sum(tokens) <= 1000


def test_a_new_version_does_not_make_an_act_new(outcome: Any) -> None:
    old = record("02001R0001-20260101", text_of(1), celex="02001R0001-20260101", date="2026-01-01")
    found = outcome([*acts(30), old])
    assert found[old["id"]]["split"] != "validation_newest"


@given(st.integers(0, 2**16))
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_the_outcome_depends_on_nothing_but_the_documents(
    tmp_path_factory: pytest.TempPathFactory, recipe_for: Recipes, seed: int
) -> None:
    """Versions, translations, near-duplicates and a budget, in files cut and ordered at random."""
    rng = random.Random(seed)
    records = [act(n, year=2000 + n % 9, words=rng.randint(30, 200)) for n in range(1, 40)]
    for n, original in enumerate(rng.choices(records, k=12)):
        celex = f"0{original['id'][1:]}-2020{n + 1:02}01"
        words = original["full_text"].split()
        words[rng.randrange(len(words))] = "amended"
        facts = {"celex": celex, "language": rng.choice(["en", "de"])}
        records.append(record(celex, " ".join(words), **facts))
    outcomes = []
    for _ in range(2):
        folder = tmp_path_factory.mktemp("shuffled")
        rng.shuffle(records)
        cut = rng.randrange(1, len(records))
        for name, part in (("a.jsonl", records[:cut]), ("b.jsonl", records[cut:])):
            (folder / name).write_text("".join(json.dumps(item) + "\n" for item in part))
        recipe = recipe_for(folder, selection__target_tokens=10_000)
        from fastcpt.corpus.documents import list_parts
        from fastcpt.corpus.score import score_parts

        tables = score_parts(list_parts(recipe.documents), recipe, folder / "home", processes=1)
        paths = [table["path"] for table in tables]
        rng.shuffle(paths)
        selection = select(paths, recipe, folder / "home")
        rows = rows_of(selection)
        outcomes.append(
            {row["id"]: (row["reason"], row["split"], row["score"], row["rank"]) for row in rows}
        )
        # whole works are held out
        side = {}
        for row in rows:
            if row["split"]:
                held_out = row["split"].startswith("validation")
                assert side.setdefault(row["work"], held_out) == held_out
        funnel = selection["funnel"]
        everything = next(item for item in funnel if item["stage"] == "read" and not item["reason"])
        parts = [item for item in funnel if item["stage"] != "read"]
        for unit in ("documents", "characters", "tokens"):
            assert sum(item[unit] for item in parts) == everything[unit]
    assert outcomes[0] == outcomes[1]


# Citations


def test_procedural_acts_do_not_win_by_citations(outcome: Any) -> None:
    """One act is cited by six on its own topic, another by twelve on other topics."""

    def citing(number: int, cited: str, topic: str) -> Record:
        item = act(number, subject_matter=[topic])
        item["full_text"] += f" in accordance with Regulation (EU) 2018/{cited} of the Council"
        return item

    records = [
        act(1, year=2018, subject_matter=["Fisheries"]),
        act(2, year=2018, subject_matter=["Institutions"]),
        act(3, year=2018, subject_matter=["Fisheries"]),
        *(citing(100 + n, "1", "Fisheries") for n in range(6)),
        *(citing(200 + n, "2", "Transport") for n in range(12)),
    ]
    found = outcome(records)
    assert found["32018R0001"]["citations"] == 1.0
    assert found["32018R0002"]["citations"] == 0.0
    assert found["32018R0003"]["citations"] == 0.0


# What is told


def test_the_same_selection_is_found_again(
    documents: Writer, recipe_for: Recipes, scores: Scores, home: Path
) -> None:
    recipe = recipe_for(documents(acts(20)))
    first = select(scores(recipe), recipe, home)
    assert not first["reused"]
    assert select(scores(recipe), recipe, home)["reused"]
    other = recipe_for(documents(acts(20)), selection__min_year=2001)
    assert select(scores(other), other, home)["digest"] != first["digest"]


def test_too_many_unreadable_records_fail_the_step(
    documents: Writer, recipe_for: Recipes, scores: Scores, home: Path
) -> None:
    folder = documents([*acts(18), record("x", ""), {"id": "y"}])
    recipe = recipe_for(folder, documents__max_unreadable_share=0.05)
    with pytest.raises(
        DocumentsError,
        match=r"2 of 20 records \(10\.0%\).*\(5\.0%\).*part-00\.jsonl:19: 'full_text' is empty",
    ):
        select(scores(recipe), recipe, home)
    enough = recipe_for(folder, documents__max_unreadable_share=0.1)
    assert select(scores(enough), enough, home)["unreadable"] == 2


def test_a_missing_tokenizer_is_said_before_anything_is_selected(
    documents: Writer, recipe_for: Recipes, scores: Scores, home: Path
) -> None:
    recipe = recipe_for(documents(acts(5)), tokenizer__path="/no/tokenizer")
    with pytest.raises(TokenizerError, match=r"tokenizer\.path: there is no '/no/tokenizer'"):
        select(scores(recipe), recipe, home)


def test_the_funnel_as_a_table() -> None:
    row = {"stage": "read", "reason": "", "documents": 1504, "characters": 7, "tokens": 3}
    assert funnel_table([row]).splitlines()[-1] == "| read | all | 1,504 | 7 | 3 |"


def test_a_score_is_explained(
    documents: Writer, recipe_for: Recipes, scores: Scores, home: Path
) -> None:
    recipe = recipe_for(documents(acts(20)))
    selection = select(scores(recipe), recipe, home)["path"]
    told = explain("32020R0004", selection, recipe)
    components = [line.split() for line in told.splitlines() if len(line.split()) == 4]
    points = [float(line[3]) for line in components if line[0] != "component"]
    assert len(points) == 9
    total = next(line for line in told.splitlines() if line.startswith("score"))
    assert sum(points) == pytest.approx(float(total.split()[1]), abs=0.05)
    assert "taken for" in told
    with pytest.raises(UnknownDocumentError, match="no readable document has the id 'nothing'"):
        explain("nothing", selection, recipe)


def test_components_that_are_the_same_for_all_are_named(
    documents: Writer, recipe_for: Recipes, scores: Scores, home: Path
) -> None:
    kinds = ["regulation", "directive"]
    several = [act(n, year=2000 + n, doc_type=kinds[n % 2]) for n in range(1, 21)]
    recipe = recipe_for(documents(several))
    selection = select(scores(recipe), recipe, home)
    assert {"language", "in_force", "citations", "subject_matter"} <= set(selection["same_for_all"])
    assert "recency" not in selection["same_for_all"]
    told = explain(several[0]["id"], selection["path"], recipe)
    assert "the same for all documents, so without effect: " in told


def test_the_ends_of_the_ranking_are_documents_that_were_taken(
    documents: Writer, recipe_for: Recipes, scores: Scores, home: Path
) -> None:
    titled = [act(n, year=2000 + n, title=f"Regulation {n}") for n in range(1, 21)]
    recipe = recipe_for(documents(titled))
    selection = select(scores(recipe), recipe, home)["path"]
    ends = ends_of_ranking(selection, count=3)
    best, worst = ends["best"], ends["worst"]
    assert len(best) == len(worst) == 3
    assert [row["rank"] for row in best + worst] == sorted(row["rank"] for row in best + worst)
    assert min(row["score"] for row in best) >= max(row["score"] for row in worst)
    assert all(row["title"] for row in best)
    assert not {row["id"] for row in best} & {row["id"] for row in worst}
