"""Scores documents: one column per component, in tables apart from the documents.

``score_part`` reads one part and writes one table. A component of the ``legal`` score is in 0..1. The
selection multiplies it by its weight in the recipe, so new weights need no new scoring. Two components
depend on the whole corpus (recency relative to its newest year, citations received); the selection
computes them from this table. docs/corpus.md defines all.

The ``published`` score is the sum of the published guide's points.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastcpt.corpus.celex import Celex, parse_celex
from fastcpt.corpus.documents import (
    Document,
    Unreadable,
    identity,
    in_batches,
    read_documents,
    size_of,
)
from fastcpt.corpus.fingerprint import BINS, Fingerprint, fingerprint
from fastcpt.corpus.named_acts import amended, cited, own_names
from fastcpt.corpus.processes import in_order, over_parts
from fastcpt.corpus.wording import without_accents, wording
from fastcpt.files import digest_of, hash_of, read_json, whole_file, write_json
from fastcpt.manifests import ScoresFolder, ScoresManifest
from fastcpt.progress import Progress
from fastcpt.recipe import Recipe
from fastcpt.recipe_score import Score

log = logging.getLogger(__name__)

# Increased when a column's meaning changes, so that old tables are scored again.
FORMAT = 4
ROW_GROUP = 4096
SHOWN_UNREADABLE = 1000  # unreadable records listed per part; all are counted
EXCERPT = 2000  # characters
TITLE = 500  # characters

LEGAL_COMPONENTS = (
    "kind_of_act",
    "subject_matter",
    "length",
    "running_text",
    "boilerplate",
    "in_force",
    "language",
)
PUBLISHED_COMPONENTS = ("year", "type", "length", "subject")

_COLUMNS = {
    "position": pa.int64(),
    "id": pa.string(),
    "id_hash": pa.uint64(),
    "content": pa.uint64(),  # of the text: equal texts, equal values
    "work": pa.string(),  # base CELEX, else the document's own name of its work, else its id
    "named": pa.bool_(),  # whether `work` is one of the first two
    "work_hash": pa.uint64(),
    "version": pa.int32(),  # yyyymmdd of a consolidated version, else 0
    "version_of": pa.uint64(),  # versions of one act in one language share it
    "date": pa.int32(),  # yyyymmdd, 0 where missing
    "year": pa.int16(),  # of the date, else of the CELEX number, else 0
    "act_year": pa.int16(),  # of the original act, for later versions too
    "doc_type": pa.string(),
    "title": pa.string(),
    "subjects": pa.list_(pa.string()),
    "directory_code": pa.string(),
    "areas": pa.list_(pa.string()),  # the recipe's subjects that it matches
    "language": pa.string(),
    "characters": pa.int32(),
    "bytes": pa.int64(),
    "words": pa.int32(),
    "pieces": pa.int32(),
    "cites": pa.list_(pa.uint64()),  # works and names of acts
    "own_names": pa.list_(pa.uint64()),
    "amends": pa.list_(pa.uint64()),
    "signature": pa.binary(BINS * 2),
    "sketch": pa.list_(pa.uint64()),
    "excerpt": pa.string(),  # for one document in sixteen: the selection counts its tokens
}


def score_schema(method: str) -> pa.Schema:
    """Columns of the table that ``score_part`` writes."""
    components = LEGAL_COMPONENTS if method == "legal" else PUBLISHED_COMPONENTS
    columns = [(f"score_{name}", pa.float32()) for name in components]
    return pa.schema([*_COLUMNS.items(), *columns])


def score_part(part: str, recipe: Recipe, home: Path, processes: int = 1) -> ScoresFolder:
    """Score every document of a part, or return the result of an earlier run.

    The folder ``home/scores/<digest>`` has ``scores.parquet``, ``unreadable.json`` and
    ``manifest.json``. Its digest covers the part's content, the field mapping and the score's settings,
    but not weights, thresholds and other settings of the selection. Unreadable records are counted here;
    ``select`` checks their share of the whole corpus.
    """
    settings = recipe.score
    source = identity(part)
    digest = digest_of(
        "score",
        FORMAT,
        source,
        recipe.documents.fields.model_dump(),
        recipe.documents.max_record_mb,
        settings.model_dump(exclude={"weights", "law"}),
    )
    folder = home / "scores" / digest
    manifest = folder / "manifest.json"
    if manifest.exists():
        found: ScoresManifest = read_json(manifest)
        if found["part"] != part:  # the same content under another name
            found["part"] = part
            write_json(manifest, found)
        os.utime(folder)  # used: see scripts/remove_unused.py
        return {**found, "path": str(folder), "reused": True}
    documents, unreadable, characters = _score_into(folder, part, recipe, processes)
    result: ScoresManifest = {
        "digest": digest,
        "part": part,
        "source": source,
        "method": settings.method,
        "documents": documents,
        "unreadable": unreadable,
        "characters": characters,
    }
    write_json(manifest, result)
    return {**result, "path": str(folder), "reused": False}


def score_parts(
    parts: Sequence[str], recipe: Recipe, home: Path, processes: int | None = None
) -> list[ScoresFolder]:
    """``score_part`` of every part, one process per core; results in the parts' order."""
    progress = Progress("score", "parts", len(parts))
    results: dict[int, ScoresFolder] = {}
    calls = [(part, recipe, home) for part in parts]
    sizes = [size_of(part) for part in parts]
    for number, result in over_parts(score_part, calls, sizes, processes):
        results[number] = result
        progress.add(1)
    return [results[number] for number in range(len(parts))]


