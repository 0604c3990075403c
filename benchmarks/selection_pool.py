"""The pool of ``selection_value.py``: the training documents of a folder, as token ids.

Made by the product's own steps: scores, duplicates, held-out works, overlaps. The folder holds everything
that the arms and the trainings need, so that a GPU host needs neither documents nor corpus packages.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from fastcpt.files import read_json, write_json
from fastcpt.recipe import Recipe

log = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]


@dataclass
class Pool:
    """Documents one after another in ``ids``; entry n of the other arrays is document n."""

    ids: npt.NDArray[np.int32]
    begin: Ints
    length: Ints  # in tokens
    pieces: Ints  # starts of text that did not follow the previous token in the document
    table: pa.Table  # id, year, legal, published (scores), legal_rank, published_rank
    tokenizer: Path

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @classmethod
    def read(cls, folder: Path) -> Pool:
        ids = pq.read_table(folder / "tokens.parquet")["id"].to_numpy()
        table = pq.read_table(folder / "documents.parquet")
        length = table["length"].to_numpy()
        pieces = np.load(folder / "pieces.npy")
        return cls(
            ids,
            np.cumsum(length) - length,
            length,
            pieces,
            table,
            folder / "tokenizer" / "tokenizer.json",
        )


def make_pool(folder: Path, recipe: Recipe, home: Path, processes: int | None = None) -> None:
    """Write the pool of the recipe's documents to ``folder``, unless it is complete."""
    if (folder / "pool.json").is_file():
        return
    from fastcpt.corpus.build import build
    from fastcpt.corpus.documents import list_parts
    from fastcpt.corpus.score import score_parts
    from fastcpt.corpus.select import select

    folder.mkdir(parents=True, exist_ok=True)
    scored = {}
    for method in ("published", "legal"):
        by = recipe.model_copy(update={"score": recipe.score.model_copy(update={"method": method})})
        tables = score_parts(list_parts(recipe.documents), by, home, processes)
        selection = select([table["path"] for table in tables], by, home)
        documents = pq.read_table(Path(selection["path"]) / "documents.parquet").to_pylist()
        scored[method] = {row["id"]: row for row in documents if row["split"]}
    corpus = build(selection["path"], recipe, home, processes)
    for name in ("tokenizer", *(f"validation{part}" for part in ("", "_newest"))):
        shutil.copytree(Path(corpus["path"]) / name, folder / name, dirs_exist_ok=True)
    ids, pieces, rows = _training_ids(selection["path"], recipe, folder / "tokenizer", home)
    # one byte per token, as the folder may be sent to a host
    pq.write_table(
        pa.table({"id": ids}),
        folder / "tokens.parquet",
        compression="zstd",
        compression_level=9,
        use_dictionary=False,
    )
    np.save(folder / "pieces.npy", pieces)
    for row in rows:
        for method, by_id in scored.items():
            row[method], row[f"{method}_rank"] = (
                by_id[row["id"]][key] for key in ("score", "rank")
            )
    pq.write_table(pa.Table.from_pylist(rows), folder / "documents.parquet")
    facts = {"documents": len(rows), "tokens": len(ids), "held_out": corpus["validation"]}
    write_json(folder / "pool.json", facts)
    log.info("pool: %d documents, %d tokens", len(rows), len(ids))


def _training_ids(
    selection: str, recipe: Recipe, tokenizer_folder: Path, home: Path
) -> tuple[npt.NDArray[np.int32], Ints, list[dict[str, Any]]]:
    """Ids of all training documents, the starts of their pieces, and a row per document."""
    from fastcpt.corpus.decontamination import cut_passages, drop_overlapping, find_overlaps
    from fastcpt.corpus.replay import GeneralHeldOut
    from fastcpt.corpus.selected import Selected
    from fastcpt.corpus.token_ids import ids_of_all
    from fastcpt.corpus.tokenizer import describe
    from fastcpt.corpus.tokens import TokenFiles

    chosen = read_json(Path(selection) / "manifest.json")
    documents = Selected.of_selection(Path(selection), chosen, recipe.documents.fields)
    tokenizer = describe(tokenizer_folder / "tokenizer.json")
    scratch = home / "pool_overlaps"
    unseen = GeneralHeldOut.drawn([], documents, recipe.documents.max_record_mb)
    overlaps = find_overlaps(documents, unseen, scratch, None)
    drop_overlapping(documents, overlaps)
    ids = ids_of_all(documents, tokenizer, home, None)
    stretches, _ = cut_passages(documents, ids, scratch, tokenizer, None)
    segments = stretches.segments(documents.rows("train"))
    found = ids.in_segments(segments, stretches)
    with TokenFiles(found.files) as files:
        tokens = files.read(found.file, found.offset, found.length)
    shutil.rmtree(scratch)
    lengths = np.bincount(segments, found.length, len(documents.split)).astype(np.int64)
    train = documents.rows("train")
    about = documents.about.select(["id", "year"]).take(pa.array(train)).to_pylist()
    rows = [row | {"length": int(n)} for row, n in zip(about, lengths[train], strict=True)]
    return tokens, np.cumsum(found.length) - found.length, rows
