"""Instructions: mapping, split by work, bad records."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from fastcpt.corpus.documents import DocumentsError
from fastcpt.corpus.instructions import build_instructions
from fastcpt.recipe import Recipe


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def instruction(n: int) -> dict[str, Any]:
    return {"id": f"32020R{n:04}", "title": f"Act {n}", "summary": f"It says {n}."}


@pytest.fixture
def recipe(tmp_path: Path, recipe_for: Callable[..., Recipe]) -> Callable[..., Recipe]:
    def make(records: list[Any], **settings: Any) -> Recipe:
        lines = "".join(
            item if isinstance(item, str) else json.dumps(item) + "\n" for item in records
        )
        (tmp_path / "tasks.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
        choice = {"sft__instructions": str(tmp_path / "tasks.jsonl.zst"), "sft__held_out": 3}
        return recipe_for(tmp_path, **(choice | settings))

    return make


def test_prompts_are_made_by_the_template(recipe: Any, home: Path) -> None:
    result = build_instructions(recipe([instruction(n) for n in range(10)]), home)
    assert result is not None
    assert (result["train"], result["held_out"]) == (7, 3)
    rows = [
        row
        for name in ("train", "held_out")
        for row in lines_of(Path(result["path"]) / f"{name}.jsonl")
    ]
    assert sorted(rows, key=lambda row: row["id"])[4] == {
        "id": "32020R0004",
        "prompt": "Summarise the legal act: Act 4",
        "response": "It says 4.",
    }


def test_a_record_s_own_prompt_comes_first(recipe: Any, home: Path) -> None:
    records = [{"q": f"What is {n}?", "a": {"text": "Law."}} for n in range(5)]
    fields = {"prompt": "q", "response": "a.text"}
    result = build_instructions(recipe(records, sft__fields=fields), home)
    assert result is not None
    prompts = {row["prompt"] for row in lines_of(Path(result["path"]) / "train.jsonl")}
    assert len(prompts) == 2
    assert prompts < {f"What is {n}?" for n in range(5)}


def test_versions_of_an_act_are_on_one_side_in_any_order(recipe: Any, home: Path) -> None:
    records = [instruction(n) for n in range(12)]
    records += [{**instruction(n), "id": f"02020R{n:04}-20210101", "title": "v"} for n in range(12)]

    def sides(records: list[Any], home: Path) -> dict[str, set[str]]:
        result = build_instructions(recipe(records), home)
        assert result is not None
        return {
            name: {row["id"] for row in lines_of(Path(result["path"]) / f"{name}.jsonl")}
            for name in ("train", "held_out")
        }

    found = sides(records, home)
    works = {name: {identifier[5:10] for identifier in ids} for name, ids in found.items()}
    assert not works["train"] & works["held_out"]
    assert len(found["held_out"]) == 4  # two works of two
    assert sides(records[::-1], home / "again") == found


def test_nothing_to_do_without_instructions(recipe_for: Any, home: Path, tmp_path: Path) -> None:
    assert build_instructions(recipe_for(tmp_path, sft__instructions=None), home) is None


def test_the_same_again_is_found(recipe: Any, home: Path) -> None:
    records = [instruction(n) for n in range(10)]
    first = build_instructions(recipe(records), home)
    again = build_instructions(recipe(records), home)
    assert first is not None
    assert again is not None
    assert again == first | {"reused": True}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ('{"id": "x", "title": "t"}\n', r"tasks\.jsonl\.zst:11: 'summary' is missing or empty"),
        ('{"title": 1, "summary": ["a"]}\n', r":11: 'summary' is no text"),
        ('{"id": "x", "summary": "s"}\n', r":11: 'title' is missing or empty"),
        ("nonsense\n", ":11: broken JSON"),
    ],
)
def test_bad_records_are_set_aside_up_to_a_share(
    recipe: Any, home: Path, bad: str, reason: str
) -> None:
    records = [*(instruction(n) for n in range(10)), bad]
    loose = build_instructions(recipe(records, documents__max_unreadable_share=0.1), home)
    assert loose is not None
    assert loose["unreadable"] == 1
    with pytest.raises(DocumentsError, match=reason):
        build_instructions(recipe(records, documents__max_unreadable_share=0.05), home / "2")


def test_a_missing_file_and_too_few(recipe: Any, home: Path) -> None:
    with pytest.raises(DocumentsError, match=r"sft\.instructions: there is no file '/none'"):
        build_instructions(recipe([], sft__instructions="/none"), home)
    with pytest.raises(
        DocumentsError, match=r"sft\.held_out: holding out 3 of 3 instructions leaves none"
    ):
        build_instructions(recipe([instruction(n) for n in range(3)]), home)
