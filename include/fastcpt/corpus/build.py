"""Selected documents -> shards of packed token sequences, ready for training.

Steps, each of which a killed build finds done: the tokenizer (trained where the recipe says so),
overlaps with held-out documents, token ids (``tokens``), the exact cut at the token budget, the
packing plan, the shards, the validation sets, the check of the splits, and the manifest last.
All of it is decided before the work is spread, so that the bytes do not depend on the number of
processes; memory holds one row group a process, whatever the corpus's size.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fastcpt.corpus import leakage
from fastcpt.corpus.documents import Document, files_under, identity, read_documents
from fastcpt.corpus.fingerprint import OVERLAP, spread
from fastcpt.corpus.pack import Packed, pack
from fastcpt.corpus.passages import Stretches, ids_without
from fastcpt.corpus.processes import Progress, cores, in_order, in_processes, over_parts
from fastcpt.corpus.score import hash_of
from fastcpt.corpus.select import funnel_table, take_within
from fastcpt.corpus.tokenizer import (
    TRAINING_CHARACTERS,
    CorpusTokenizer,
    describe,
    faster,
    find_tokenizer,
    train_tokenizer,
    write_tokenizer,
)
from fastcpt.corpus.tokens import TokenFiles, read_index, token_folder, tokenize_part
from fastcpt.files import digest_of, read_json, sha256_of_file, whole_file, write_json
from fastcpt.recipe import Documents, Fields, Recipe

log = logging.getLogger(__name__)

FORMAT = 5
ROWS_OF_GROUP = 256  # sequences read at once when the order is random
MANIFEST = "corpus_manifest.json"

Ints = npt.NDArray[np.int64]

AREAS = pa.list_(pa.string())
SHARD_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("lengths", pa.list_(pa.int32())),
        ("areas", pa.list_(AREAS)),
    ]
)
VALIDATION_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("bytes", pa.int64()),
        ("year", pa.int32()),
        ("doc_type", pa.string()),
        ("areas", AREAS),
    ]
)
HELD_OUT = ("validation", "validation_newest")  # splits, and the names of their folders
GENERAL = "validation_general"  # of the replay's documents, where there is replay
ONE_GENERAL_IN = 16  # is never trained on, whatever the recipe
MOST_GENERAL = 2_000_000  # characters held out, about 450,000 tokens
MOST_LOST = 0.2  # of a held-out set's tokens: its figures would be of another set
MOST_CHARACTERS_A_TOKEN = 8  # more than running text has: enough documents are tokenized for replay
SMALL = 4_000_000  # characters: less is done sooner than processes start and tokenizers compare
PROBE_CHARACTERS = 300_000  # compared before tiktoken is trusted with the corpus


class BuildError(ValueError):
    """The corpus cannot be built from this selection; the message says what to change."""


class LeakError(BuildError):
    """A held-out document, or most of it, is among the training documents."""


def build(
    selection: str, recipe: Recipe, home: Path, processes: int | None = None
) -> dict[str, Any]:
    """Build the corpus of a selection (the ``path`` that ``select`` returned).

    Writes ``home/corpora/<digest>``: ``cpt_train_shard_NN.parquet`` (``input_ids``, ``lengths`` of
    the documents' pieces in them and each piece's ``areas``, null where it is general text),
    ``validation/``, ``validation_newest/`` and, with replay, ``validation_general/`` (a row a
    document), ``tokenizer/``, ``funnel.md`` and ``corpus_manifest.json``, which lists every
    file with its SHA-256. Returns the manifest with ``path`` and ``reused``.
    """
    chosen = read_json(Path(selection) / "manifest.json")
    documents = _Documents.of_selection(Path(selection), chosen, recipe.documents.fields)
    tokenizer = _tokenizer(documents, chosen["digest"], recipe, home)
    replay = _replay_parts(recipe)
    digest = digest_of(
        "build",
        FORMAT,
        chosen["digest"],
        [tokenizer.sha256, tokenizer.bos_id, tokenizer.end_id, tokenizer.pad_id],
        recipe.corpus.model_dump(include={"max_seq_length", "num_shards", "seed"}),
        [recipe.documents.replay.share, replay] if recipe.documents.replay else None,
    )
    folder = home / "corpora" / digest
    if (folder / MANIFEST).exists():
        os.utime(folder)  # as of token ids: used
        return {**read_json(folder / MANIFEST), "path": str(folder), "reused": True}
    result = _build_into(folder, documents, tokenizer, replay, chosen, recipe, home, processes)
    manifest = {"digest": digest, **result}
    with whole_file(folder / "funnel.md") as aside:
        aside.write_text(funnel_table(manifest["funnel"]) + "\n", encoding="utf-8")
    manifest["files"] = _files(folder, [*manifest["shards"], *manifest["validation"]])
    write_json(folder / MANIFEST, manifest)
    log.info("corpus %s:\n%s", digest, funnel_table(manifest["funnel"]))
    return {**manifest, "path": str(folder), "reused": False}


def prepare_tokenizer(selection: str, recipe: Recipe, home: Path) -> None:
    """Train the tokenizer where the recipe says so, and find out how to run it fastest.

    Done once before ``tokenize`` is spread over workers, so that each finds it done.
    """
    chosen = read_json(Path(selection) / "manifest.json")
    documents = _Documents.of_selection(Path(selection), chosen, recipe.documents.fields)
    _tokenizer(documents, chosen["digest"], recipe, home)


def tokenize(
    selection: str,
    parts: Sequence[str],
    recipe: Recipe,
    home: Path,
    processes: int | None = None,
) -> dict[str, Any]:
    """Tokenize a selection's documents of some parts, which ``build`` then finds done.

    Mapped over groups of parts, this spreads the tokenizing over workers that share ``home``.
    Returns ``{documents, tokens}`` that were new.
    """
    chosen = read_json(Path(selection) / "manifest.json")
    documents = _Documents.of_selection(Path(selection), chosen, recipe.documents.fields)
    tokenizer = _tokenizer(documents, chosen["digest"], recipe, home)
    wanted = [number for number, (part, _) in enumerate(documents.parts) if part in parts]
    rows = np.flatnonzero(np.isin(documents.part, wanted))
    return _tokenize(documents, rows, tokenizer, home, processes)


@dataclass
class _Documents:
    """The selection's documents as columns, one entry each; what is dropped here keeps its row."""

    parts: list[tuple[str, str]]  # path, content identity
    fields: Fields
    part: Ints
    position: Ints
    split: npt.NDArray[Any]  # names, of SPLITS or why the build drops it
    rank: Ints
    characters: Ints
    tokens: Ints  # estimated
    about: pa.Table  # id, work, bytes, year, doc_type, areas
    # training documents with the held-out ones whose passages they go without, all by row
    quoted: dict[int, list[int]] = field(default_factory=dict)
    held_out: Ints = field(init=False)  # rows held out at first, some of which may be dropped

    def __post_init__(self) -> None:
        self.held_out = self.rows(*HELD_OUT)

    @classmethod
    def of_selection(cls, folder: Path, manifest: dict[str, Any], fields: Fields) -> _Documents:
        table = pq.read_table(folder / "documents.parquet", filters=pc.field("split").is_valid())
        table = table.sort_by([("part", "ascending"), ("position", "ascending")])
        split = table["split"].cast(pa.string()).combine_chunks().dictionary_encode()
        return cls(
            parts=[(part["part"], part["source"]) for part in manifest["parts"]],
            fields=fields,
            part=table["part"].to_numpy().astype(np.int64),
            position=table["position"].to_numpy(),
            split=np.array(split.dictionary.to_pylist(), dtype=object)[split.indices.to_numpy()],
            rank=table["rank"].to_numpy(),
            characters=table["characters"].to_numpy().astype(np.int64),
            tokens=table["tokens"].to_numpy(),
            about=table.select(["id", "work", "bytes", "year", "doc_type", "areas"]),
        )

    def rows(self, *splits: str) -> Ints:
        return np.flatnonzero(np.isin(self.split, splits))

    def rows_at(self, part: int, positions: Ints) -> Ints:
        """The rows of a part's documents; rows are ordered by part and position."""
        begin, end = np.searchsorted(self.part, [part, part + 1]).tolist()
        rows: Ints = begin + np.searchsorted(self.position[begin:end], positions)
        return rows

    def by_part(self, rows: Ints) -> Iterator[tuple[str, str, Ints]]:
        """Part, its content's identity and the (sorted) rows' positions in it, if there are any."""
        bounds = np.searchsorted(self.part[rows], np.arange(len(self.parts) + 1)).tolist()
        for (part, source), (begin, end) in zip(self.parts, pairwise(bounds), strict=True):
            if begin < end:
                yield part, source, self.position[rows[begin:end]]


