"""What was held out and what was trained on, for good.

    home/ledger/<corpus>/texts.parquet      a row a document: hashes of text and work, its split
    home/ledger/<corpus>/held_out.parquet   the held-out ones, with their texts
    home/models/<recipe>/comparison/        what the recipe's models are compared on: the held-out
                                            documents of its first champion, and its tokenizer

The ledger only grows: a folder a corpus, written once by the corpus's build, 17 bytes a document.
Parquet, not a database: several workers write, each a file of its own that appears whole, and a
question is answered by reading two columns. The comparison set is as it was when it was frozen,
whatever becomes of the documents' folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fastcpt.files import flush, read_json, sha256_of_file, whole_file, write_json

TEXTS_SCHEMA = pa.schema(
    [
        ("content", pa.uint64()),
        ("work_hash", pa.uint64()),
        ("split", pa.dictionary(pa.int8(), pa.string())),  # train, or of a held-out set
    ]
)
HELD_OUT_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("content", pa.uint64()),
        ("work_hash", pa.uint64()),
        ("id", pa.string()),
        ("work", pa.string()),
        ("bytes", pa.int64()),
        ("year", pa.int16()),
        ("doc_type", pa.string()),
        ("areas", pa.list_(pa.string())),
        ("text", pa.string()),
    ]
)
SET = "validation"  # the held-out set that models are compared on


class HeldOutError(ValueError):
    """The ledger or the comparison set cannot serve; the message says what to do."""


def write_ledger(home: Path, corpus: str, texts: pa.Table, held_out: pa.Table) -> None:
    """Note a corpus's documents, as ``TEXTS_SCHEMA`` and ``HELD_OUT_SCHEMA`` have them."""
    for name, table in (("held_out", held_out), ("texts", texts)):
        with whole_file(home / "ledger" / corpus / f"{name}.parquet") as aside:
            pq.write_table(table, aside, compression="zstd")


def trained_and_held_out(home: Path, recipe: str, corpora: Iterable[str]) -> int:
    """How many documents of the comparison set stand among the trained ones of some corpora, by
    their text or their work. ``HeldOutError`` where the ledger does not know a corpus."""
    judged = pq.read_table(comparison(home, recipe) / "documents.parquet")
    found = np.zeros(len(judged), dtype=bool)
    for corpus in corpora:
        file = home / "ledger" / corpus / "texts.parquet"
        if not file.is_file():
            raise HeldOutError(f"{file} is missing: what corpus {corpus} trained on is not known")
        trained = pq.read_table(file, filters=pc.field("split") == "train")
        for name in ("content", "work_hash"):
            found |= np.isin(judged[name].to_numpy(), trained[name].to_numpy())
    return int(found.sum())


def comparison(home: Path, recipe: str) -> Path:
    """Where the comparison set of a recipe is, once there is one: it has a ``manifest.json``."""
    return home / "models" / recipe / "comparison"


def comparison_digest(home: Path, recipe: str) -> str | None:
    """What tells the set from every other; None where none is frozen."""
    manifest = comparison(home, recipe) / "manifest.json"
    return str(read_json(manifest)["digest"]) if manifest.is_file() else None


def comparison_selection(home: Path, recipe: str) -> str | None:
    """The digest of the selection that the set was held out of; None where none is frozen."""
    manifest = comparison(home, recipe) / "manifest.json"
    return str(read_json(manifest)["selection"]) if manifest.is_file() else None


def freeze(home: Path, recipe: str, corpus: str) -> dict[str, Any]:
    """Make the held-out set of a corpus the one that the recipe's models are compared on.

    Does nothing where there is one. Returns its manifest: ``version`` (1, and one more after each
    ``unfreeze``), ``digest``, ``corpus``, ``selection``, ``documents``, ``frozen``. ``HeldOutError`` where the
    ledger or the corpus is gone.
    """
    folder = comparison(home, recipe)
    if (folder / "manifest.json").is_file():
        return dict(read_json(folder / "manifest.json"))
    file, tokenizer = home / "ledger" / corpus / "held_out.parquet", home / "corpora" / corpus
    if not (file.is_file() and (tokenizer / "tokenizer").is_dir()):
        raise HeldOutError(
            f"the documents that corpus {corpus} held out, or its tokenizer, are gone from {home}: "
            "run the recipe again"
        )
    partial = folder.with_name(".comparison.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(tokenizer / "tokenizer", partial / "tokenizer")
    documents = pq.read_table(file, filters=pc.field("split") == SET)
    pq.write_table(documents, partial / "documents.parquet", compression="zstd")
    manifest = {
        "version": 1 + len(list(folder.parent.glob("comparison-*"))),
        "digest": sha256_of_file(partial / "documents.parquet")[:16],
        "corpus": corpus,
        "selection": read_json(tokenizer / "corpus_manifest.json")["selection"],
        "documents": len(documents),
        "frozen": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(partial / "manifest.json", manifest)
    for path in partial.rglob("*"):
        flush(path)
    partial.rename(folder)
    flush(folder.parent)
    return manifest


def unfreeze(home: Path, recipe: str) -> None:
    """Put the comparison set aside, as ``comparison-<version>``: no living model is judged by it."""
    folder = comparison(home, recipe)
    if folder.is_dir():
        folder.rename(
            folder.with_name(f"comparison-{read_json(folder / 'manifest.json')['version']}")
        )
        flush(folder.parent)
