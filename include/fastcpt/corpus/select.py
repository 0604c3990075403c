"""Which documents are taken, why the others are not, and which are held out.

Works on the score tables alone, column by column, so that ten million documents fit on one
machine. The order of steps, each with its reason for a document that ends there:

1. duplicates: the same id again (``superseded``), the same text (``exact_duplicate``), an older
   version of an act (``older_version``), nearly the same text (``near_duplicate``)
2. what the recipe does not want: ``too_short``, ``too_old``, ``other_kind``, ``other_subject``
3. from the best score down: ``below_threshold``, ``outside_top_share``, ``over_budget``
4. splits, by work: the newest acts, then others at random; the rest is for training

The outcome depends neither on the order of the files nor on processes. Equal scores: the newer
document first, then the lesser hash of the id.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fastcpt.corpus.dates import newest_plausible
from fastcpt.corpus.documents import DocumentsError, Unreadable, spelled, unreadable_message
from fastcpt.corpus.duplicates import SignatureStore, groups_of
from fastcpt.corpus.fingerprint import BINS, pieces_of
from fastcpt.corpus.processes import Progress
from fastcpt.corpus.score import LEGAL_COMPONENTS, PUBLISHED_COMPONENTS, named_in, naming
from fastcpt.corpus.tokenizer import CorpusTokenizer, find_tokenizer
from fastcpt.corpus.works import contained
from fastcpt.files import digest_of, read_json, whole_file, write_json
from fastcpt.recipe import Recipe

log = logging.getLogger(__name__)

FORMAT = 3
BATCH = 65_536
HALF_LIFE_YEARS = 15.0  # an act this much older than the corpus's newest has half its recency
TOKENS_PER_PIECE = 1.15  # where there is no tokenizer yet
SAMPLED = 512  # excerpts whose tokens are counted for the estimate
# Documents beyond the estimated budget that are tokenized too, so that the counted budget is full
RESERVE, RESERVE_UNTRAINED = 0.05, 0.35

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

REASONS = (
    "",
    "superseded",
    "exact_duplicate",
    "older_version",
    "near_duplicate",
    "too_short",
    "too_old",
    "other_kind",
    "other_subject",
    "below_threshold",
    "outside_top_share",
    "over_budget",
    "of_a_held_out_work",
)
SPLITS = ("", "train", "validation", "validation_newest", "reserve")

SELECTION_SCHEMA = pa.schema(
    [
        ("part", pa.int32()),  # index into the manifest's parts
        ("position", pa.int64()),
        ("id", pa.string()),
        ("work", pa.string()),
        ("score", pa.float64()),
        ("recency", pa.float32()),
        ("citations", pa.float32()),
        ("reason", pa.dictionary(pa.int8(), pa.string())),  # null: taken
        ("split", pa.dictionary(pa.int8(), pa.string())),  # null: not taken
        ("rank", pa.int64()),  # 0 is the best; -1: not ranked
        ("duplicate_of", pa.string()),
        ("tokens", pa.int64()),  # estimated
        ("characters", pa.int32()),
        ("bytes", pa.int64()),
        ("year", pa.int16()),
        ("doc_type", pa.string()),
        ("areas", pa.list_(pa.string())),
    ]
)


class SelectionError(ValueError):
    """Nothing can be selected; the message says what the documents failed at."""


def select(scores: Sequence[str], recipe: Recipe, home: Path) -> dict[str, Any]:
    """Select documents from score tables, given by their folders (``score_part``'s ``path``).

    Writes ``home/selections/<digest>/documents.parquet`` (a row a document, with its reason or
    its split) and ``manifest.json``. Returns the manifest with ``path`` and ``reused``. Raises
    ``DocumentsError`` above ``documents.max_unreadable_share``, ``SelectionError`` where nothing
    is left, ``TokenizerError`` where the recipe's tokenizer is missing.
    """
    tables = sorted(
        (dict(read_json(Path(path) / "manifest.json"), path=str(path)) for path in scores),
        key=lambda table: (spelled(table["part"]), table["part"]),
    )
    _check_readable(tables, recipe.documents.max_unreadable_share)
    tokenizer = find_tokenizer(recipe)
    digest = digest_of(
        "select",
        FORMAT,
        [(table["digest"], spelled(table["part"])) for table in tables],
        recipe.score.model_dump(),
        recipe.selection.model_dump(),
        recipe.corpus.model_dump(
            include={"validation_share", "newest_share", "validation_tokens", "seed"}
        ),
        tokenizer.sha256 if tokenizer else "untrained",
        _subjects_of_adapters(recipe),
    )
    folder = home / "selections" / digest
    if (folder / "manifest.json").exists():
        found = read_json(folder / "manifest.json")
        # the same names may be spelled another way by now
        parts = [
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
        result = _select_into(folder, scratch, tables, recipe, tokenizer)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    manifest = {"digest": digest, **result}
    write_json(folder / "manifest.json", manifest)
    log.info("selection %s:\n%s", digest, funnel_table(manifest["funnel"]))
    return {**manifest, "path": str(folder), "reused": False}


def _check_readable(tables: Sequence[dict[str, Any]], limit: float) -> None:
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
    tables: Sequence[dict[str, Any]],
    recipe: Recipe,
    tokenizer: CorpusTokenizer | None,
) -> dict[str, Any]:
    store = SignatureStore(scratch, recipe.selection.near_duplicate_threshold)
    try:
        corpus = _Corpus(tables, recipe, store)
        duplicate_of, pairs = _drop_duplicates(corpus, store)
    finally:
        store.close()
    _warn_of_odd_dates(tables, corpus)
    ratio = tokens_per_piece(tables, tokenizer)
    corpus.rank_by_score(tables, recipe)
    _drop_unwanted(corpus, recipe)
    taken, reserve = _fill(corpus, recipe, ratio, exact=tokenizer is not None)
    rows = np.sort(np.concatenate([taken, reserve]))
    within = contained(rows, corpus.named[rows], lambda: _sketches(tables, rows))
    joined = np.concatenate([pairs, within])
    _split(corpus, taken, reserve, joined, corpus.tokens(ratio), recipe)
    if not np.any(corpus.split == SPLITS.index("train")):
        raise SelectionError(_why_empty(corpus))
    funnel = _funnel(tables, corpus, ratio)
    of_adapters = _subjects_of_adapters(recipe)
    _write(folder / "documents.parquet", tables, corpus, duplicate_of, ratio, of_adapters)
    kept = corpus.reason == 0
    return {
        "parts": [
            {key: table[key] for key in ("part", "source", "digest")}
            | {"scores": table["path"], "kept": int(kept[corpus.part == n].sum())}
            for n, table in enumerate(tables)
        ],
        "documents": len(kept),
        "unreadable": sum(table["unreadable"] for table in tables),
        "kept": int(kept.sum()) - int((corpus.split == SPLITS.index("reserve")).sum()),
        "tokens": int(corpus.tokens(ratio)[kept].sum()),
        "tokens_per_piece": ratio,
        "target_tokens": recipe.selection.target_tokens,
        "newest_year": corpus.newest_year,
        "oddly_dated": len(corpus.oddly_dated),
        "funnel": funnel,
    }


def _warn_of_odd_dates(tables: Sequence[dict[str, Any]], corpus: _Corpus) -> None:
    rows = corpus.oddly_dated
    if len(rows):
        log.warning(
            "%d documents are dated after %d, the newest year that is believed of this corpus; "
            "they count as not dated. The first: %s",
            len(rows),
            corpus.newest_year,
            ", ".join(f"'{name}'" for name in _ids_of(tables, rows[:5]).values()),
        )


class _Corpus:
    """The score tables' numbers as columns, one entry a document, parts in their names' order."""

    def __init__(self, tables: Sequence[dict[str, Any]], recipe: Recipe, store: SignatureStore):
        count = sum(table["documents"] for table in tables)
        columns = {name: np.empty(count, dtype) for name, dtype in _NUMBERS.items()}
        self.part = np.empty(count, dtype=np.int32)
        self.of_wanted_kind = np.empty(count, dtype=bool)
        self.of_wanted_subject = np.empty(count, dtype=bool)
        self.score = np.empty(count, dtype=np.float64)
        progress = Progress("read scores", "documents", count)
        row = 0
        for number, table in enumerate(tables):
            for batch in _batches(table, [*_NUMBERS, *_WANTED, *_components(recipe)]):
                rows = slice(row, row + batch.num_rows)
                row += batch.num_rows
                for name, column in columns.items():
                    column[rows] = _numbers(batch, name)
                self.part[rows] = number
                self.of_wanted_kind[rows] = _of_wanted_kind(batch, recipe)
                self.of_wanted_subject[rows] = _of_wanted_subject(batch, recipe)
                self.score[rows] = _points(batch, recipe)
                store.append(_signatures(batch))
                progress.add(batch.num_rows)
        self.position, self.id_hash = columns["position"], columns["id_hash"]
        self.content, self.work = columns["content"], columns["work_hash"]
        self.named = columns["named"]
        self.version, self.version_of = columns["version"], columns["version_of"]
        self.date, self.year, self.act_year = columns["date"], columns["year"], columns["act_year"]
        self.characters, self.pieces = columns["characters"], columns["pieces"]
        self.reason = np.zeros(count, dtype=np.int8)
        self.split = np.zeros(count, dtype=np.int8)
        self.rank = np.full(count, -1, dtype=np.int64)
        self.recency = np.zeros(count, dtype=np.float32)
        self.citations = np.zeros(count, dtype=np.float32)
        self.newest_year = newest_plausible(self.year)
        self.oddly_dated = self._forget_odd_dates()

    def _forget_odd_dates(self) -> Ints:
        """Rows whose date lies after the newest believable year: they count as not dated."""
        odd = np.flatnonzero(self.year > self.newest_year)
        self.date[odd] = 0
        # a CELEX number says the act's year too
        act_year = self.act_year[odd]
        self.act_year[odd] = np.where(act_year > self.newest_year, 0, act_year)
        self.year[odd] = self.act_year[odd]
        return odd

    def alive(self) -> Ints:
        """Rows that no step has dropped yet."""
        return np.flatnonzero(self.reason == 0)

    def drop(self, rows: Ints | Bools, reason: str) -> None:
        """Give rows that are still alive a reason."""
        if rows.dtype == bool:
            rows = np.flatnonzero(rows)
        rows = rows[self.reason[rows] == 0]
        self.reason[rows] = REASONS.index(reason)

    def tokens(self, ratio: float) -> Ints:
        """Estimated tokens, BOS and end of text among them."""
        return np.ceil(self.pieces * ratio).astype(np.int64) + 2

    def rank_by_score(self, tables: Sequence[dict[str, Any]], recipe: Recipe) -> None:
        """Add the components that depend on the corpus, then order by score."""
        if recipe.score.method == "legal":
            weights = recipe.score.weights
            age = np.maximum(0, self.newest_year - self.year)
            # no date, no judgement: the middle
            recency = np.where(self.year > 0, 0.5 ** (age / HALF_LIFE_YEARS), 0.5)
            self.recency = recency.astype(np.float32)
            self.citations = _citations(tables, self).astype(np.float32)
            self.score = (
                self.score
                + weights.recency * self.recency.astype(np.float64)
                + weights.citations * self.citations.astype(np.float64)
            )
        order = np.lexsort((self.position, self.id_hash, -self.date.astype(np.int64), -self.score))
        self.rank[order] = np.arange(len(order))


_NUMBERS: dict[str, Any] = {
    "position": np.int64,
    "id_hash": np.uint64,
    "content": np.uint64,
    "work_hash": np.uint64,
    "named": bool,
    "version": np.int32,
    "version_of": np.uint64,
    "date": np.int32,
    "year": np.int16,
    "act_year": np.int16,
    "characters": np.int32,
    "pieces": np.int32,
}
_NAMING = ("subjects", "title", "directory_code")
_WANTED = ("doc_type", "signature", *_NAMING)


def _components(recipe: Recipe) -> list[str]:
    names = LEGAL_COMPONENTS if recipe.score.method == "legal" else PUBLISHED_COMPONENTS
    return [f"score_{name}" for name in names]


def _batches(table: dict[str, Any], columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(Path(table["path"]) / "scores.parquet") as file:
        yield from file.iter_batches(batch_size=BATCH, columns=list(columns))


def _numbers(batch: pa.RecordBatch, name: str) -> Any:
    return batch.column(name).to_numpy(zero_copy_only=False)


def _signatures(batch: pa.RecordBatch) -> npt.NDArray[np.uint16]:
    column = batch.column("signature")
    width = BINS * 2
    content = np.frombuffer(column.buffers()[1], dtype=np.uint8)
    begin = column.offset * width
    content = content[begin : begin + len(column) * width]
    return content.view(np.uint16).reshape(-1, BINS)


def _sketches(
    tables: Sequence[dict[str, Any]], rows: Ints
) -> Iterator[tuple[Ints, npt.NDArray[np.uint64]]]:
    """Of some rows (in order): places in ``rows``, each as often as its sketch has entries."""
    row = 0
    for table in tables:
        for batch in _batches(table, ["sketch"]):
            begin, end = np.searchsorted(rows, [row, row + batch.num_rows]).tolist()
            sketches = batch.column("sketch").take(pa.array(rows[begin:end] - row))
            row += batch.num_rows
            counts = np.diff(sketches.offsets.to_numpy())
            yield np.repeat(np.arange(begin, end), counts), np.asarray(sketches.flatten())


def _points(batch: pa.RecordBatch, recipe: Recipe) -> Floats:
    """The score as far as one document alone decides it."""
    total = np.zeros(batch.num_rows, dtype=np.float64)
    weights = recipe.score.weights.model_dump()
    for name in _components(recipe):
        weight = weights[name.removeprefix("score_")] if recipe.score.method == "legal" else 1.0
        total += weight * _numbers(batch, name).astype(np.float64)
    return total


def _of_wanted_kind(batch: pa.RecordBatch, recipe: Recipe) -> Bools:
    kinds = recipe.selection.doc_types
    if not kinds:
        return np.ones(batch.num_rows, dtype=bool)
    wanted = pa.array([kind.strip().lower().replace(" ", "_") for kind in kinds])
    return np.asarray(pc.is_in(batch.column("doc_type"), value_set=wanted))


def _of_wanted_subject(batch: pa.RecordBatch, recipe: Recipe) -> Bools:
    subjects = recipe.selection.subjects
    if not subjects:
        return np.ones(batch.num_rows, dtype=bool)
    return np.array([bool(named_in(named, subjects)) for named in _namings(batch)], dtype=bool)


def _namings(batch: pa.RecordBatch) -> Iterator[str]:
    """What each document of a batch says that it is about."""
    columns = (batch.column(name).to_pylist() for name in _NAMING)
    for subjects, title, directory_code in zip(*columns, strict=True):
        yield naming(subjects, title, directory_code)


# Duplicates


def _drop_duplicates(corpus: _Corpus, store: SignatureStore) -> tuple[Ints, Ints]:
    """Drop all but the best of each group.

    Returns, for each row, the row it is a duplicate of (-1: none), and the near-duplicate pairs.
    """
    duplicate_of = np.full(len(corpus.part), -1, dtype=np.int64)
    # a record that comes again with the same id: the newer, else the one that was read last
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
    corpus: _Corpus,
    key: npt.NDArray[np.uint64],
    best_first: Ints,
    reason: str,
    duplicate_of: Ints,
) -> None:
    """Of the living rows with equal keys, keep the one that comes first in ``best_first``."""
    rows = best_first[corpus.reason[best_first] == 0]
    if not len(rows):
        return
    rows = rows[np.argsort(key[rows], kind="stable")]
    begins = np.concatenate([[True], key[rows[1:]] != key[rows[:-1]]])
    firsts = rows[np.maximum.accumulate(np.where(begins, np.arange(len(rows)), 0))]
    duplicate_of[rows[~begins]] = firsts[~begins]
    corpus.drop(rows[~begins], reason)


# Scores that depend on the whole corpus


def _citations(tables: Sequence[dict[str, Any]], corpus: _Corpus) -> Floats:
    """The citations component, 0..1: citations received from documents of the act's own topics.

    A citation counts by the share of the citing document's subject matters that the cited act
    has too, so that an act that everyone cites for its procedure gains little; the sum is set
    against what the most cited twentieth of the act's topics receives. Duplicates cite nothing.
    Sums are of integers: their order does not matter.
    """
    works, work_of_row = np.unique(corpus.work, return_inverse=True)
    topics = _topics(tables)
    topics_of_work = np.zeros(len(works), dtype=np.uint64)
    np.bitwise_or.at(topics_of_work, work_of_row, topics)
    received = np.zeros(len(works), dtype=np.int64)
    progress = Progress("count citations", "documents", len(corpus.part))
    row = 0
    for table in tables:
        for batch in _batches(table, ["cites"]):
            cites = batch.column("cites")
            counts = np.diff(cites.offsets.to_numpy())
            cited = np.asarray(cites.flatten())
            citing = row + np.repeat(np.arange(batch.num_rows), counts)
            row += batch.num_rows
            place = np.minimum(np.searchsorted(works, cited), len(works) - 1)
            counted = (works[place] == cited) & (corpus.reason[citing] == 0)
            place, of_citing = place[counted], topics[citing[counted]]
            shared = np.bitwise_count(of_citing & topics_of_work[place]).astype(np.int64)
            own = np.bitwise_count(of_citing).astype(np.int64)
            # where the citing document names no topic, a quarter
            value = np.where(own > 0, 1024 * shared // np.maximum(own, 1), 256)
            np.add.at(received, place, value)
            progress.add(batch.num_rows)
    return _against_topic(received, topics_of_work)[work_of_row]


def _against_topic(received: Ints, topics: npt.NDArray[np.uint64]) -> Floats:
    """log(1 + received) over that of the 95th percentile of the cited works of its topics."""
    citations = received / 1024
    cited = citations > 0
    if not cited.any():
        return np.zeros(len(received))
    overall = np.quantile(citations[cited], 0.95)
    total = np.zeros(len(received))
    count = np.zeros(len(received))
    for topic in range(64):
        of_topic = (topics >> np.uint64(topic)) & np.uint64(1) == 1
        if not (of_topic & cited).any():
            continue
        total[of_topic] += np.quantile(citations[of_topic & cited], 0.95)
        count[of_topic] += 1
    usual = np.where(count > 0, total / np.maximum(count, 1), overall)
    return np.minimum(1.0, np.log1p(citations) / np.log1p(usual))


def _topics(tables: Sequence[dict[str, Any]]) -> npt.NDArray[np.uint64]:
    """Each document's subject matters as bits; the corpus's 64 most frequent ones have one."""
    seen: Counter[str] = Counter()
    for table in tables:
        for batch in _batches(table, ["subjects"]):
            for entry in pc.value_counts(batch.column("subjects").flatten()).to_pylist():
                seen[entry["values"]] += entry["counts"]
    frequent = [name for name, _ in sorted(seen.items(), key=lambda item: (-item[1], item[0]))[:64]]
    names = pa.array(frequent, pa.string())
    found = []
    for table in tables:
        for batch in _batches(table, ["subjects"]):
            subjects = batch.column("subjects")
            bit = pc.index_in(subjects.flatten(), value_set=names)
            row = np.repeat(np.arange(batch.num_rows), np.diff(subjects.offsets.to_numpy()))
            known = np.asarray(bit.is_valid())
            bits = np.asarray(bit.fill_null(0)).astype(np.uint64)
            topics = np.zeros(batch.num_rows, dtype=np.uint64)
            np.bitwise_or.at(topics, row[known], np.uint64(1) << bits[known])
            found.append(topics)
    return np.concatenate(found) if found else np.empty(0, dtype=np.uint64)


# Tokens


def tokens_per_piece(tables: Sequence[dict[str, Any]], tokenizer: CorpusTokenizer | None) -> float:
    """Tokens a piece (``fingerprint``), counted on the excerpts in the score tables."""
    if tokenizer is None:
        return TOKENS_PER_PIECE
    excerpts: list[tuple[int, str]] = []
    for table in tables:
        for batch in _batches(table, ["id_hash", "excerpt"]):
            batch = batch.filter(pc.is_valid(batch.column("excerpt")))
            excerpts += zip(
                batch.column("id_hash").to_pylist(),
                batch.column("excerpt").to_pylist(),
                strict=True,
            )
            excerpts = sorted(excerpts)[:SAMPLED]
    pieces = sum(pieces_of(text) for _, text in excerpts)
    if not pieces:
        return TOKENS_PER_PIECE
    encoded = tokenizer.load().encode_batch_fast(
        [text for _, text in excerpts], add_special_tokens=False
    )
    return sum(len(item) for item in encoded) / pieces


# Taking


def _drop_unwanted(corpus: _Corpus, recipe: Recipe) -> None:
    selection = recipe.selection
    corpus.drop(corpus.characters < selection.min_characters, "too_short")
    if selection.min_year:
        corpus.drop(corpus.year < selection.min_year, "too_old")
    corpus.drop(~corpus.of_wanted_kind, "other_kind")
    corpus.drop(~corpus.of_wanted_subject, "other_subject")
    if selection.quality_threshold is not None:
        corpus.drop(corpus.score < selection.quality_threshold, "below_threshold")


def _fill(corpus: _Corpus, recipe: Recipe, ratio: float, exact: bool) -> tuple[Ints, Ints]:
    """Rows taken by share and budget, the best first, and the reserve beyond the budget."""
    selection = recipe.selection
    rows = corpus.alive()
    rows = rows[np.argsort(corpus.rank[rows])]
    if selection.top_share is not None:
        # the share of the corpus without its duplicates; in pieces, so that no estimate enters
        first_unwanted = REASONS.index("too_short")
        single = (corpus.reason == 0) | (corpus.reason >= first_unwanted)
        whole = int(corpus.pieces[single].sum())
        taken = take_within(corpus.pieces[rows], math.floor(whole * selection.top_share))
        corpus.drop(rows[~taken], "outside_top_share")
        rows = rows[taken]
    if selection.target_tokens is None:
        return rows, rows[:0]
    tokens = corpus.tokens(ratio)[rows]
    taken = take_within(tokens, selection.target_tokens)
    beyond = math.ceil(selection.target_tokens * (RESERVE if exact else RESERVE_UNTRAINED))
    left = rows[~taken]
    reserved = take_within(corpus.tokens(ratio)[left], beyond)
    corpus.drop(left[~reserved], "over_budget")
    return rows[taken], left[reserved]


def take_within(sizes: npt.NDArray[Any], budget: int) -> Bools:
    """Which items are taken, from the first on, when each is taken that still fits.

    The sum of what is taken is at most ``budget``, and no item that was left out would fit into
    what remains of it.
    """
    taken = np.zeros(len(sizes), dtype=bool)
    left = np.arange(len(sizes))
    while len(left):
        left = left[sizes[left] <= budget]
        sums = np.cumsum(sizes[left], dtype=np.int64)
        fit = int(np.searchsorted(sums, budget, side="right"))
        if fit == 0:
            break
        taken[left[:fit]] = True
        budget -= int(sums[fit - 1])
        left = left[fit:]
    return taken


# Splits


def _split(
    corpus: _Corpus,
    taken: Ints,
    reserve: Ints,
    pairs: npt.NDArray[np.int64],
    tokens: Ints,
    recipe: Recipe,
) -> None:
    """Hold out whole works: the newest acts first, then works at random.

    A work is an act with its versions, corrigenda and translations; works of which any documents
    are near-duplicates (dropped ones too), or one is contained in the other, count as one.
    """
    settings = recipe.corpus
    works = _joined_works(corpus, pairs)
    newest_first = _groups_in_order(
        works[taken], -_act_day(corpus)[taken], corpus.id_hash[taken], settings.seed
    )
    dated = newest_first.copy()
    held_out = np.zeros(len(corpus.part), dtype=bool)
    most = settings.validation_tokens
    count = math.ceil(settings.newest_share * len(taken))
    newest = _first_groups(dated, works[taken], count, tokens[taken], most)
    rows = taken[np.isin(works[taken], newest)]
    corpus.split[rows] = SPLITS.index("validation_newest")
    held_out[rows] = True
    others = taken[~held_out[taken]]
    at_random = _groups_in_order(works[others], None, None, settings.seed)
    count = max(1, math.ceil(settings.validation_share * len(taken)))
    drawn = _first_groups(at_random, works[others], count, tokens[others], most)
    rows = others[np.isin(works[others], drawn)]
    corpus.split[rows] = SPLITS.index("validation")
    corpus.split[others[~np.isin(works[others], drawn)]] = SPLITS.index("train")
    all_held_out = np.union1d(newest, drawn)
    lost = np.isin(works[reserve], all_held_out)
    corpus.drop(reserve[lost], "of_a_held_out_work")
    corpus.split[reserve[~lost]] = SPLITS.index("reserve")


def _joined_works(corpus: _Corpus, pairs: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Each row's work; works joined by near-duplicates share the least of their hashes."""
    works = corpus.work.copy()
    if not len(pairs):
        return works
    names, index = np.unique(works[pairs], return_inverse=True)
    joined = groups_of(index.reshape(pairs.shape))
    together = np.array([joined[n] for n in range(len(names))])
    place = np.minimum(np.searchsorted(names, works), len(names) - 1)
    known = names[place] == works
    works[known] = names[together[place[known]]]
    return works


def _act_day(corpus: _Corpus) -> Ints:
    """When the act itself was made, yyyymmdd: a later version of it does not make it new."""
    day = corpus.date.astype(np.int64)
    of_act = corpus.act_year.astype(np.int64) * 10_000
    return np.where((day // 10_000 == corpus.act_year) & (day > 0), day, of_act)


def _groups_in_order(
    works: npt.NDArray[np.uint64], first: Ints | None, _: Any, seed: int
) -> npt.NDArray[np.uint64]:
    """Works by the least ``first`` of their documents, then in an order drawn from the seed."""
    names, index = np.unique(works, return_inverse=True)
    turned = (names ^ np.uint64(seed * 0x9E3779B97F4A7C15 % (1 << 64))) * np.uint64(
        0xBF58476D1CE4E5B9
    )
    turned ^= turned >> np.uint64(31)
    turned *= np.uint64(0x94D049BB133111EB)
    if first is None:
        return names[np.argsort(turned, kind="stable")]
    least = np.full(len(names), np.iinfo(np.int64).max)
    np.minimum.at(least, index, first)
    return names[np.lexsort((turned, least))]


def _first_groups(
    order: npt.NDArray[np.uint64],
    works: npt.NDArray[np.uint64],
    documents: int,
    tokens: Ints,
    most: int,
) -> npt.NDArray[np.uint64]:
    """The first works of ``order`` that hold at least ``documents`` of the rows.

    They end before ``most`` of the rows' ``tokens`` (estimated) are passed; one work is taken in
    any case.
    """
    if documents <= 0 or not len(order):
        return order[:0]
    names, index, counts = np.unique(works, return_inverse=True, return_counts=True)
    places = np.searchsorted(names, order)
    enough = int(np.searchsorted(np.cumsum(counts[places]), documents)) + 1
    sums = np.cumsum(np.bincount(index, weights=tokens)[places])
    return order[: min(enough, max(1, int(np.searchsorted(sums, most, side="right"))))]


# What is told


def _why_empty(corpus: _Corpus) -> str:
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


def _funnel(
    tables: Sequence[dict[str, Any]], corpus: _Corpus, ratio: float
) -> list[dict[str, Any]]:
    """Documents, characters and estimated tokens of each stage and reason."""
    tokens = corpus.tokens(ratio)

    def row(stage: str, reason: str, rows: Bools) -> dict[str, Any]:
        return {
            "stage": stage,
            "reason": reason,
            "documents": int(rows.sum()),
            "characters": int(corpus.characters[rows].sum(dtype=np.int64)),
            "tokens": int(tokens[rows].sum()),
        }

    unreadable = sum(table["unreadable"] for table in tables)
    nothing = {"characters": 0, "tokens": 0}
    funnel = [{"stage": "read", "reason": "unreadable", "documents": unreadable, **nothing}]
    funnel.append(row("read", "", np.ones(len(tokens), dtype=bool)))
    for code, reason in enumerate(REASONS[1:], start=1):
        rows = corpus.reason == code
        if rows.any():
            stage = "duplicates" if code <= 4 else "selection" if code <= 11 else "splits"
            funnel.append(row(stage, reason, rows))
    for code, split in enumerate(SPLITS[1:], start=1):
        funnel.append(row("kept", split, corpus.split == code))
    return funnel


def funnel_table(funnel: Sequence[dict[str, Any]]) -> str:
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


def _write(
    path: Path,
    tables: Sequence[dict[str, Any]],
    corpus: _Corpus,
    duplicate_of: Ints,
    ratio: float,
    of_adapters: Sequence[str],
) -> None:
    tokens = corpus.tokens(ratio)
    progress = Progress("write the selection", "documents", len(tokens))
    names = _ids_of(tables, np.unique(duplicate_of[duplicate_of >= 0]))
    copied = ["id", "work", "bytes", "doc_type"]
    row = 0
    with whole_file(path) as aside, pq.ParquetWriter(aside, SELECTION_SCHEMA) as writer:
        for table in tables:
            for batch in _batches(table, [*copied, "areas", *_NAMING]):
                rows = slice(row, row + batch.num_rows)
                row += batch.num_rows
                columns = {
                    "part": corpus.part[rows],
                    "position": corpus.position[rows],
                    "score": corpus.score[rows],
                    "recency": corpus.recency[rows],
                    "citations": corpus.citations[rows],
                    "reason": _words(corpus.reason[rows], REASONS),
                    "split": _words(corpus.split[rows], SPLITS),
                    "rank": corpus.rank[rows],
                    "duplicate_of": [names.get(n) for n in duplicate_of[rows].tolist()],
                    "tokens": tokens[rows],
                    "characters": corpus.characters[rows],
                    "year": corpus.year[rows],
                    "areas": _areas(batch, of_adapters),
                    **{name: batch.column(name) for name in copied},
                }
                arrays = [columns[name] for name in SELECTION_SCHEMA.names]
                writer.write_table(pa.table(arrays, schema=SELECTION_SCHEMA))
                progress.add(batch.num_rows)


def _subjects_of_adapters(recipe: Recipe) -> list[str]:
    """What ``lora.areas`` names beyond the score's own subjects."""
    areas = recipe.lora.areas.values() if recipe.lora else ()
    named = {subject for subjects in areas for subject in subjects}
    return sorted(named - recipe.score.subjects.keys())


def _areas(batch: pa.RecordBatch, of_adapters: Sequence[str]) -> pa.Array:
    areas = batch.column("areas")
    if not of_adapters:
        return areas
    added = (named_in(named, of_adapters) for named in _namings(batch))
    both = [[*own, *more] for own, more in zip(areas.to_pylist(), added, strict=True)]
    return pa.array(both, areas.type)


def _words(codes: npt.NDArray[np.int8], words: Sequence[str]) -> pa.Array:
    indices = pa.array(codes, mask=codes == 0)
    return pa.DictionaryArray.from_arrays(indices, pa.array(words))


def _ids_of(tables: Sequence[dict[str, Any]], rows: Ints) -> dict[int, str]:
    found: dict[int, str] = {}
    row = 0
    for table in tables:
        for batch in _batches(table, ["id"]):
            begin, end = np.searchsorted(rows, [row, row + batch.num_rows]).tolist()
            here = rows[begin:end]
            ids = batch.column("id").take(pa.array(here - row)).to_pylist()
            found |= dict(zip(here.tolist(), ids, strict=True))
            row += batch.num_rows
    return found