def _build_into(
    folder: Path,
    documents: _Documents,
    tokenizer: CorpusTokenizer,
    replay: list[tuple[str, str]],
    chosen: dict[str, Any],
    recipe: Recipe,
    home: Path,
    processes: int | None,
) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    if documents.characters.sum() < SMALL:
        processes = processes or 1
    held_out = folder / ".held_out"
    unseen = _General.held_out(replay, documents, recipe.documents.max_record_mb)
    overlaps = _overlaps(documents, unseen, held_out, processes)
    _drop_overlapping(documents, overlaps)
    unseen.drop(overlaps.spoiled)
    ids = _tokenized(documents, tokenizer, home, processes)
    stretches, cut_off = _without_passages(documents, ids, held_out, tokenizer, processes)
    _cut_at_budget(documents, ids, chosen["target_tokens"])
    train = documents.rows("train")
    _check_splits(documents, overlaps.pairs)
    legal = ids.of(train)
    general = _replay(replay, int(legal.length.sum()), held_out, tokenizer, recipe, home, processes)
    pieces = stretches.pieces(train)
    training = ids.in_pieces(pieces, stretches).and_(general.ids)
    areas = _Areas.of(documents, pieces, len(general.ids.length))
    _check_adapters(areas, recipe)
    plan = _planned(training, recipe)
    shards = _write_shards(folder, plan, training, areas, recipe.corpus.num_shards, processes)
    shutil.rmtree(held_out)
    validation = [
        _write_validation(folder, split, documents.about.take(pa.array(rows)), ids.of(rows))
        for split, rows in ((split, documents.rows(split)) for split in HELD_OUT)
        if len(rows)
    ]
    if len(unseen.about):
        for part, source, positions in unseen.parts:
            tokenize_part(part, source, documents.fields, tokenizer, positions, home)
        of_unseen = _read_ids(unseen.parts, documents.fields, tokenizer, home)
        validation.append(_write_validation(folder, GENERAL, unseen.about, of_unseen))
    write_tokenizer(tokenizer, folder / "tokenizer")
    tokens = int(training.length.sum())
    return {
        "selection": chosen["digest"],
        "recipe": recipe.model_dump(
            mode="json", include={"documents", "score", "selection", "corpus", "tokenizer"}
        ),
        "tokenizer": {
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.end_id,
            "pad_id": tokenizer.pad_id,
        },
        "max_seq_length": recipe.corpus.max_seq_length,
        "tokens": tokens,
        "documents": len(train),
        "sequences": plan.rows,
        "padding_share": 1.0 - tokens / (plan.rows * recipe.corpus.max_seq_length),
        "bytes_per_token": sum(shard["bytes"] for shard in shards) / tokens,
        "replay": {
            "documents": len(general.ids.length),
            "tokens": int(general.ids.length.sum()),
            "share": int(general.ids.length.sum()) / tokens,
        },
        "shards": shards,
        "validation": validation,
        "funnel": _funnel(chosen, documents, ids, general, cut_off),
    }


