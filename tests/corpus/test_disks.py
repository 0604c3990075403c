"""Documents on a Mac's disks: names in decomposed Unicode, read-only folders."""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from corpus.made import Record, act
from fastcpt.corpus.build import build
from fastcpt.corpus.documents import Document, list_parts, read_documents
from fastcpt.corpus.score import score_parts
from fastcpt.corpus.select import select
from fastcpt.recipe import Recipe

Recipes = Callable[..., Recipe]


def written(folder: Path, form: str) -> Path:
    """Two files of acts under names with accents, spelled in a form of Unicode."""

    def named(name: str) -> str:
        return unicodedata.normalize(form, name)  # type: ignore[arg-type]

    folder = folder / named("Décrets")
    folder.mkdir(parents=True)
    for number, name in enumerate(("loi-à.jsonl", "loi-zo\u0301.jsonl")):
        records = [act(100 * number + n, year=2000 + n) for n in range(1, 20)]
        # without an id a record is named by its file
        records[0].pop("id")
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / named(name)).write_text(lines)
    return folder


def made(recipe: Recipe, home: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    scores = score_parts(list_parts(recipe.documents), recipe, home)
    selection = select([score["path"] for score in scores], recipe, home)
    return selection, build(selection["path"], recipe, home)


def contents(corpus: dict[str, Any]) -> list[tuple[str, str]]:
    return [(file["file"], file["sha256"]) for file in corpus["files"]]


def test_a_name_is_the_same_composed_and_decomposed(
    recipe_for: Recipes, tmp_path: Path, home: Path
) -> None:
    composed = written(tmp_path, "NFC")
    selection, corpus = made(recipe_for(composed), home)
    shutil.rmtree(composed)
    decomposed = written(tmp_path, "NFD")
    assert decomposed.name != composed.name
    again, found = made(recipe_for(decomposed), home)
    assert (again["digest"], again["reused"]) == (selection["digest"], True)
    assert (found["digest"], found["reused"]) == (corpus["digest"], True)
    # what is found is read under the name that it has now
    shutil.rmtree(home / "corpora")
    shutil.rmtree(home / "tokens", ignore_errors=True)
    assert contents(made(recipe_for(decomposed), home)[1]) == contents(corpus)
    # and the same is made where nothing is found
    afresh, anew = made(recipe_for(decomposed), tmp_path / "another home")
    assert (afresh["digest"], contents(anew)) == (selection["digest"], contents(corpus))


def test_ids_that_name_files_are_composed(recipe_for: Recipes, tmp_path: Path) -> None:
    ids = []
    for form in ("NFC", "NFD"):
        recipe = recipe_for(written(tmp_path / form, form))
        for part in list_parts(recipe.documents):
            first = next(iter(read_documents(part, recipe.documents.fields)))
            assert isinstance(first, Document)
            ids.append(first.id)
    assert sorted(ids) == sorted(["loi-à.jsonl:1", "loi-zó.jsonl:1"] * 2)


@pytest.mark.parametrize("replay", [False, True])
def test_nothing_is_written_beside_the_documents(
    documents: Callable[[list[Record]], Path],
    recipe_for: Recipes,
    tmp_path: Path,
    home: Path,
    replay: bool,
) -> None:
    folder = documents([act(n, year=2000 + n % 20) for n in range(1, 60)])
    settings: dict[str, Any] = {}
    if replay:
        general = written(tmp_path / "general", "NFC")
        settings = {"documents__replay": {"path": str(general), "share": 0.1}}
        settings |= {"corpus__num_shards": 1}
    everything = [folder, *tmp_path.glob("general/*")]
    for one in everything:
        for file in one.iterdir():
            file.chmod(0o444)
        one.chmod(0o555)
    before = state_of(*everything)
    made(recipe_for(folder, **settings), home)
    assert state_of(*everything) == before
    for one in everything:
        one.chmod(0o755)


def state_of(*folders: Path) -> list[tuple[str, int, int]]:
    entries = [entry for folder in folders for entry in (folder, *folder.rglob("*"))]
    return [(str(entry), entry.stat().st_mtime_ns, entry.stat().st_size) for entry in entries]
