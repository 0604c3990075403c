"""The funnel: documents, characters and tokens that each step drops, and what is kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fastcpt.corpus.decontamination import CutOff
from fastcpt.corpus.replay import Replayed
from fastcpt.corpus.score_columns import REASONS, SPLITS, ScoreColumns
from fastcpt.corpus.selected import HELD_OUT, Selected
from fastcpt.corpus.token_ids import TokenIds
from fastcpt.manifests import FunnelRow, ScoresFolder, SelectionManifest

Bools = npt.NDArray[np.bool_]


def funnel_of_selection(
    tables: Sequence[ScoresFolder], corpus: ScoreColumns, ratio: float
) -> list[FunnelRow]:
    """Documents, characters and estimated tokens of each stage and reason."""
    tokens = corpus.tokens(ratio)

    def row(stage: str, reason: str, rows: Bools) -> FunnelRow:
        return {
            "stage": stage,
            "reason": reason,
            "documents": int(rows.sum()),
            "characters": int(corpus.characters[rows].sum(dtype=np.int64)),
            "tokens": int(tokens[rows].sum()),
        }

    unreadable = sum(table["unreadable"] for table in tables)
    none = np.zeros(len(tokens), dtype=bool)
    funnel: list[FunnelRow] = [{**row("read", "unreadable", none), "documents": unreadable}]
    funnel.append(row("read", "", np.ones(len(tokens), dtype=bool)))
    for code, reason in enumerate(REASONS[1:], start=1):
        rows = corpus.reason == code
        if rows.any():
            stage = "duplicates" if code <= 4 else "selection" if code <= 11 else "splits"
            funnel.append(row(stage, reason, rows))
    for code, split in enumerate(SPLITS[1:], start=1):
        funnel.append(row("kept", split, corpus.split == code))
    return funnel


def funnel_of_build(
    chosen: SelectionManifest,
    documents: Selected,
    ids: TokenIds,
    general: Replayed,
    cut_off: CutOff,
    cut_short: CutOff,
) -> list[FunnelRow]:
    """The selection's funnel with what the build dropped, and what is kept in counted tokens."""
    funnel: list[FunnelRow] = [{**row} for row in chosen["funnel"] if row["stage"] != "kept"]

    def row(stage: str, split: str) -> FunnelRow:
        rows = documents.rows(split)
        return {
            "stage": stage,
            "reason": split,
            "documents": len(rows),
            "characters": int(documents.characters[rows].sum()),
            "tokens": int(ids.length[rows].sum()),
        }

    for reason in ("overlaps_held_out", "common_text", "over_budget", "trained_on_before"):
        if len(documents.rows(reason)):
            funnel.append(row("build", reason))
    for reason, cut in (("quoted_by_held_out", cut_off), ("cut_short", cut_short)):
        if cut.tokens:
            funnel.append(
                {
                    "stage": "build",
                    "reason": reason,
                    "documents": 0,  # only parts of documents, which are counted as kept
                    "characters": cut.characters,
                    "tokens": cut.tokens,
                }
            )
    funnel += [row("kept", split) for split in ("train", *HELD_OUT)]
    # the total is the sum of the rows: counted tokens of kept documents, estimates for the others
    everything = next(row for row in funnel if row["stage"] == "read" and not row["reason"])
    everything["tokens"] = sum(row["tokens"] for row in funnel if row["stage"] != "read")
    if len(general.ids.length):
        funnel.append(
            {
                "stage": "kept",
                "reason": "replay",
                "documents": len(general.ids.length),
                "characters": general.characters,
                "tokens": int(general.ids.length.sum()),
            }
        )
    return funnel


def funnel_table(funnel: Sequence[FunnelRow]) -> str:
    """The funnel as a Markdown table."""
    lines = [
        "| stage | reason or split | documents | characters | tokens |",
        "|---|---|---:|---:|---:|",
    ]
    lines += [
        f"| {row['stage']} | {row['reason'] or 'all'} | {row['documents']:,} "
        f"| {row['characters']:,} | {row['tokens']:,} |"
        for row in funnel
    ]
    return "\n".join(lines)