# Tokenizer


def _tokenizer(
    documents: _Documents, selection: str, recipe: Recipe, home: Path
) -> CorpusTokenizer:
    found = find_tokenizer(recipe) or _trained(documents, selection, recipe, home)
    return _compared(found, documents, home)


def _trained(documents: _Documents, selection: str, recipe: Recipe, home: Path) -> CorpusTokenizer:
    size = recipe.tokenizer.train_vocab_size
    assert size is not None
    folder = home / "tokenizers" / digest_of("tokenizer", FORMAT, selection, size)
    if (folder / "tokenizer.json").exists():
        return describe(folder / "tokenizer.json")
    log.info("training a tokenizer of %d entries", size)
    return train_tokenizer(_training_texts(documents, TRAINING_CHARACTERS), size, folder)


def _compared(tokenizer: CorpusTokenizer, documents: _Documents, home: Path) -> CorpusTokenizer:
    if documents.characters.sum() < SMALL:
        return tokenizer
    return faster(tokenizer, _training_texts(documents, PROBE_CHARACTERS), home)


def _training_texts(documents: _Documents, characters: int) -> Iterator[str]:
    """A sample of the training documents, always the same, of so many characters."""
    rows = documents.rows("train")
    rows = rows[np.argsort(spread(documents.rank[rows], seed=0))]
    enough = np.searchsorted(np.cumsum(documents.characters[rows]), characters)
    for part, _, positions in documents.by_part(np.sort(rows[: enough + 1])):
        yield from _texts(part, documents.fields, positions)


