"""Decontamination: removes held-out text from training, as whole documents or as shared passages.

``leakage`` compares the texts. This module applies its findings to a selection and checks the result
before anything is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fastcpt.corpus import leakage
from fastcpt.corpus.fingerprint import OVERLAP
from fastcpt.corpus.passages import Stretches, ids_without
from fastcpt.corpus.processes import in_order, in_processes
from fastcpt.corpus.replay import GeneralHeldOut
from fastcpt.corpus.selected import HELD_OUT, BuildError, Selected
from fastcpt.corpus.token_ids import TokenIds
from fastcpt.corpus.tokenizer import CorpusTokenizer
from fastcpt.progress import Progress

Ints = npt.NDArray[np.int64]

MOST_LOST = 0.2  # of a held-out set's tokens; after a larger loss its figures describe another set


class LeakError(BuildError):
    """A held-out document, or most of it, is among the training documents."""


class CutOff(NamedTuple):
    """What was cut off documents that stay in training."""

    characters: int
    tokens: int


class HeldOutOverlaps(NamedTuple):
    """Overlaps between training and held-out documents, counted from the texts."""

    pairs: list[tuple[int, int, float]]  # training row, held-out row, share of the former
    formulas: list[tuple[int, float]]  # held-out row, its share of boilerplate
    spoiled: list[int]  # numbers of the held-out general documents that overlap with training ones


def find_overlaps(
    documents: Selected, unseen: GeneralHeldOut, table: Path, processes: int | None
) -> HeldOutOverlaps:
    """Compare all training documents with the held-out ones; writes the latter's n-grams to ``table``."""
    held_out = documents.held_out
    found = [
        (part, documents.fields, positions)
        for part, _, positions in [*documents.by_part(held_out), *unseen.parts]
    ]
    sequences = in_order(leakage.held_out_sequences, found, processes)
    leakage.write_table(table, [item for _, items in sequences for item in items])
    parts = list(documents.by_part(documents.rows("train", "reserve")))
    progress = Progress("overlaps with held-out documents", "documents", len(documents.split))
    numbers = {path: number for number, (path, _) in enumerate(documents.parts)}
    matches: dict[int, leakage.Matches] = {}
    against = [(part, documents.fields, positions, table) for part, _, positions in parts]
    for call, result in in_processes(leakage.matches, against, processes):
        matches[call] = result
        progress.add(len(parts[call][2]))
    formulas = leakage.write_formulas(table, list(matches.values()))
    pairs: list[tuple[int, int, float]] = []
    spoiled = set(np.flatnonzero(formulas[len(held_out) :] > leakage.MAX_FORMULAS).tolist())
    for call, some in sorted(matches.items()):
        result = leakage.overlaps(some, table)
        rows = documents.rows_at(numbers[parts[call][0]], result.position)
        for row, other, share in zip(rows, result.held_out, result.of_own, strict=True):
            if other < len(held_out):
                pairs.append((int(row), int(held_out[other]), float(share)))
            else:
                spoiled.add(int(other) - len(held_out))
    shares = zip(held_out.tolist(), formulas.tolist(), strict=False)
    return HeldOutOverlaps(sorted(pairs), list(shares), sorted(spoiled))


def drop_overlapping(documents: Selected, overlaps: HeldOutOverlaps) -> None:
    """Remove held-out text from the training set.

    A training document goes if more than ``MAX_OVERLAP`` of it is held out; a larger one loses only the
    shared passages. A held-out document that is mostly boilerplate measures nothing and goes itself.
    """
    held_out = {split: documents.rows(split) for split in HELD_OUT}
    for row, share in overlaps.formulas:
        if share > leakage.MAX_FORMULAS and row not in documents.frozen:
            documents.split[row] = "common_text"
    for split, rows in held_out.items():
        _check_loss(documents, split, rows)
    for row, other, of_own in overlaps.pairs:
        if documents.split[other] == "common_text":
            continue
        if of_own > leakage.MAX_OVERLAP:
            documents.split[row] = "overlaps_held_out"
        documents.quoted.setdefault(row, []).append(other)
    documents.quoted = {
        row: others
        for row, others in documents.quoted.items()
        if documents.split[row] != "overlaps_held_out"
    }
    _check_some_left(documents)


