"""Documents made for tests, and corpora made from them."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from fastcpt.corpus.build import build
from fastcpt.corpus.documents import list_parts
from fastcpt.corpus.score import score_parts
from fastcpt.corpus.select import select
from fastcpt.recipe import Recipe

Record = dict[str, Any]


def text_of(seed: int, words: int = 120) -> str:
    """Text that shares no run of words with that of another seed."""
    rng = random.Random(seed)
    return " ".join(
        "".join(rng.choices("abcdefghiklmnoprstuv", k=rng.randint(2, 9))) for _ in range(words)
    )


def record(identifier: str, text: str, **metadata: Any) -> Record:
    metadata = {"doc_type": "regulation", "date": "2020-01-01", "language": "en"} | metadata
    return {"id": identifier, "full_text": text, "metadata": metadata}


def act(number: int, year: int = 2020, words: int = 120, **metadata: Any) -> Record:
    """A regulation with a text of its own."""
    celex = f"3{year}R{number:04}"
    text = text_of(year * 10_000 + number, words)
    return record(celex, text, **({"celex": celex, "date": f"{year}-05-01"} | metadata))


def made(recipe: Recipe, home: Path, processes: int = 1) -> dict[str, Any]:
    """All steps up to the corpus."""
    scores = score_parts(list_parts(recipe.documents), recipe, home, processes)
    selection = select([score["path"] for score in scores], recipe, home)
    return build(selection["path"], recipe, home, processes)


def rows_of(corpus: dict[str, Any], pattern: str = "cpt_train_shard_*.parquet") -> list[Record]:
    paths = sorted(Path(corpus["path"]).glob(pattern))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def acts(count: int = 40, words: int = 150) -> list[Record]:
    return [act(n, year=2000 + n % 20, words=words + n) for n in range(1, count + 1)]


def bytes_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def general_folder(tmp_path: Path, records: list[Record]) -> Path:
    folder = tmp_path / "general"
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps(item) + "\n" for item in records)
    (folder / "a.jsonl").write_text(lines)
    return folder