def _texts(part: str, fields: Fields, positions: Ints) -> Iterator[str]:
    wanted = set(positions.tolist())
    for document in read_documents(part, fields, wanted=wanted):
        if isinstance(document, Document):
            yield document.text


# Overlaps with what is held out


class _Overlaps(NamedTuple):
    """What is held out and in training documents too, counted from the texts."""

    pairs: list[tuple[int, int, float]]  # training row, held-out row, share of the former
    formulas: list[tuple[int, float]]  # held-out row, the share of it that is formulas
    spoiled: list[int]  # numbers of the held-out general documents that training ones overlap with


def _overlaps(
    documents: _Documents, unseen: _General, table: Path, processes: int | None
) -> _Overlaps:
    """Compare all training documents with the held-out ones, whose sequences stay in ``table``."""
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
    return _Overlaps(sorted(pairs), list(shares), sorted(spoiled))


def _drop_overlapping(documents: _Documents, overlaps: _Overlaps) -> None:
    """Take what is held out too out of the training set.

    A document that is mostly a held-out one, or of which that is a great part, goes; of a larger
    one only the passages. A held-out document of formulas measures nothing: that one goes.
    """
    held_out = {split: documents.rows(split) for split in HELD_OUT}
    for row, share in overlaps.formulas:
        if share > leakage.MAX_FORMULAS:
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


def _check_loss(documents: _Documents, split: str, rows: Ints) -> None:
    """Fail where a held-out set has lost so much that its figures are those of another set."""
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


def _check_some_left(documents: _Documents) -> None:
    if not len(documents.rows("train", "reserve")):
        dropped = len(documents.rows("overlaps_held_out"))
        raise BuildError(
            f"no training document is left: all {dropped} overlap with held-out documents by more "
            f"than {leakage.MAX_OVERLAP:.0%}. Give more documents, or lower "
            "corpus.validation_share and corpus.newest_share"
        )


def _without_passages(
    documents: _Documents,
    ids: _Ids,
    table: Path,
    tokenizer: CorpusTokenizer,
    processes: int | None,
) -> tuple[Stretches, dict[str, int]]:
    """Cut the passages of held-out documents out of those that stay in training without them.

    Sets their lengths and characters to what is left; returns its place, and what was cut off.
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
    cut_off = {"characters": 0, "tokens": 0}
    for call, results in in_processes(ids_without, calls, processes):
        positions = np.array([position for position, _, _ in results], dtype=np.int64)
        here = documents.rows_at(numbers[parts[call][0]], positions).tolist()
        for row, (_, characters, pieces) in zip(here, results, strict=True):
            if not pieces:
                documents.split[row] = "overlaps_held_out"
                continue
            left[row] = pieces
            length = sum(map(len, pieces))
            cut_off["characters"] += int(documents.characters[row]) - characters
            cut_off["tokens"] += int(ids.length[row]) - length
            documents.characters[row], ids.length[row] = characters, length
    return Stretches.written(table / "stretches", left), cut_off


def _check_splits(documents: _Documents, pairs: list[tuple[int, int, float]]) -> None:
    """Fail where something held out is trained on: a version of the work, or most of its text."""
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


# Tokens


@dataclass
class _Ids:
    """Where token ids are: entry n is one document's."""

    files: list[str]
    file: Ints
    offset: Ints
    length: Ints

    def of(self, rows: Ints) -> _Ids:
        return _Ids(self.files, self.file[rows], self.offset[rows], self.length[rows])

    def in_pieces(self, rows: Ints, stretches: Stretches) -> _Ids:
        """Those of rows that ``stretches`` has given as pieces."""
        ids = self.of(rows)
        ids.files = [*ids.files, str(stretches.file)]
        for row, lengths in stretches.length.items():
            of_row = rows == row
            if of_row.any():
                ids.file[of_row] = len(self.files)
                ids.offset[of_row], ids.length[of_row] = stretches.offset[row], lengths
        return ids

    def and_(self, other: _Ids) -> _Ids:
        return _Ids(
            self.files + other.files,
            np.concatenate([self.file, other.file + len(self.files)]),
            np.concatenate([self.offset, other.offset]),
            np.concatenate([self.length, other.length]),
        )


