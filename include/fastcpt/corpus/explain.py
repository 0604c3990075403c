"""Explains a document's score and its outcome."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fastcpt.corpus.score import LEGAL_COMPONENTS, PUBLISHED_COMPONENTS
from fastcpt.files import read_json
from fastcpt.manifests import SelectionManifest
from fastcpt.recipe import Recipe


class UnknownDocumentError(ValueError):
    """No document of the selection has this id."""


def explain(identifier: str, selection: str, recipe: Recipe) -> str:
    """Every record with an id: its score's components, weights and points, and its outcome.

    ``selection`` is the ``path`` that ``select`` returned for the same recipe.
    """
    manifest: SelectionManifest = read_json(Path(selection) / "manifest.json")
    found = pq.read_table(
        Path(selection) / "documents.parquet", filters=pc.field("id") == identifier
    ).to_pylist()
    if not found:
        raise UnknownDocumentError(
            f"no readable document has the id '{identifier}' among the {manifest['documents']} of "
            f"this selection ({manifest['unreadable']} records could not be read)"
        )
    return "\n\n".join(_one(row, manifest, recipe) for row in found)


def _one(row: dict[str, Any], selection: SelectionManifest, recipe: Recipe) -> str:
    part = selection["parts"][row["part"]]
    legal = recipe.score.method == "legal"
    names = LEGAL_COMPONENTS if legal else PUBLISHED_COMPONENTS
    table = pq.read_table(
        Path(part["scores"]) / "scores.parquet", filters=pc.field("position") == row["position"]
    ).to_pylist()[0]
    values = {name: float(table[f"score_{name}"]) for name in names}
    if legal:
        values |= {"recency": row["recency"], "citations": row["citations"]}
    weights = recipe.score.weights.model_dump() if legal else dict.fromkeys(names, 1.0)
    lines = [
        f"{row['id']}: {table['title'][:90] or 'no title'}",
        f"{part['part']}, record {row['position'] + 1}; {row['characters']:,} characters, "
        f"about {row['tokens']:,} tokens, {row['doc_type'] or 'no kind'}, "
        f"year {row['year'] or 'unknown'}, work {row['work']}",
        f"subject matters: {', '.join(table['subjects']) or 'none'}; "
        f"counted as: {', '.join(table['areas']) or 'none'}",
        "",
        f"{'component':<16}{'value':>8}{'weight':>9}{'points':>9}",
    ]
    for name in weights:
        lines.append(
            f"{name:<16}{values[name]:>8.3f}{weights[name]:>9.1f}"
            f"{values[name] * weights[name]:>9.2f}"
        )
    lines += [f"{'score':<16}{row['score']:>26.2f}", ""]
    if same := selection.get("same_for_all"):
        lines.append(f"the same for all documents, so without effect: {', '.join(same)}")
    lines.append(_outcome(row, selection.get("max_document_tokens")))
    return "\n".join(lines)


def _outcome(row: dict[str, Any], cut: int | None) -> str:
    if row["reason"]:
        of = f" of {row['duplicate_of']}" if row["duplicate_of"] else ""
        return f"not taken: {row['reason']}{of} (rank {row['rank'] + 1})"
    outcome = f"taken for {row['split']}, rank {row['rank'] + 1}"
    if cut is None or row["tokens"] <= cut or row["split"] not in ("train", "reserve"):
        return outcome
    return f"{outcome}: its first {cut:,} tokens, as of every longer document"


def ends_of_ranking(selection: str, count: int = 5) -> dict[str, list[dict[str, Any]]]:
    """The ``best`` and the ``worst`` documents that were taken, each best first.

    ``selection`` is the ``path`` that ``select`` returned. Empty if nothing was ranked.
    """
    file, taken = Path(selection) / "documents.parquet", pc.field("split") == "train"
    ranks = pq.read_table(file, columns=["rank"], filters=taken & (pc.field("rank") >= 0))["rank"]
    ordered = np.sort(ranks.to_numpy())
    worst = ordered[count:][-count:]  # no document is in both lists
    parts = read_json(Path(selection) / "manifest.json")["parts"]
    return {
        "best": _with_titles(file, ordered[:count].tolist(), parts),
        "worst": _with_titles(file, worst.tolist(), parts),
    }


def _with_titles(file: Path, ranks: list[int], parts: list[Any]) -> list[dict[str, Any]]:
    columns = ["id", "year", "score", "tokens", "rank", "part", "position"]
    wanted = pc.field("rank").isin(ranks) & (pc.field("split") == "train")
    table = pq.read_table(file, columns=columns, filters=wanted).sort_by("rank")
    rows: list[dict[str, Any]] = table.to_pylist()
    for row in rows:
        scores = Path(parts[row.pop("part")]["scores"]) / "scores.parquet"
        at = pc.field("position") == row.pop("position")
        title = pq.read_table(scores, columns=["title"], filters=at)["title"][0].as_py()
        row["title"] = (title or "")[:120]
    return rows
