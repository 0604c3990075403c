"""Instructions for supervised fine-tuning: JSONL records -> prompts and responses, split by work.

The held-out ones are for evaluation. All instructions about one work (versions, translations) are on
one side of the split, which depends on the works alone, not on the order of the records.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from fastcpt.corpus.celex import parse_celex
from fastcpt.corpus.documents import (
    DocumentsError,
    Unreadable,
    identity,
    located,
    open_lines,
    unreadable_message,
    value_at,
)
from fastcpt.files import digest_of, read_json, sha256_of_file, whole_file, write_json
from fastcpt.manifests import InstructionsFolder, InstructionsManifest
from fastcpt.recipe import Recipe
from fastcpt.recipe_sections import Documents, Sft

log = logging.getLogger(__name__)

FORMAT = 1


def build_instructions(recipe: Recipe, home: Path) -> InstructionsFolder | None:
    """Write ``train.jsonl`` and ``held_out.jsonl`` (``id``, ``prompt``, ``response``).

    They go into ``home/instructions/<digest>`` with a ``manifest.json`` that lists them. None if the
    recipe has no instructions. ``DocumentsError`` if the file is missing, has too many unreadable
    records, or too few works to hold out.
    """
    settings = recipe.sft
    if settings.instructions is None:
        return None
    system, name = located(settings.instructions)
    if not system.isfile(name):
        raise DocumentsError(
            f"sft.instructions: there is no file '{settings.instructions}'; give a JSONL file "
            "(.gz, .zst), or leave it empty to train without fine-tuning"
        )
    digest = digest_of(
        "instructions",
        FORMAT,
        identity(settings.instructions),
        settings.model_dump(include={"fields", "prompt_template", "held_out"}),
    )
    folder = home / "instructions" / digest
    if (folder / "manifest.json").exists():
        found: InstructionsManifest = read_json(folder / "manifest.json")
        return {**found, "path": str(folder), "reused": True}
    rows, unreadable = _read(settings, recipe.documents)
    train, held_out = _split(rows, settings.held_out)
    for file, part in (("train.jsonl", train), ("held_out.jsonl", held_out)):
        with whole_file(folder / file) as aside:
            aside.write_text(
                "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part),
                encoding="utf-8",
            )
    manifest: InstructionsManifest = {
        "digest": digest,
        "train": len(train),
        "held_out": len(held_out),
        "unreadable": unreadable,
        "files": [
            {
                "file": file,
                "bytes": (folder / file).stat().st_size,
                "sha256": sha256_of_file(folder / file),
            }
            for file in ("train.jsonl", "held_out.jsonl")
        ],
    }
    write_json(folder / "manifest.json", manifest)
    log.info("%d instructions, %d held out, %d set aside", len(train), len(held_out), unreadable)
    return {**manifest, "path": str(folder), "reused": False}


def _read(settings: Sft, documents: Documents) -> tuple[list[dict[str, str]], int]:
    file = settings.instructions
    assert file is not None
    rows: dict[str, dict[str, str]] = {}
    unreadable: list[Unreadable] = []
    total = 0
    limit = documents.max_unreadable_share
    for line, record in open_lines(file, documents.max_record_mb):
        total += 1
        try:
            row = record if isinstance(record, Unreadable) else _row(record, settings)
        except ValueError as error:
            row = Unreadable(file, line, str(error))
        if isinstance(row, Unreadable):
            unreadable.append(row)
        else:
            # duplicates count once
            rows[digest_of(row["prompt"], row["response"])] = row
    if not total:
        raise DocumentsError(f"sft.instructions: '{file}' holds no records")
    if unreadable and len(unreadable) / total > limit:
        raise DocumentsError(unreadable_message(len(unreadable), total, limit, unreadable[0]))
    return [rows[key] for key in sorted(rows, key=lambda key: (rows[key]["id"], key))], len(
        unreadable
    )


def _row(record: Any, settings: Sft) -> dict[str, str]:
    """One instruction; ``ValueError`` says which field is wrong."""
    if not isinstance(record, dict):
        raise ValueError("the record is not an object")
    fields = settings.fields

    def text(path: str, required: bool) -> str:
        value = value_at(record, path)
        if value is None or value == "":
            if required:
                raise ValueError(f"'{path}' is missing or empty")
            return ""
        if isinstance(value, (dict, list, bool)):
            raise ValueError(f"'{path}' is no text")
        return str(value).strip()

    name = text(fields.id, required=False)
    prompt = text(fields.prompt, required=False) if fields.prompt else ""
    if not prompt:
        title = text(fields.title, required="{title}" in settings.prompt_template)
        prompt = settings.prompt_template.replace("{title}", title).replace("{id}", name)
    response = text(fields.response, required=True)
    return {"id": name or digest_of(prompt, response), "prompt": prompt, "response": response}


def _split(
    rows: list[dict[str, str]], held_out: int
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Hold out whole works, in the order of their names' digests, until there are enough instructions."""
    works: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        celex = parse_celex(row["id"])
        works.setdefault(celex.base if celex else row["id"], []).append(row)
    out: list[dict[str, str]] = []
    for work in sorted(works, key=digest_of):
        if len(out) >= held_out:
            break
        out += works.pop(work)
    if not works or len(out) < held_out:
        raise DocumentsError(
            f"sft.held_out: holding out {held_out} of {len(rows)} instructions leaves none "
            "to train on; give more instructions or hold out fewer"
        )
    return [row for work in sorted(works) for row in works[work]], out