def _tokenize(
    documents: _Documents,
    rows: Ints,
    tokenizer: CorpusTokenizer,
    home: Path,
    processes: int | None,
) -> dict[str, Any]:
    """Tokenize what of some rows is not tokenized yet; ``{documents, tokens}`` that were new."""
    parts = list(documents.by_part(rows))
    numbers = {path: number for number, (path, _) in enumerate(documents.parts)}
    progress = Progress("tokenize", "characters", float(documents.characters[rows].sum()))
    sizes = [
        int(documents.characters[documents.rows_at(numbers[part], positions)].sum())
        for part, _, positions in parts
    ]
    calls = [
        (part, source, documents.fields, tokenizer, positions, home)
        for part, source, positions in parts
    ]
    done = {"documents": 0, "tokens": 0}
    for call, result in over_parts(tokenize_part, calls, sizes, processes):
        progress.add(sizes[call])
        done = {key: done[key] + result[key] for key in done}
    log.info("tokenized %d documents, %d tokens of them now", len(rows), done["tokens"])
    return done


def _tokenized(
    documents: _Documents, tokenizer: CorpusTokenizer, home: Path, processes: int | None
) -> _Ids:
    """Where the ids of all documents that are still wanted are."""
    rows = np.flatnonzero(~np.isin(documents.split, ["overlaps_held_out", "common_text"]))
    _tokenize(documents, rows, tokenizer, home, processes)
    found = _read_ids(list(documents.by_part(rows)), documents.fields, tokenizer, home)
    nothing = np.zeros(len(documents.split), dtype=np.int64)
    ids = _Ids(found.files, nothing.copy(), nothing.copy(), nothing.copy())
    # rows are ordered by part and position, as the ids that were read are
    ids.file[rows], ids.offset[rows], ids.length[rows] = found.file, found.offset, found.length
    return ids


def _read_ids(
    parts: Sequence[tuple[str, str, Ints]], fields: Fields, tokenizer: CorpusTokenizer, home: Path
) -> _Ids:
    """Where the ids of some parts' documents (by position, which are tokenized) are."""
    ids = _Ids([], *np.empty((3, 0), dtype=np.int64))
    for _, source, positions in parts:
        found = read_index(token_folder(source, fields, tokenizer, home))
        order = np.argsort(found.position, kind="stable")
        at = order[np.searchsorted(found.position[order], positions)]
        ids = ids.and_(_Ids(found.files, found.file[at], found.offset[at], found.length[at]))
    return ids


def _cut_at_budget(documents: _Documents, ids: _Ids, budget: int | None) -> None:
    """Fill the token budget by counted tokens, the held-out documents first.

    Training documents and the reserve are taken from the best rank on, each that still fits.
    """
    rows = documents.rows("train", "reserve")
    if budget is None:
        return
    rows = rows[np.argsort(documents.rank[rows])]
    left = budget - int(ids.length[documents.rows(*HELD_OUT)].sum())
    taken = take_within(ids.length[rows], max(0, left))
    documents.split[rows[taken]] = "train"
    documents.split[rows[~taken]] = "over_budget"
    if not taken.any():
        raise BuildError(
            f"selection.target_tokens ({budget:,}) holds no document; the best has "
            f"{int(ids.length[rows[0]]):,} tokens"
        )


def _replay_parts(recipe: Recipe) -> list[tuple[str, str]]:
    """Files of the general documents with their identities, in an order drawn from them."""
    if recipe.documents.replay is None:
        return []
    parts = files_under(recipe.documents.replay.path, "documents.replay.path")
    return sorted(((part, identity(part)) for part in parts), key=lambda item: digest_of(item[1]))


