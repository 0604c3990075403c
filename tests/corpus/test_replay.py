"""General documents: mixed into training by their share, some held out, none in both."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from corpus.made import Record, act, acts, general_folder, made, record, rows_of, text_of
from fastcpt.corpus.tokenizer import describe
from fastcpt.recipe import Recipe

Recipes = Callable[..., Recipe]
Writer = Callable[..., Path]


def test_replay_mixes_in_general_documents(
    documents: Writer, recipe_for: Recipes, home: Path, tmp_path: Path
) -> None:
    folder = documents(acts(60))
    general = tmp_path / "general"
    general.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        shutil.copy(folder / "part-00.jsonl", general / name)
        content = (general / name).read_text().replace("32", f"{name[0]}-")
        (general / name).write_text(content)
    recipe = recipe_for(folder, documents__replay={"path": str(general), "share": 0.2})
    corpus = made(recipe, home)
    assert 0.17 < corpus["replay"]["share"] <= 0.2
    kept = {row["reason"]: row["tokens"] for row in corpus["funnel"] if row["stage"] == "kept"}
    assert kept["train"] + kept["replay"] == corpus["tokens"]


def test_general_documents_are_held_out_by_their_ids(
    documents: Writer, recipe_for: Recipes, tmp_path: Path
) -> None:
    stories = [record(f"story {n}", text_of(7000 + n)) for n in range(300)]
    general = general_folder(tmp_path, stories)
    texts = {item["id"]: item["full_text"] for item in stories}
    sets = []
    for share in (0.3, 0.6):
        recipe = recipe_for(
            documents(acts(60)),
            documents__replay={"path": str(general), "share": share},
            corpus__validation_share=0.1,
        )
        corpus = made(recipe, tmp_path / "home")
        tokenizer = describe(Path(corpus["path"]) / "tokenizer/tokenizer.json").load()
        rows = rows_of(corpus, "validation_general/*.parquet")
        trained = " ".join(tokenizer.decode(row["input_ids"]) for row in rows_of(corpus))
        for row in rows:
            text = texts[row["id"]]
            assert tokenizer.decode(row["input_ids"][1:-1]) == text
            assert row["bytes"] == len(text)
            assert (row["year"], row["doc_type"], row["areas"]) == (2020, "regulation", [])
            assert text[:20] not in trained
        assert any(text[:20] in trained for text in texts.values())
        (facts,) = [item for item in corpus["validation"] if item["set"] == "validation_general"]
        assert facts["rows"] == len(rows) > 5
        # about as much text as the legal set
        (legal,) = [item for item in corpus["validation"] if item["set"] == "validation"]
        assert 0.8 < facts["tokens"] / legal["tokens"] < 1.3
        sets.append({row["id"] for row in rows})
    assert sets[0] == sets[1]


def test_what_general_documents_are_held_out_shares_with_training_is_left_out(
    documents: Writer, recipe_for: Recipes, tmp_path: Path
) -> None:
    stories = [record(f"story {n}", text_of(7000 + n)) for n in range(60)]
    settings = {"corpus__validation_share": 0.2}

    def held_out(legal: list[Record], also: list[Record]) -> tuple[set[str], int]:
        general = general_folder(tmp_path, [*stories, *also])
        replay = {"path": str(general), "share": 0.6}
        recipe = recipe_for(documents(legal), documents__replay=replay, **settings)
        corpus = made(recipe, tmp_path / "home")
        rows = rows_of(corpus, "validation_general/*.parquet")
        return {row["id"] for row in rows}, corpus["replay"]["documents"]

    before, trained = held_out(acts(60), [])
    one = min(before)
    text = next(item["full_text"] for item in stories if item["id"] == one)
    # a general document that repeats a held-out one is not trained on
    assert held_out(acts(60), [record("retold", "Again: " + text)]) == (before, trained)
    # and where an act quotes the held-out one, that one measures nothing
    quoting = act(900, year=1990)
    assert one in held_out([*acts(60), quoting], [])[0]
    quoting["full_text"] += " " + text
    assert one not in held_out([*acts(60), quoting], [])[0]


def test_replay_does_not_bring_back_what_is_held_out(
    documents: Writer, recipe_for: Recipes, home: Path, tmp_path: Path
) -> None:
    records = acts(40)
    newest = record("newest", text_of(1, 300), date="2025-01-01")
    folder = documents([*records, newest])
    general = tmp_path / "general"
    general.mkdir()
    copies = [{"full_text": "A copy: " + text_of(1, 300)}, {"full_text": text_of(99, 300)}]
    (general / "a.jsonl").write_text("".join(json.dumps(item) + "\n" for item in copies))
    recipe = recipe_for(
        folder,
        documents__replay={"path": str(general), "share": 0.5},
        corpus__newest_share=0.01,
        corpus__validation_share=0.01,
    )
    assert made(recipe, home)["replay"]["documents"] == 1