def _score_into(folder: Path, part: str, recipe: Recipe, processes: int) -> tuple[int, int, int]:
    """Write the scores; the numbers of documents, records set aside and characters."""
    schema = score_schema(recipe.score.method)
    unreadable: list[Unreadable] = []
    documents = set_aside = characters = 0
    progress = Progress(f"score {part.rsplit('/', 1)[-1]}", "bytes", size_of(part))

    def readable() -> Iterator[Document]:
        nonlocal set_aside
        settings = recipe.documents
        for document in read_documents(part, settings.fields, progress, settings.max_record_mb):
            if isinstance(document, Document):
                yield document
            else:
                set_aside += 1
                if len(unreadable) < SHOWN_UNREADABLE:
                    unreadable.append(document)

    calls = ((batch, recipe.score) for batch in in_batches(readable()))
    rows: list[dict[str, Any]] = []
    with (
        whole_file(folder / "scores.parquet") as aside,
        pq.ParquetWriter(aside, schema, compression="zstd") as writer,
    ):
        for scored in in_order(score_documents, calls, processes):
            rows += scored
            documents += len(scored)
            characters += sum(row["characters"] for row in scored)
            while len(rows) >= ROW_GROUP:
                writer.write_table(pa.Table.from_pylist(rows[:ROW_GROUP], schema=schema))
                rows = rows[ROW_GROUP:]
        if rows or not documents:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    write_json(
        folder / "unreadable.json",
        [{"file": item.file, "line": item.line, "reason": item.reason} for item in unreadable],
    )
    log.info("%s: %d documents, %d set aside", part, documents, set_aside)
    return documents, set_aside, characters


def score_documents(documents: Sequence[Document], settings: Score) -> list[dict[str, Any]]:
    """``score_document`` of some documents."""
    return [score_document(document, settings) for document in documents]