@dataclass
class _General:
    """General documents that are held out, to measure what the model forgets."""

    parts: list[tuple[str, str, Ints]]  # path, content identity, positions
    about: pa.Table  # a row a document: id, bytes, year, doc_type, areas

    @classmethod
    def held_out(
        cls, parts: Sequence[tuple[str, str]], documents: _Documents, max_record_mb: float
    ) -> _General:
        """The first that the hash of their id holds out, as much text as ``validation`` has."""
        left = min(MOST_GENERAL, int(documents.characters[documents.rows("validation")].sum()))
        found: list[tuple[str, str, Ints]] = []
        about: list[dict[str, Any]] = []
        for part, source in parts:
            positions = []
            every = read_documents(part, documents.fields, max_record_mb=max_record_mb)
            for document in every if left > 0 else ():
                if isinstance(document, Document) and _is_held_out(document):
                    positions.append(document.position)
                    about.append(_about(document))
                    left -= len(document.text)
                if left <= 0:
                    break
            if positions:
                found.append((part, source, np.array(positions)))
        if parts and not about:
            log.warning("the general documents are too few to hold any out: no %s", GENERAL)
        columns = [name for name in VALIDATION_SCHEMA.names if name != "input_ids"]
        schema = pa.schema([VALIDATION_SCHEMA.field(name) for name in columns])
        return cls(found, pa.Table.from_pylist(about, schema=schema))

    def drop(self, numbers: Sequence[int]) -> None:
        """Leave some documents out after all."""
        kept = np.setdiff1d(np.arange(len(self.about)), numbers)
        self.about = self.about.take(pa.array(kept))
        begins = np.cumsum([0, *(len(positions) for _, _, positions in self.parts)])
        self.parts = [
            (part, source, positions[np.isin(begin + np.arange(len(positions)), kept)])
            for begin, (part, source, positions) in zip(begins, self.parts, strict=False)
        ]


def _is_held_out(document: Document) -> bool:
    return hash_of("general", document.id) % ONE_GENERAL_IN == 0


def _about(document: Document) -> dict[str, Any]:
    return {
        "id": document.id,
        "bytes": len(document.text.encode()),
        "year": document.year or 0,
        "doc_type": document.doc_type,
        "areas": [],
    }


class _Replayed(NamedTuple):
    ids: _Ids
    characters: int


def _replay(
    parts: list[tuple[str, str]],
    legal_tokens: int,
    held_out: Path,
    tokenizer: CorpusTokenizer,
    recipe: Recipe,
    home: Path,
    processes: int | None,
) -> _Replayed:
    """General documents of the recipe's share of all training tokens, from as few files.

    Those that overlap with a held-out document, legal or general, are left out.
    """
    chosen = _Ids([], *np.empty((3, 0), dtype=np.int64))
    characters = 0
    if recipe.documents.replay is None:
        return _Replayed(chosen, 0)
    share = recipe.documents.replay.share
    budget = left = math.floor(legal_tokens * share / (1 - share))
    fields = recipe.documents.fields
    for part, source in parts:
        lengths = _first_lengths(part, recipe.documents, left * MOST_CHARACTERS_A_TOKEN)
        positions = np.array(list(lengths), dtype=np.int64)
        matches = leakage.matches(part, fields, positions, held_out)
        copied = leakage.overlaps(matches, held_out).position
        positions = np.setdiff1d(positions, copied)
        tokenize_part(part, source, fields, tokenizer, positions, home, processes or cores())
        found = _read_ids([(part, source, positions)], fields, tokenizer, home)
        taken = np.flatnonzero(take_within(found.length, left))
        chosen = chosen.and_(found.of(taken))
        characters += sum(lengths[position] for position in positions[taken].tolist())
        left -= int(found.length[taken].sum())
        log.info("replay: %d of %d tokens", budget - left, budget)
        if len(taken) < len(positions):
            break
    if left > budget / 10:
        log.warning(
            "documents.replay: the general documents have only %d of the %d tokens that are wanted",
            budget - left,
            budget,
        )
    return _Replayed(chosen, characters)


def _first_lengths(part: str, settings: Documents, characters: int) -> dict[int, int]:
    """A part's first documents that may be trained on, as many as have so many characters.

    Their positions, each with its own characters.
    """
    lengths: dict[int, int] = {}
    for document in read_documents(part, settings.fields, max_record_mb=settings.max_record_mb):
        if isinstance(document, Document) and not _is_held_out(document):
            lengths[document.position] = len(document.text)
            characters -= len(document.text)
        if characters < 0:
            break
    return lengths


