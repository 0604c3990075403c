"""Selects documents, gives a reason for each one dropped, and holds some out.

It reads only the score tables, column by column, so ten million documents fit on one machine. The steps,
with the reasons for dropping a document:

1. duplicates: the same id again (``superseded``), the same text (``exact_duplicate``), an older
   version of an act (``older_version``), nearly the same text (``near_duplicate``)
2. what the recipe excludes: ``too_short``, ``too_old``, ``other_kind``, ``other_subject``
3. from the best score down: ``below_threshold``, ``outside_top_share``, ``over_budget``; or all
   documents are kept, each cut short (``selection.max_document_tokens``)
4. splits, by work: works held out by their hash, then the newest acts; the rest is for training

The result depends neither on the order of the files nor on the number of processes.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcpt.corpus.budget import fill, tokens_per_piece
from fastcpt.corpus.comparison import kept_tokenizer
from fastcpt.corpus.documents import DocumentsError, Unreadable, spelled, unreadable_message
from fastcpt.corpus.duplicates import SignatureStore, groups_of
from fastcpt.corpus.funnel import funnel_of_selection, funnel_table
from fastcpt.corpus.ranking import rank_by_score
from fastcpt.corpus.score_columns import (
    REASONS,
    SPLITS,
    ScoreColumns,
    ids_of,
    sketches_of,
)
from fastcpt.corpus.selection_table import subjects_of_adapters, write_selection
from fastcpt.corpus.splits import Frozen, split_by_work
from fastcpt.corpus.tokenizer import CorpusTokenizer, find_tokenizer
from fastcpt.corpus.works import contained
from fastcpt.files import digest_of, read_json, write_json
from fastcpt.held_out import frozen_set
from fastcpt.manifests import (
    ScoresFolder,
    ScoresManifest,
    SelectedPart,
    SelectionFolder,
    SelectionManifest,
)
from fastcpt.recipe import Recipe

log = logging.getLogger(__name__)

FORMAT = 4

Ints = npt.NDArray[np.int64]


class SelectionError(ValueError):
    """Nothing can be selected; the message says why documents were dropped."""


def select(scores: Sequence[str], recipe: Recipe, home: Path) -> SelectionFolder:
    """Select documents from score tables, given by their folders (``score_part``'s ``path``).

    Writes ``home/selections/<digest>/documents.parquet`` (one row per document, with its reason or its
    split) and ``manifest.json``. Raises ``DocumentsError`` above ``documents.max_unreadable_share``,
    ``SelectionError`` if nothing is left, ``TokenizerError`` if the recipe's tokenizer is missing,
    ``BuildError`` if it is not the champion's.
    """
    tables = sorted(map(_table, scores), key=lambda table: (spelled(table["part"]), table["part"]))
    _check_readable(tables, recipe.documents.max_unreadable_share)
    tokenizer, current = find_tokenizer(recipe), frozen_set(home, recipe.name)
    digest = _name(tables, recipe, tokenizer)
    if current and current["selection"] == digest:
        current = None  # the set was frozen from this very selection: it holds out the same
    elif current:
        tokenizer = kept_tokenizer(tokenizer, recipe, home)
        digest = _name(tables, recipe, tokenizer, current["digest"])
    folder = home / "selections" / digest
    if (folder / "manifest.json").exists():
        found: SelectionManifest = read_json(folder / "manifest.json")
        os.utime(folder)  # used: see scripts/remove_unused.py
        # the parts' names may be spelled differently now
        parts: list[SelectedPart] = [
            {**part, "part": table["part"]}
            for part, table in zip(found["parts"], tables, strict=True)
        ]
        if parts != found["parts"]:
            found["parts"] = parts
            write_json(folder / "manifest.json", found)
        return {**found, "path": str(folder), "reused": True}
    shutil.rmtree(folder, ignore_errors=True)
    scratch = folder / "scratch"
    try:
        frozen = Frozen.of(home, recipe.name, current["digest"]) if current else None
        manifest = _select_into(folder, scratch, digest, tables, recipe, tokenizer, frozen)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    write_json(folder / "manifest.json", manifest)
    log.info("selection %s:\n%s", digest, funnel_table(manifest["funnel"]))
    return {**manifest, "path": str(folder), "reused": False}


def _name(
    tables: Sequence[ScoresFolder],
    recipe: Recipe,
    tokenizer: CorpusTokenizer | None,
    *frozen: str,
) -> str:
    """The digest of everything that a selection depends on."""
    return digest_of(
        "select",
        FORMAT,
        [(table["digest"], spelled(table["part"])) for table in tables],
        *_settings(recipe),
        recipe.corpus.model_dump(
            include={"validation_share", "newest_share", "validation_tokens", "seed"}
        ),
        tokenizer.sha256 if tokenizer else "untrained",
        subjects_of_adapters(recipe),
        *frozen,
    )


def _settings(recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe's settings for the digest; defaults are left out so that older digests stay valid."""
    score, selection = recipe.score.model_dump(exclude={"law"}), recipe.selection.model_dump()
    fills = selection["top_share"] or selection["target_tokens"]
    cut = selection["max_document_tokens"]
    if cut is None or (cut == "auto" and not fills):
        del selection["max_document_tokens"]
    return score, selection


def _table(path: str) -> ScoresFolder:
    manifest: ScoresManifest = read_json(Path(path) / "manifest.json")
    return {**manifest, "path": str(path), "reused": True}


def _check_readable(tables: Sequence[ScoresFolder], limit: float) -> None:
    unreadable = sum(table["unreadable"] for table in tables)
    total = unreadable + sum(table["documents"] for table in tables)
    if total == 0:
        raise DocumentsError("the documents' files hold no records at all")
    if unreadable and unreadable / total > limit:
        worst = next(table for table in tables if table["unreadable"])
        first = read_json(Path(worst["path"]) / "unreadable.json")[0]
        raise DocumentsError(unreadable_message(unreadable, total, limit, Unreadable(**first)))


def _select_into(
    folder: Path,
    scratch: Path,
    digest: str,
    tables: Sequence[ScoresFolder],
    recipe: Recipe,
    tokenizer: CorpusTokenizer | None,
    frozen: Frozen | None,
) -> SelectionManifest:
    store = SignatureStore(scratch, recipe.selection.near_duplicate_threshold)
    try:
        corpus = ScoreColumns(tables, recipe, store)
        duplicate_of, pairs = _drop_duplicates(corpus, store)
    finally:
        store.close()
    _warn_of_odd_dates(tables, corpus)
    ratio = tokens_per_piece(tables, tokenizer)
    rank_by_score(corpus, tables, recipe)
    same = _same_for_all(corpus)
    _drop_unwanted(corpus, recipe)
    taken, reserve, cut, by_target = fill(corpus, recipe, ratio, exact=tokenizer is not None)
    rows = np.sort(np.concatenate([taken, reserve]))
    within = contained(rows, corpus.named[rows], lambda: sketches_of(tables, rows))
    joined = np.concatenate([pairs, within])
    split_by_work(corpus, taken, reserve, joined, corpus.tokens(ratio), recipe, frozen)
    if not np.any(corpus.split == SPLITS.index("train")):
        raise SelectionError(_why_empty(corpus))
    funnel = funnel_of_selection(tables, corpus, ratio)
    of_adapters = subjects_of_adapters(recipe)
    write_selection(folder / "documents.parquet", tables, corpus, duplicate_of, ratio, of_adapters)
    kept = corpus.reason == 0
    return {
        "digest": digest,
        "parts": [
            {
                "part": table["part"],
                "source": table["source"],
                "digest": table["digest"],
                "scores": table["path"],
                "kept": int(kept[corpus.part == n].sum()),
            }
            for n, table in enumerate(tables)
        ],
        "documents": len(kept),
        "unreadable": sum(table["unreadable"] for table in tables),
        "kept": int(kept.sum()) - int((corpus.split == SPLITS.index("reserve")).sum()),
        "tokens": int(corpus.tokens(ratio)[kept].sum()),
        "tokens_per_piece": ratio,
        "target_tokens": recipe.selection.target_tokens,
        "max_document_tokens": cut,
        "cut_fills_target": by_target,
        "comparison": frozen.digest if frozen else None,
        "newest_year": corpus.newest_year,
        "oddly_dated": len(corpus.oddly_dated),
        "same_for_all": same,
        "funnel": funnel,
    }


def _same_for_all(corpus: ScoreColumns) -> list[str]:
    """Components of the score with one value for all documents."""
    same = corpus.same_for_all()
    if same and len(corpus.part) > 1:
        log.info(
            "the same for all documents, so without effect on their order: %s", ", ".join(same)
        )
    return same


def _warn_of_odd_dates(tables: Sequence[ScoresFolder], corpus: ScoreColumns) -> None:
    rows = corpus.oddly_dated
    if len(rows):
        log.warning(
            "%d documents are dated after %d, the newest plausible year of this corpus; "
            "they count as not dated. The first: %s",
            len(rows),
            corpus.newest_year,
            ", ".join(f"'{name}'" for name in ids_of(tables, rows[:5]).values()),
        )


# Duplicates


def _drop_duplicates(corpus: ScoreColumns, store: SignatureStore) -> tuple[Ints, Ints]:
    """Drop all but the best of each group of duplicates.

    Returns for each row the row that it duplicates (-1: none), and the near-duplicate pairs.
    """
    duplicate_of = np.full(len(corpus.part), -1, dtype=np.int64)
    # of records with one id keep the newest, else the one read last
    again = np.lexsort((-corpus.position, -corpus.part, -corpus.date.astype(np.int64)))
    _keep_first(corpus, corpus.id_hash, again, "superseded", duplicate_of)
    # the newest version, then the newest date, then the longest text
    best_first = np.lexsort(
        (
            corpus.id_hash,
            -corpus.characters.astype(np.int64),
            -corpus.date.astype(np.int64),
            -corpus.version.astype(np.int64),
        )
    )
    _keep_first(corpus, corpus.content, best_first, "exact_duplicate", duplicate_of)
    _keep_first(corpus, corpus.version_of, best_first, "older_version", duplicate_of)
    preferred = best_first[corpus.reason[best_first] == 0]
    pairs = store.pairs(preferred)
    place = np.full(len(corpus.part), -1, dtype=np.int64)
    place[preferred] = np.arange(len(preferred))
    for member, first in groups_of(place[pairs]).items():
        if member != first:
            duplicate_of[preferred[member]] = preferred[first]
            corpus.reason[preferred[member]] = REASONS.index("near_duplicate")
    return duplicate_of, pairs


def _keep_first(
    corpus: ScoreColumns,
    key: npt.NDArray[np.uint64],
    best_first: Ints,
    reason: str,
    duplicate_of: Ints,
) -> None:
    """Of the remaining rows with equal keys, keep the one that comes first in ``best_first``."""
    rows = best_first[corpus.reason[best_first] == 0]
    if not len(rows):
        return
    rows = rows[np.argsort(key[rows], kind="stable")]
    begins = np.concatenate([[True], key[rows[1:]] != key[rows[:-1]]])
    firsts = rows[np.maximum.accumulate(np.where(begins, np.arange(len(rows)), 0))]
    duplicate_of[rows[~begins]] = firsts[~begins]
    corpus.drop(rows[~begins], reason)


# Wanted or not


def _drop_unwanted(corpus: ScoreColumns, recipe: Recipe) -> None:
    selection = recipe.selection
    corpus.drop(corpus.characters < selection.min_characters, "too_short")
    if selection.min_year:
        corpus.drop(corpus.year < selection.min_year, "too_old")
    corpus.drop(~corpus.of_wanted_kind, "other_kind")
    corpus.drop(~corpus.of_wanted_subject, "other_subject")
    if selection.quality_threshold is not None:
        corpus.drop(corpus.score < selection.quality_threshold, "below_threshold")


def _why_empty(corpus: ScoreColumns) -> str:
    reasons = Counter(REASONS[code] for code in corpus.reason.tolist())
    taken = reasons.pop("", 0)
    if taken:
        return (
            f"only {taken} of {len(corpus.reason)} documents are left, too few to hold some out "
            "and train on others: lower selection.quality_threshold or raise the budget"
        )
    why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    return (
        f"the selection is empty: of {len(corpus.reason)} documents {why} (highest score "
        f"{corpus.score.max():.1f}); loosen the recipe's selection section"
        if len(corpus.reason)
        else "the selection is empty: there is no readable document"
    )