def score_document(document: Document, settings: Score) -> dict[str, Any]:
    """One row of the score table."""
    celex = parse_celex(document.celex) or parse_celex(document.id)
    figures = fingerprint(document.text)
    content = document.text.encode("utf-8")
    date = _date_number(document.date)
    year = document.year or (celex.year if celex else 0)
    work = celex.base if celex else document.work or document.id
    # a corrigendum is not a version of the act, but is in the same split by `work`
    version_of = document.id if celex is None or celex.corrigendum else work + celex.part
    language = (document.language or "").lower()
    title = document.title[:TITLE]
    names = own_names(title, settings)
    itself = {hash_of(work), *names}
    row = {
        "position": document.position,
        "id": document.id,
        "id_hash": hash_of(document.id),
        "content": int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little"),
        "work": work,
        "named": bool(celex or document.work),
        "work_hash": hash_of(work),
        "version": celex.version if celex else 0,
        "version_of": hash_of(version_of, language),
        "date": date,
        "year": year,
        "act_year": celex.year if celex and celex.year else year,
        "doc_type": kind_name(document.doc_type),
        "title": title,
        "subjects": list(document.subjects),
        "directory_code": document.directory_code,
        "areas": areas_of(document, settings),
        "language": language,
        "characters": len(document.text),
        "bytes": len(content),
        "words": figures.words,
        "pieces": figures.pieces,
        "cites": sorted(cited(document.text, settings) - itself),
        "own_names": sorted(names),
        "amends": sorted(amended(title, settings) - itself),
        "signature": figures.signature.tobytes(),
        "sketch": figures.sketch.tolist(),
        "excerpt": _excerpt(document.text, hash_of(document.id)),
    }
    if settings.method == "published":
        components = published_points(document, year)
    else:
        components = legal_components(document, celex, figures, settings)
    return row | {f"score_{name}": value for name, value in components.items()}


def _excerpt(text: str, chosen: int) -> str | None:
    if chosen % 16:
        return None
    begin = (chosen >> 8) % max(1, len(text) - EXCERPT)
    return text[begin : begin + EXCERPT]


def _date_number(date: str | None) -> int:
    found = re.match(r"(\d{4})-(\d\d)-(\d\d)", date or "")
    return int("".join(found.groups())) if found else 0


def kind_name(kind: str) -> str:
    """A kind of act as documents and recipes are compared: lower case, words joined by ``_``."""
    return re.sub(r"[\s_-]+", "_", kind.strip().lower())


# The published score


def published_points(document: Document, year: int) -> dict[str, float]:
    """The guide's points; their sum is the score. ``year`` is 0 if unknown."""
    characters = len(document.text)
    kind = kind_name(document.doc_type)
    subjects = " ".join(document.subjects).lower()
    named = ("data protection", "consumer", "environment", "digital")
    return {
        "year": 100.0 if year >= 2020 else 50.0 if year >= 2015 else 0.0,
        "type": {"regulation": 80.0, "directive": 60.0}.get(kind, 0.0),
        "length": 40.0 if characters > 5000 else 20.0 if characters > 2000 else 0.0,
        "subject": 30.0 if any(name in subjects for name in named) else 0.0,
    }


# The legal score


def legal_components(
    document: Document, celex: Celex | None, figures: Fingerprint, settings: Score
) -> dict[str, float]:
    """The components that depend on one document alone, each in 0..1."""
    language = (document.language or "").lower()
    in_force = {True: 1.0, False: 0.0, None: 0.5}[document.in_force]
    return {
        "kind_of_act": kind_of_act(document, celex, settings.kinds),
        "subject_matter": max(
            (settings.subjects[area] for area in areas_of(document, settings)), default=0.0
        ),
        # a notice of 50 words has no legal content; beyond 2,000 words, length adds nothing
        "length": _ramp(math.log(max(figures.words, 1)), math.log(50), math.log(2000)),
        "running_text": figures.running / len(document.text),
        "boilerplate": 1.0 - _ramp(formula_share(document.text), 0.0, 0.1),
        "in_force": in_force,
        "language": 0.5 if not language else 1.0 if language in settings.languages else 0.0,
    }


def _ramp(value: float, low: float, high: float) -> float:
    return min(1.0, max(0.0, (value - low) / (high - low)))


