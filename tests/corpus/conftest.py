"""Small documents and a small tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from corpus.made import Record, text_of
from fastcpt.corpus.documents import list_parts
from fastcpt.corpus.score import score_part
from fastcpt.corpus.tokenizer import train_tokenizer
from fastcpt.recipe import Recipe, load_recipe
from fastcpt.recipe_sections import CONFIGS


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer((text_of(seed, 400) for seed in range(20)), 600, folder)
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def documents(tmp_path: Path) -> Callable[..., Path]:
    """Writes records to a file of a documents folder and returns the folder."""

    def write(records: list[Record], name: str = "part-00.jsonl") -> Path:
        folder = tmp_path / "documents"
        folder.mkdir(exist_ok=True)
        lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in records)
        (folder / name).write_text("".join(lines), encoding="utf-8")
        return folder

    return write


@pytest.fixture
def recipe_for(tokenizer_folder: Path) -> Callable[..., Recipe]:
    """A recipe for a documents folder; keyword ``a__b`` is the recipe's key ``a.b``."""

    def make(folder: Path, **settings: Any) -> Recipe:
        overrides = {
            "documents.path": str(folder),
            "tokenizer.path": str(tokenizer_folder),
            "tokenizer.train_vocab_size": None,
            "selection.top_share": None,
            "selection.min_characters": 0,
            "corpus.max_seq_length": 64,
            "corpus.num_shards": 2,
            "corpus.validation_share": 0.1,
            "corpus.newest_share": 0.1,
        }
        overrides |= {key.replace("__", "."): value for key, value in settings.items()}
        return load_recipe(CONFIGS / "sample.yaml", overrides)

    return make


@pytest.fixture
def scores(home: Path) -> Callable[[Recipe], list[str]]:
    """Scores a recipe's documents and returns the tables' folders."""

    def score(recipe: Recipe) -> list[str]:
        return [score_part(part, recipe, home)["path"] for part in list_parts(recipe.documents)]

    return score
