"""Exports the documents of a selection as text files."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from fastcpt.corpus.documents import Document, read_documents
from fastcpt.files import read_json, whole_file
from fastcpt.recipe_sections import Fields


def export_documents(selection: str, fields: Fields, folder: Path) -> int:
    """Write a selection's documents to ``folder``, one ``.jsonl.zst`` per part; returns their number.

    Records have the recipe's default field names. The reserve beyond an estimated token budget is left
    out.
    """
    import zstandard

    manifest = read_json(Path(selection) / "manifest.json")
    taken = pc.field("split").isin(["train", "validation", "validation_newest"])
    rows = pq.read_table(
        Path(selection) / "documents.parquet", columns=["part", "position"], filters=taken
    )
    written = 0
    for number, part in enumerate(manifest["parts"]):
        positions = set(rows.filter(pc.equal(rows["part"], number))["position"].to_pylist())
        if not positions:
            continue
        with (
            whole_file(folder / f"part-{number:05}.jsonl.zst") as aside,
            aside.open("wb") as file,
            zstandard.ZstdCompressor(level=3).stream_writer(file) as packed,
            io.TextIOWrapper(packed, encoding="utf-8", newline="\n") as lines,
        ):
            for document in read_documents(part["part"], fields, wanted=positions):
                if isinstance(document, Document):
                    lines.write(json.dumps(_record(document), ensure_ascii=False) + "\n")
                    written += 1
    return written


def _record(document: Document) -> dict[str, Any]:
    metadata = {
        "title": document.title,
        "date": document.date,
        "doc_type": document.doc_type,
        "subject_matter": list(document.subjects),
        "language": document.language,
        "celex": document.celex,
        "in_force": document.in_force,
        "directory_code": document.directory_code,
        "work": document.work,
    }
    known = {key: value for key, value in metadata.items() if value not in (None, "", [])}
    return {"id": document.id, "full_text": document.text, "metadata": known}
