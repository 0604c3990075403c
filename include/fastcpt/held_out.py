"""The permanent ledger of trained and held-out documents, and each recipe's comparison set.

    home/ledger/<corpus>/texts.parquet      a row per document: hashes of text and work, its split
    home/ledger/<corpus>/held_out.parquet   the held-out documents, with their texts
    home/models/<recipe>/comparison/        the set that the recipe's models are compared on: the
                                            held-out documents and tokenizer of its first champion

The ledger only grows: each corpus's build writes one folder, 17 bytes per document. It is Parquet, not a
database, as several workers write at once, each a complete file, and a query reads only two columns. The
comparison set stays as it was frozen, even if the documents' folder changes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fastcpt.files import flush, read_json, sha256_of_file, whole_file, write_json

TEXTS_SCHEMA = pa.schema(
    [
        ("content", pa.uint64()),
        ("work_hash", pa.uint64()),
        ("split", pa.dictionary(pa.int8(), pa.string())),  # train, or a held-out set
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
Hashes = npt.NDArray[np.uint64]
SET = "validation"  # the held-out set that models are compared on


class HeldOutError(ValueError):
    """The ledger or the comparison set cannot be used; the message says what to do."""


def write_ledger(home: Path, corpus: str, texts: pa.Table, held_out: pa.Table) -> None:
    """Record a corpus's documents: tables of ``TEXTS_SCHEMA`` and ``HELD_OUT_SCHEMA``."""
    for name, table in (("held_out", held_out), ("texts", texts)):
        with whole_file(home / "ledger" / corpus / f"{name}.parquet") as aside:
            pq.write_table(table, aside, compression="zstd")


def trained_and_held_out(home: Path, recipe: str, corpora: Iterable[str]) -> int:
    """How many documents of the comparison set some corpora trained on, by text or by work.
    ``HeldOutError`` if the ledger does not have a corpus."""
    judged = pq.read_table(comparison(home, recipe) / "documents.parquet")
    texts, works = trained_on(home, corpora)
    found = np.isin(judged["content"].to_numpy(), texts)
    return int((found | np.isin(judged["work_hash"].to_numpy(), works)).sum())


def trained_on(home: Path, corpora: Iterable[str]) -> tuple[Hashes, Hashes]:
    """Hashes of the texts and of the works that some corpora trained on. ``HeldOutError`` where the
    ledger does not know a corpus."""
    found = [TEXTS_SCHEMA.empty_table()]
    for corpus in corpora:
        file = home / "ledger" / corpus / "texts.parquet"
        if not file.is_file():
            raise HeldOutError(f"{file} is missing: what corpus {corpus} trained on is not known")
        found.append(pq.read_table(file, filters=pc.field("split") == "train"))
    table = pa.concat_tables([one.select(["content", "work_hash"]) for one in found])
    return table["content"].to_numpy(), table["work_hash"].to_numpy()


def held_out_by_others(home: Path, corpus: str) -> list[Hashes]:
    """Hashes of the texts that each corpus but this one held out."""
    files = sorted((home / "ledger").glob("[!.]*/held_out.parquet"))
    return [
        pq.read_table(file, columns=["content"])["content"].to_numpy()
        for file in files
        if file.parent.name != corpus
    ]


def comparison(home: Path, recipe: str) -> Path:
    """The folder of a recipe's comparison set; the set exists if it has a ``manifest.json``."""
    return home / "models" / recipe / "comparison"


def frozen_set(home: Path, recipe: str) -> dict[str, Any] | None:
    """The manifest of the set, as ``freeze`` returns it; None if none is frozen.

    ``digest`` tells the set from every other, ``selection`` is the one that it was held out of.
    """
    manifest = comparison(home, recipe) / "manifest.json"
    return dict(read_json(manifest)) if manifest.is_file() else None


def freeze(home: Path, recipe: str, corpus: str) -> dict[str, Any]:
    """Make a corpus's held-out set the one that the recipe's models are compared on, unless there is one.

    Returns the set's manifest: ``version`` (1, plus one after each ``unfreeze``), ``digest``, ``corpus``,
    ``selection``, ``documents``, ``frozen``. ``HeldOutError`` if the ledger or the corpus is gone.
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
    """Move the comparison set to ``comparison-<version>``, where no model uses it any more."""
    folder = comparison(home, recipe)
    if folder.is_dir():
        folder.rename(
            folder.with_name(f"comparison-{read_json(folder / 'manifest.json')['version']}")
        )
        flush(folder.parent)