UNKNOWN_KIND = 0.3
_KIND_OF_LETTER = {"R": "regulation", "L": "directive", "D": "decision", "F": "framework_decision"}
_KIND_OF_SECTOR = {"1": "treaty", "2": "agreement", "6": "judgment"}


@lru_cache(maxsize=4096)
def _kind_key(name: str) -> str:
    return without_accents(kind_name(name))


def kind_of_act(document: Document, celex: Celex | None, kinds: Mapping[str, float]) -> float:
    """Binding force and generality of the act, 0..1 (``score.kinds``); accents are ignored."""
    values = {_kind_key(kind): value for kind, value in kinds.items()}
    if celex and celex.corrigendum:
        return values.get("corrigendum", 0.1)
    kind = _kind_key(document.doc_type)
    if kind not in values and celex:
        by_letter = _KIND_OF_LETTER.get(celex.type, "") if celex.sector in "03" else ""
        kind = by_letter or _KIND_OF_SECTOR.get(celex.sector, kind)
    value = values.get(kind, UNKNOWN_KIND)
    # secondary acts fill in details: lists, tariffs, single authorisations
    title = document.title[:100].lower()
    return value * (0.7 if "implementing" in title else 0.85 if "delegated" in title else 1.0)


# Chapters of the Directory of European Union legislation, as words for an act's topic.
_CHAPTERS = {
    "02": "customs union free movement of goods",
    "03": "agriculture",
    "04": "fisheries",
    "05": "employment workers social policy",
    "06": "establishment services",
    "06.20.20": "financial services",
    "07": "transport",
    "08": "competition",
    "09": "taxation",
    "10": "monetary policy capital",
    "11": "external relations",
    "12": "energy",
    "13": "industrial policy internal market",
    "14": "regional policy",
    "15.10": "environment",
    "15.20": "consumer protection",
    "15.30": "public health",
    "16": "science information education culture",
    "17": "undertakings",
    "18": "foreign security policy",
    "19": "freedom security justice",
}


def areas_of(document: Document, settings: Score) -> list[str]:
    """The recipe's subjects that the document's subject matters, title or directory code name."""
    named = naming(document.subjects, document.title[:TITLE], document.directory_code)
    return named_in(named, settings.subjects)


def naming(subjects: Sequence[str], title: str, directory_code: str | None) -> str:
    """A document's subject matters, chapter and title, normalised for ``named_in``."""
    code = directory_code or ""
    chapters = [_CHAPTERS[key] for key in _CHAPTERS if code.startswith(key)]
    return f" {' | '.join(map(wording, (*subjects, *chapters, title)))} "


def named_in(named: str, subjects: Iterable[str]) -> list[str]:
    """The ``subjects`` that a document names.

    Whole words are compared, without case and plural s: "Consumers" names "consumer", "consumerism" does
    not.
    """
    return [subject for subject in subjects if f" {wording(subject)} " in named]


# Formulas of acts and page furniture of EUR-Lex, without legal content.
_FORMULAS = (
    "Important legal notice",
    "Avis juridique important",
    "Official Journal of the European",
    "This document is meant purely as a documentation tool",
    "This text is meant purely as a documentation tool",
    "binding in its entirety and directly applicable in",
    "shall enter into force on the twentieth day following",
    "The High Contracting Parties",
    "Having regard to the Treaty",
    "Having regard to the proposal from",
    "Having regard to the opinion of",
    "Acting in accordance with the",
    "HAVE ADOPTED THIS",
    "HAS ADOPTED THIS",
    "This Directive is addressed to the Member States",
    "This Decision is addressed to the Member States",
    "Done at ",
    "For the Council",
    "For the Commission",
    "For the European Parliament",
    "The President",
)


def formula_share(text: str) -> float:
    """Share of a text's characters that are formulas and page furniture."""
    return sum(text.count(formula) * len(formula) for formula in _FORMULAS) / len(text)
