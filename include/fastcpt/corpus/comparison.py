"""What all corpora of a recipe share: the frozen comparison set, the tokenizer, the ledger.

Once a recipe has a champion, its models are compared on a frozen set. The set's documents come from
their frozen copy, not from the documents' folder, where they may since have changed, been repealed or
got another id. They are held out like any others, so all that overlaps with them leaves training.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastcpt.corpus.documents import identity
from fastcpt.corpus.selected import HELD_OUT, BuildError, Selected
from fastcpt.corpus.tokenizer import CorpusTokenizer, describe
from fastcpt.files import whole_file
from fastcpt.held_out import (
    HELD_OUT_SCHEMA,
    SET,
    TEXTS_SCHEMA,
    comparison,
    frozen_set,
    held_out_by_others,
    write_ledger,
)
from fastcpt.recipe import Recipe
from fastcpt.recipe_sections import Fields

log = logging.getLogger(__name__)


def add_comparison(documents: Selected, folder: Path, file: Path) -> None:
    """Add the frozen set's documents to a selection, as held out.

    They are written to ``file`` with the recipe's field names, so the build reads them as one more part.
    """
    table = pq.read_table(folder / "documents.parquet")
    count, part = len(table), len(documents.parts)
    texts = table["text"].to_pylist()
    with whole_file(file) as aside, aside.open("w", encoding="utf-8") as lines:
        for name, text in zip(table["id"].to_pylist(), texts, strict=True):
            lines.write(json.dumps(_record(documents.fields, name, text)) + "\n")
    documents.parts.append((str(file), identity(str(file))))
    characters = np.array([len(text) for text in texts], dtype=np.int64)
    columns: dict[str, Any] = {
        "part": np.full(count, part),
        "position": np.arange(count),
        "split": np.full(count, SET, dtype=object),
        "rank": np.full(count, -1),
        "characters": characters,
        "tokens": characters // 4,
        "content": table["content"].to_numpy(),
        "work_hash": table["work_hash"].to_numpy(),
    }
    documents.frozen = np.arange(count) + len(documents.split)
    for name, column in columns.items():
        setattr(documents, name, np.concatenate([getattr(documents, name), column]))
    about = table.select(documents.about.column_names).cast(documents.about.schema)
    documents.about = pa.concat_tables([documents.about, about])
    documents.held_out = documents.rows(*HELD_OUT)


def _record(fields: Fields, name: str, text: str) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for path, value in ((fields.id, name), (fields.text, text)):
        *sections, key = path.split(".")
        place = record
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return record


def note_in_ledger(corpus: str, documents: Selected, home: Path) -> int:
    """Record in the ledger what a corpus trains on and what it holds out.

    Returns how many of the documents it trains on were held out by another corpus, as its newest acts.
    """
    rows, held_out = documents.rows("train", *HELD_OUT), documents.rows(*HELD_OUT)
    others = np.concatenate([*held_out_by_others(home, corpus), np.empty(0, dtype=np.uint64)])
    judged = int(np.isin(documents.content[documents.rows("train")], others).sum())
    if judged:
        log.info("%d documents that an earlier corpus held out are trained on by now", judged)
    texts = [documents.content[rows], documents.work_hash[rows], pa.array(documents.split[rows])]
    about = documents.about.take(pa.array(held_out))
    columns = {
        **{name: about[name] for name in about.column_names},
        "split": pa.array(documents.split[held_out]),
        "content": documents.content[held_out],
        "work_hash": documents.work_hash[held_out],
        "text": pa.array(documents.texts(held_out), pa.string()),
    }
    write_ledger(
        home,
        corpus,
        pa.table(texts, names=TEXTS_SCHEMA.names).cast(TEXTS_SCHEMA),
        pa.table([columns[name] for name in HELD_OUT_SCHEMA.names], schema=HELD_OUT_SCHEMA),
    )
    return judged


def kept_tokenizer(
    found: CorpusTokenizer | None, recipe: Recipe, home: Path
) -> CorpusTokenizer | None:
    """The champion's tokenizer if the recipe has a champion, else ``found``, the recipe's own.

    Raises ``BuildError`` if the recipe now names another one: losses per token would not compare.
    """
    if frozen_set(home, recipe.name) is None:
        return found
    theirs = describe(comparison(home, recipe.name) / "tokenizer" / "tokenizer.json")
    if found is not None and found.sha256 != theirs.sha256:
        raise BuildError(
            f"'{found.file}' is another tokenizer than that of the champion of recipe "
            f"'{recipe.name}', which cannot be changed: take it back, give the recipe another name, "
            "or retire the champion (include/scripts/champion.py retire)"
        )
    return found or theirs