# Shards


@dataclass
class _Areas:
    """The areas of the training documents: ``names[code[n]]`` are document n's."""

    names: list[list[str] | None]
    code: Ints

    @classmethod
    def of(cls, documents: _Documents, train: Ints, general: int) -> _Areas:
        """Those of the legal documents; None for the general ones after them."""
        areas = documents.about["areas"]
        numbers: dict[tuple[str, ...], int] = {}
        code = np.empty(len(train) + general, dtype=np.int64)
        for begin in range(0, len(train), 1 << 16):
            some = train[begin : begin + (1 << 16)]
            for n, names in enumerate(areas.take(pa.array(some)).to_pylist(), start=begin):
                code[n] = numbers.setdefault(tuple(names), len(numbers))
        code[len(train) :] = len(numbers)
        return cls([*map(list, numbers), None], code)


def _check_adapters(areas: _Areas, recipe: Recipe) -> None:
    """Fail where an adapter of ``lora.areas`` has nothing to be trained on."""
    there = {subject for names in areas.names for subject in names or ()}
    for adapter, subjects in recipe.lora.areas.items() if recipe.lora else ():
        if there.isdisjoint(subjects):
            raise BuildError(
                f"lora.areas.{adapter}: no training document names {' or '.join(subjects) or 'it'}; "
                "give subject matters that the documents have, or take more documents"
            )


def _planned(training: _Ids, recipe: Recipe) -> Packed:
    """The packing with row n in shard n modulo ``num_shards``, in an order drawn from the seed."""
    size, shards = recipe.corpus.max_seq_length, recipe.corpus.num_shards
    plan = pack(training.length, size)
    if plan.rows < shards:
        raise BuildError(
            f"{int(training.length.sum()):,} tokens make {plan.rows} sequences of {size} for "
            f"{shards} shards; take more documents, or lower corpus.num_shards or max_seq_length"
        )
    drawn = spread(np.arange(plan.rows), recipe.corpus.seed)
    # dealt out from the fullest to the emptiest: shards differ by a row's tokens at most
    tokens = np.bincount(plan.row, weights=plan.length, minlength=plan.rows)
    shard = np.empty(plan.rows, dtype=np.int64)
    shard[np.lexsort((drawn, -tokens))] = np.arange(plan.rows) % shards
    order = np.lexsort((drawn, shard))
    first = np.searchsorted(shard[order], shard[order])
    place = np.empty(plan.rows, dtype=np.int64)
    place[order] = (np.arange(plan.rows) - first) * shards + shard[order]
    row = place[plan.row]
    order = np.argsort(row, kind="stable")
    return Packed(
        row[order], plan.document[order], plan.begin[order], plan.length[order], plan.rows
    )


def _write_shards(
    folder: Path,
    plan: Packed,
    training: _Ids,
    areas: _Areas,
    shards: int,
    processes: int | None,
) -> list[dict[str, Any]]:
    calls = []
    for shard in range(shards):
        pieces = np.flatnonzero(plan.row % shards == shard)
        document = plan.document[pieces]
        calls.append(
            (
                folder / f"cpt_train_shard_{shard:02}.parquet",
                training.files,
                training.file[document],
                training.offset[document] + plan.begin[pieces],
                plan.length[pieces],
                plan.row[pieces],
                areas.code[document],
                areas.names,
            )
        )
    progress = Progress("write", "shards", shards)
    written: list[dict[str, Any]] = [{}] * shards
    for shard, facts in in_processes(write_shard, calls, processes):
        written[shard] = facts
        progress.add(1)
    return written


