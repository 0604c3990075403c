"""Selected documents -> shards of packed token sequences, ready for training.

Steps: the tokenizer (trained if the recipe says so), overlaps with held-out documents, token ids
(``tokens``), the exact cut at the token budget, the packing plan, the shards, the validation sets, the
check of the splits, and the manifest last. A build that was killed finds the finished steps done.
Everything is decided before the work is distributed, so the bytes do not depend on the number of
processes. Memory holds one row group per process, whatever the corpus's size.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fastcpt.corpus.budget import cut_for, take_within
from fastcpt.corpus.comparison import add_comparison, kept_tokenizer, note_in_ledger
from fastcpt.corpus.dataset_card import dataset_card
from fastcpt.corpus.decontamination import (
    CutOff,
    check_splits,
    cut_passages,
    drop_overlapping,
    find_overlaps,
)
from fastcpt.corpus.documents import spelled
from fastcpt.corpus.fingerprint import spread
from fastcpt.corpus.funnel import funnel_of_build, funnel_table
from fastcpt.corpus.going_on import keep_new
from fastcpt.corpus.passages import Stretches
from fastcpt.corpus.replay import (
    GENERAL,
    GeneralHeldOut,
    choose_replay,
    replay_parts,
)
from fastcpt.corpus.selected import HELD_OUT, BuildError, Selected
from fastcpt.corpus.shards import (
    DocumentAreas,
    check_adapters,
    plan_rows,
    write_shards,
    write_validation,
)
from fastcpt.corpus.token_ids import TokenIds, find_ids, ids_of_all, tokenize_rows
from fastcpt.corpus.tokenizer import (
    TRAINING_CHARACTERS,
    CorpusTokenizer,
    describe,
    faster,
    find_tokenizer,
    train_tokenizer,
    write_tokenizer,
)
from fastcpt.corpus.tokens import tokenize_part
from fastcpt.files import digest_of, read_json, sha256_of_file, whole_file, write_json
from fastcpt.held_out import comparison, frozen_set
from fastcpt.manifests import (
    CorpusFolder,
    CorpusManifest,
    FileEntry,
    HeldOutShard,
    SelectionManifest,
    Tokenized,
)
from fastcpt.recipe import Recipe
from fastcpt.recurring import Start

log = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]

FORMAT = 6
MANIFEST = "corpus_manifest.json"
SECTIONS = {"documents", "score", "selection", "corpus", "tokenizer"}  # the manifest has them
SMALL = 4_000_000  # characters: below this, processes and tiktoken cost more than they save
PROBE_CHARACTERS = 300_000  # encoded both ways before tiktoken is trusted with the corpus


def build(
    selection: str,
    recipe: Recipe,
    home: Path,
    processes: int | None = None,
    start: Start | None = None,
) -> CorpusFolder:
    """Build the corpus of a selection (the ``path`` that ``select`` returned); with ``start`` that of a
    training which goes on from there (``going_on``).

    Writes ``home/corpora/<digest>``: ``cpt_train_shard_NN.parquet`` (``input_ids``, the ``lengths`` of
    the segments in them and each segment's ``areas``, null for general text), ``validation/``,
    ``validation_newest/`` and, with replay, ``validation_general/`` (one row per document),
    ``tokenizer/``, ``funnel.md``, ``README.md`` and ``corpus_manifest.json``.
    """
    chosen: SelectionManifest = read_json(Path(selection) / "manifest.json")
    documents = Selected.of_selection(Path(selection), chosen, recipe.documents.fields)
    tokenizer = _tokenizer(documents, chosen["digest"], recipe, home)
    replay = replay_parts(recipe)
    general = [(spelled(part), source) for part, source in replay]
    digest = digest_of(
        "build",
        FORMAT,
        chosen["digest"],
        [tokenizer.sha256, tokenizer.bos_id, tokenizer.end_id, tokenizer.pad_id],
        recipe.corpus.model_dump(include={"max_seq_length", "num_shards", "seed"}),
        [recipe.documents.replay.share, general] if recipe.documents.replay else None,
        *([start["training"], start["corpora"], recipe.recurring.replay] if start else []),
    )
    folder = home / "corpora" / digest
    if (folder / MANIFEST).exists():
        os.utime(folder)  # marks it as used, for the removal of unused results
        found: CorpusManifest = read_json(folder / MANIFEST)
        return {**found, "path": str(folder), "reused": True}
    current = frozen_set(home, recipe.name) or {"digest": None, "selection": None}
    if chosen["comparison"] != current["digest"] and chosen["digest"] != current["selection"]:
        raise BuildError(
            "the set that models are compared on was frozen or retired since the documents were "
            "selected: select them again (clear select and what follows it)"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if documents.characters.sum() < SMALL:
        processes = processes or 1
    manifest = _build_into(
        folder, digest, documents, tokenizer, replay, chosen, recipe, home, processes, start
    )
    write_tokenizer(tokenizer, folder / "tokenizer")
    with whole_file(folder / "funnel.md") as aside:
        aside.write_text(funnel_table(manifest["funnel"]) + "\n", encoding="utf-8")
    with whole_file(folder / "README.md") as aside:
        aside.write_text(dataset_card(manifest), encoding="utf-8")
    manifest["files"] = _files(folder, [*manifest["shards"], *manifest["validation"]])
    write_json(folder / MANIFEST, manifest)
    log.info("corpus %s:\n%s", digest, funnel_table(manifest["funnel"]))
    return {**manifest, "path": str(folder), "reused": False}


def prepare_tokenizer(selection: str, recipe: Recipe, home: Path) -> None:
    """Train the tokenizer if the recipe says so, and find the fastest way to run it.

    Runs once before ``tokenize`` is distributed over workers, so that they need not.
    """
    chosen: SelectionManifest = read_json(Path(selection) / "manifest.json")
    documents = Selected.of_selection(Path(selection), chosen, recipe.documents.fields)
    _tokenizer(documents, chosen["digest"], recipe, home)


def tokenize(
    selection: str,
    parts: Sequence[str],
    recipe: Recipe,
    home: Path,
    processes: int | None = None,
) -> Tokenized:
    """Tokenize a selection's documents of some parts, ahead of ``build``.

    Mapped over groups of parts, this distributes tokenizing over workers that share ``home``.
    """
    chosen: SelectionManifest = read_json(Path(selection) / "manifest.json")
    documents = Selected.of_selection(Path(selection), chosen, recipe.documents.fields)
    tokenizer = _tokenizer(documents, chosen["digest"], recipe, home)
    wanted = [number for number, (part, _) in enumerate(documents.parts) if part in parts]
    rows = np.flatnonzero(np.isin(documents.part, wanted))
    return tokenize_rows(documents, rows, tokenizer, home, processes)


def _build_into(
    folder: Path,
    digest: str,
    documents: Selected,
    tokenizer: CorpusTokenizer,
    replay: list[tuple[str, str]],
    chosen: SelectionManifest,
    recipe: Recipe,
    home: Path,
    processes: int | None,
    start: Start | None,
) -> CorpusManifest:
    held_out = folder / ".held_out"
    if chosen["comparison"]:
        add_comparison(documents, comparison(home, recipe.name), held_out / "comparison.jsonl")
    unseen = GeneralHeldOut.drawn(replay, documents, recipe.documents.max_record_mb)
    overlaps = find_overlaps(documents, unseen, held_out, processes)
    drop_overlapping(documents, overlaps)
    unseen.drop(overlaps.spoiled)
    ids = ids_of_all(documents, tokenizer, home, processes)
    stretches, cut_off = cut_passages(documents, ids, held_out, tokenizer, processes)
    cut = _cut_at_budget(documents, ids, chosen)
    lengths = ids.length if cut is None else np.minimum(ids.length, cut)
    gone_on = keep_new(documents, lengths, start, recipe, home) if start else None
    train = documents.rows("train")
    check_splits(documents, overlaps.pairs)
    segments, training = _segments(train, ids, stretches, cut)
    cut_short = _shorten(documents, ids, train, cut)
    general = choose_replay(
        replay, int(training.length.sum()), held_out, tokenizer, recipe, home, processes
    )
    training = training.and_(general.ids)
    areas = DocumentAreas.of(documents, segments, len(general.ids.length))
    check_adapters(areas, recipe)
    plan = plan_rows(training, recipe)
    shards = write_shards(folder, plan, training, areas, recipe.corpus.num_shards, processes)
    validation = _write_validation_sets(folder, documents, ids, unseen, tokenizer, home)
    held_out_before = note_in_ledger(folder.name, documents, home)
    shutil.rmtree(held_out)
    tokens = int(training.length.sum())
    return {
        "digest": digest,
        "selection": chosen["digest"],
        "recipe": recipe.model_dump(mode="json", include=SECTIONS),
        "tokenizer": tokenizer.facts(),
        "max_seq_length": recipe.corpus.max_seq_length,
        "tokens": tokens,
        "documents": len(train),
        "max_document_tokens": cut,
        "sequences": plan.rows,
        "padding_share": 1.0 - tokens / (plan.rows * recipe.corpus.max_seq_length),
        "bytes_per_token": sum(shard["bytes"] for shard in shards) / tokens,
        "replay": general.facts(tokens),
        "gone_on": gone_on,
        "held_out_before": held_out_before,
        "shards": shards,
        "validation": validation,
        "funnel": funnel_of_build(chosen, documents, ids, general, cut_off, cut_short),
        "files": [],  # filled in once the last of them is written
    }


def _segments(
    train: Ints, ids: TokenIds, stretches: Stretches, cut: int | None
) -> tuple[Ints, TokenIds]:
    """The rows to train on, one per segment, and the segments' ids; at most ``cut`` tokens of a row."""
    segments = stretches.segments(train)
    training = ids.in_segments(segments, stretches)
    return (segments, training) if cut is None else training.first_of_each(segments, cut)


def _write_validation_sets(
    folder: Path,
    documents: Selected,
    ids: TokenIds,
    unseen: GeneralHeldOut,
    tokenizer: CorpusTokenizer,
    home: Path,
) -> list[HeldOutShard]:
    written = [
        write_validation(folder, split, documents.about.take(pa.array(rows)), ids.of(rows))
        for split, rows in ((split, documents.rows(split)) for split in HELD_OUT)
        if len(rows)
    ]
    if len(unseen.about):
        for part, source, positions in unseen.parts:
            tokenize_part(part, source, documents.fields, tokenizer, positions, home)
        of_unseen = find_ids(unseen.parts, documents.fields, tokenizer, home)
        written.append(write_validation(folder, GENERAL, unseen.about, of_unseen))
    return written


# Tokenizer


def _tokenizer(documents: Selected, selection: str, recipe: Recipe, home: Path) -> CorpusTokenizer:
    found = kept_tokenizer(find_tokenizer(recipe), recipe, home)
    return _compared(found or _trained(documents, selection, recipe, home), documents, home)


def _trained(documents: Selected, selection: str, recipe: Recipe, home: Path) -> CorpusTokenizer:
    size = recipe.tokenizer.train_vocab_size
    assert size is not None
    folder = home / "tokenizers" / digest_of("tokenizer", FORMAT, selection, size)
    if (folder / "tokenizer.json").exists():
        return describe(folder / "tokenizer.json")
    log.info("training a tokenizer of %d entries", size)
    return train_tokenizer(_training_texts(documents, TRAINING_CHARACTERS), size, folder)


def _compared(tokenizer: CorpusTokenizer, documents: Selected, home: Path) -> CorpusTokenizer:
    if documents.characters.sum() < SMALL:
        return tokenizer
    return faster(tokenizer, _training_texts(documents, PROBE_CHARACTERS), home)


def _training_texts(documents: Selected, characters: int) -> Iterator[str]:
    """A reproducible sample of the training documents, of about ``characters`` characters."""
    rows = documents.rows("train")
    rows = rows[np.argsort(spread(documents.rank[rows], seed=0))]
    enough = np.searchsorted(np.cumsum(documents.characters[rows]), characters)
    yield from documents.texts(np.sort(rows[: enough + 1]))


def _cut_at_budget(documents: Selected, ids: TokenIds, chosen: SelectionManifest) -> int | None:
    """Fill the token budget by exact counts, after the held-out documents.

    Training documents and the reserve are taken from the best rank on, each that still fits; or all are
    taken and cut at the length that fills the budget. Returns the most tokens per document, if limited.
    """
    rows = documents.rows("train", "reserve")
    budget, cut = chosen["target_tokens"], chosen.get("max_document_tokens")
    if budget is None:
        return cut
    rows = rows[np.argsort(documents.rank[rows])]
    left = max(0, budget - int(ids.length[documents.rows(*HELD_OUT)].sum()))
    if chosen.get("cut_fills_target"):
        cut = cut_for(ids.length[rows], left)
        if cut < 1:
            raise BuildError(
                f"selection.target_tokens ({budget:,}) has no room for training documents beside the "
                f"held-out ones ({budget - left:,} tokens)"
            )
        return cut if cut < ids.length[rows].max() else None
    lengths = ids.length[rows] if cut is None else np.minimum(ids.length[rows], cut)
    taken = take_within(lengths, left)
    documents.split[rows[taken]] = "train"
    documents.split[rows[~taken]] = "over_budget"
    if not taken.any():
        raise BuildError(
            f"selection.target_tokens ({budget:,}) holds no document; the best has "
            f"{int(lengths[0]):,} tokens"
        )
    return cut


def _shorten(documents: Selected, ids: TokenIds, train: Ints, cut: int | None) -> CutOff:
    """Set the lengths of documents that are cut; returns what is cut off (characters pro rata)."""
    length = ids.length[train]
    left = length if cut is None else np.minimum(length, cut)
    characters = documents.characters[train]
    kept = characters * left // length
    ids.length[train], documents.characters[train] = left, kept
    return CutOff(int((characters - kept).sum()), int((length - left).sum()))


# Manifest


def _files(folder: Path, known: Sequence[FileEntry]) -> list[FileEntry]:
    """Every file of the corpus except the manifest, for a transfer to verify."""
    digests = {item["file"]: item["sha256"] for item in known}
    names = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".") and path.name != MANIFEST
    )
    return [
        {
            "file": name,
            "bytes": (folder / name).stat().st_size,
            "sha256": digests.get(name) or sha256_of_file(folder / name),
        }
        for name in names
    ]