def _check_loss(documents: Selected, split: str, rows: Ints) -> None:
    """Raise ``BuildError`` if a held-out set lost so much that its figures describe another set."""
    lost = rows[documents.split[rows] == "common_text"]
    share = documents.tokens[lost].sum() / max(1, documents.tokens[rows].sum())
    if share < MOST_LOST:
        return
    ids = documents.about["id"].take(pa.array(lost[:3])).to_pylist()
    named = ", ".join(f"'{name}'" for name in ids)
    raise BuildError(
        f"{split} would lose {len(lost)} of {len(rows)} documents, {share:.0%} of its tokens: more "
        f"than {leakage.MAX_FORMULAS:.0%} of each stands in more than {leakage.FORMULA_DOCUMENTS} "
        f"other documents, and measures nothing (the first: {named}). "
        "Take the text that repeats out of the documents, or raise selection.min_characters so that "
        "documents made of it are left out"
    )


def _check_some_left(documents: Selected) -> None:
    if not len(documents.rows("train", "reserve")):
        dropped = len(documents.rows("overlaps_held_out"))
        raise BuildError(
            f"no training document is left: all {dropped} overlap with held-out documents by more "
            f"than {leakage.MAX_OVERLAP:.0%}. Give more documents, or lower "
            "corpus.validation_share and corpus.newest_share"
        )


def cut_passages(
    documents: Selected,
    ids: TokenIds,
    table: Path,
    tokenizer: CorpusTokenizer,
    processes: int | None,
) -> tuple[Stretches, CutOff]:
    """Cut passages of held-out documents out of training documents that stay.

    Sets lengths and characters to what is left; returns where the rest's ids are, and what was cut off.
    """
    rows = np.array(sorted(documents.quoted), dtype=np.int64)
    held_out = {row: n for n, row in enumerate(documents.held_out.tolist())}
    parts = list(documents.by_part(rows))
    numbers = {path: number for number, (path, _) in enumerate(documents.parts)}
    calls = []
    for part, _, positions in parts:
        here = documents.rows_at(numbers[part], positions).tolist()
        quoted = {
            position: [held_out[other] for other in documents.quoted[row]]
            for position, row in zip(positions.tolist(), here, strict=True)
        }
        calls.append((part, documents.fields, quoted, table, tokenizer))
    left: dict[int, list[npt.NDArray[np.int32]]] = {}
    cut_off = CutOff(0, 0)
    for call, results in in_processes(ids_without, calls, processes):
        positions = np.array([position for position, _, _ in results], dtype=np.int64)
        here = documents.rows_at(numbers[parts[call][0]], positions).tolist()
        for row, (_, characters, segments) in zip(here, results, strict=True):
            if not segments:
                documents.split[row] = "overlaps_held_out"
                continue
            left[row] = segments
            length = sum(map(len, segments))
            cut_off = CutOff(
                cut_off.characters + int(documents.characters[row]) - characters,
                cut_off.tokens + int(ids.length[row]) - length,
            )
            documents.characters[row], ids.length[row] = characters, length
    return Stretches.written(table / "stretches", left), cut_off


def check_splits(documents: Selected, pairs: list[tuple[int, int, float]]) -> None:
    """Raise ``LeakError`` if training has a version of a held-out work, or most of its text."""
    ids, works = documents.about["id"], documents.about["work"]
    train, held_out = documents.rows("train"), documents.rows(*HELD_OUT)
    on_both_sides = pc.is_in(works.take(pa.array(train)), works.take(pa.array(held_out)))
    for row in train[np.asarray(on_both_sides)][:1].tolist():
        of_work = pc.equal(works.take(pa.array(held_out)), works[row])
        other = held_out[np.asarray(of_work)][0]
        raise LeakError(
            f"held-out '{ids[other]}' and training document '{ids[row]}' are of one work, "
            f"{works[row]}"
        )
    for row, other, _ in pairs:
        cut_out = other in documents.quoted.get(row, ())
        if not cut_out and documents.split[row] == "train" and documents.split[other] in HELD_OUT:
            raise LeakError(
                f"training document '{ids[row]}' and held-out '{ids[other]}' share more than "
                f"{leakage.MAX_OVERLAP:.0%} of their {OVERLAP}-word sequences"
            )