def write_shard(
    path: Path,
    files: list[str],
    file: Ints,
    offset: Ints,
    length: Ints,
    row: Ints,
    area: Ints,
    areas: list[list[str] | None],
) -> dict[str, Any]:
    """Write one shard from pieces of token files, in order; ``row`` groups them into sequences.

    ``area`` is each piece's place in ``areas``.

    A shard that is there is complete: only its figures are taken again.
    """
    firsts = np.flatnonzero(np.diff(row, prepend=-1))
    names = pa.array(areas, AREAS)
    if not path.exists():
        ends = np.append(firsts[1:], len(row))
        with (
            whole_file(path) as aside,
            _writer(aside, SHARD_SCHEMA) as writer,
            TokenFiles(files) as source,
        ):
            for begin in range(0, len(firsts), ROWS_OF_GROUP):
                some = slice(firsts[begin], ends[min(begin + ROWS_OF_GROUP, len(firsts)) - 1])
                rows = firsts[begin : begin + ROWS_OF_GROUP] - some.start
                values = source.read(file[some], offset[some], length[some])
                pieces = length[some].astype(np.int32)
                tokens_before = np.concatenate([[0], np.cumsum(pieces)])
                writer.write_table(
                    pa.table(
                        [
                            _lists(np.append(tokens_before[rows], len(values)), pa.array(values)),
                            _lists(np.append(rows, len(pieces)), pa.array(pieces)),
                            _lists(np.append(rows, len(pieces)), names.take(pa.array(area[some]))),
                        ],
                        schema=SHARD_SCHEMA,
                    )
                )
    return {
        "file": path.name,
        "rows": len(firsts),
        "tokens": int(length.sum()),
        "bytes": path.stat().st_size,
        "sha256": sha256_of_file(path),
    }


def _lists(offsets: Ints, values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    # a dictionary of a 100,000-entry vocabulary costs more than it saves
    return pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        compression_level=6,
        use_dictionary=False,
        data_page_size=4 << 20,  # a row group in one page, so that zstd sees all of it
    )


def _write_validation(folder: Path, split: str, about: pa.Table, ids: _Ids) -> dict[str, Any]:
    """One set of held-out documents, a row each, in the order of their ids."""
    name = f"{split}/validation_shard_00.parquet"
    names = about["id"].to_pylist()
    order = np.array(sorted(range(len(names)), key=lambda row: names[row]))
    about, ids = about.take(pa.array(order)), ids.of(order)
    with (
        whole_file(folder / name) as aside,
        _writer(aside, VALIDATION_SCHEMA) as writer,
        TokenFiles(ids.files) as source,
    ):
        for begin in range(0, len(order), 64):
            some = slice(begin, begin + 64)
            values = source.read(ids.file[some], ids.offset[some], ids.length[some])
            facts = about.slice(begin, 64)
            offsets = np.concatenate([[0], np.cumsum(ids.length[some])])
            year = facts["year"].cast(pa.int32())
            columns = [
                facts["id"],
                _lists(offsets, pa.array(values)),
                facts["bytes"],
                pc.if_else(pc.equal(year, 0), pa.scalar(None, pa.int32()), year),
                pc.if_else(pc.equal(facts["doc_type"], ""), None, facts["doc_type"]),
                facts["areas"],
            ]
            writer.write_table(pa.table(columns, schema=VALIDATION_SCHEMA))
    path = folder / name
    return {
        "file": name,
        "set": split,
        "rows": len(order),
        "tokens": int(ids.length.sum()),
        "bytes": path.stat().st_size,
        "sha256": sha256_of_file(path),
    }


# Manifest


def _files(folder: Path, known: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every file of the corpus but the manifest: what a transfer has to verify."""
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


def _funnel(
    chosen: dict[str, Any],
    documents: _Documents,
    ids: _Ids,
    general: _Replayed,
    cut_off: dict[str, int],
) -> list[dict[str, Any]]:
    """The selection's funnel with what the build dropped, and what is kept in counted tokens."""
    funnel = [dict(row) for row in chosen["funnel"] if row["stage"] != "kept"]

    def row(stage: str, split: str) -> dict[str, Any]:
        rows = documents.rows(split)
        return {
            "stage": stage,
            "reason": split,
            "documents": len(rows),
            "characters": int(documents.characters[rows].sum()),
            "tokens": int(ids.length[rows].sum()),
        }

    for reason in ("overlaps_held_out", "common_text", "over_budget"):
        if len(documents.rows(reason)):
            funnel.append(row("build", reason))
    if cut_off["tokens"]:
        # passages, of documents that are counted where they are kept
        cut = {"stage": "build", "reason": "quoted_by_held_out", "documents": 0}
        funnel.append({**cut, **cut_off})
    funnel += [row("kept", split) for split in ("train", *HELD_OUT)]
    # the whole is the sum of its parts: kept ones counted, the others as they were estimated
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
