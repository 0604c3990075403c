"""General documents: some are replayed in training, some held out to measure forgetting."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fastcpt.corpus import leakage
from fastcpt.corpus.budget import take_within
from fastcpt.corpus.documents import Document, files_under, identity, read_documents
from fastcpt.corpus.processes import cores
from fastcpt.corpus.selected import Selected
from fastcpt.corpus.shards import VALIDATION_SCHEMA
from fastcpt.corpus.token_ids import TokenIds, find_ids
from fastcpt.corpus.tokenizer import CorpusTokenizer
from fastcpt.corpus.tokens import tokenize_part
from fastcpt.files import digest_of, hash_of
from fastcpt.manifests import ReplayFacts
from fastcpt.recipe import Recipe
from fastcpt.recipe_sections import Documents

log = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]

GENERAL = "validation_general"  # of the replay's documents, where there is replay
ONE_GENERAL_IN = 16  # one document in 16, by the hash of its id, is never trained on
MOST_GENERAL = 2_000_000  # characters held out, about 450,000 tokens
MOST_CHARACTERS_A_TOKEN = 8  # more than running text has, so that enough documents are tokenized


def replay_parts(recipe: Recipe) -> list[tuple[str, str]]:
    """Files of the general documents with their identities, in the order of the identities' digests."""
    if recipe.documents.replay is None:
        return []
    parts = files_under(recipe.documents.replay.path, "documents.replay.path")
    return sorted(((part, identity(part)) for part in parts), key=lambda item: digest_of(item[1]))


@dataclass
class GeneralHeldOut:
    """General documents that are held out, to measure what the model forgets."""

    parts: list[tuple[str, str, Ints]]  # path, content identity, positions
    about: pa.Table  # a row per document: id, bytes, year, doc_type, areas

    @classmethod
    def drawn(
        cls, parts: Sequence[tuple[str, str]], documents: Selected, max_record_mb: float
    ) -> GeneralHeldOut:
        """The first documents that their id's hash holds out, as much text as ``validation`` has."""
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
        """Remove some documents again."""
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


class Replayed(NamedTuple):
    ids: TokenIds
    characters: int

    def facts(self, all_tokens: int) -> ReplayFacts:
        """Facts for the manifest; ``all_tokens`` is the corpus's number of tokens."""
        tokens = int(self.ids.length.sum())
        return {
            "documents": len(self.ids.length),
            "tokens": tokens,
            "share": tokens / all_tokens,
        }


def choose_replay(
    parts: list[tuple[str, str]],
    legal_tokens: int,
    held_out: Path,
    tokenizer: CorpusTokenizer,
    recipe: Recipe,
    home: Path,
    processes: int | None,
) -> Replayed:
    """Choose general documents for the recipe's share of training tokens, from as few files as possible.

    Documents that overlap with a held-out one, legal or general, are left out.
    """
    chosen = TokenIds([], *np.empty((3, 0), dtype=np.int64))
    characters = 0
    if recipe.documents.replay is None:
        return Replayed(chosen, 0)
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
        found = find_ids([(part, source, positions)], fields, tokenizer, home)
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
    return Replayed(chosen, characters)


def _first_lengths(part: str, settings: Documents, characters: int) -> dict[int, int]:
    """Positions and characters of a part's first trainable documents, until ``characters`` is reached."""
    lengths: dict[int, int] = {}
    for document in read_documents(part, settings.fields, max_record_mb=settings.max_record_mb):
        if isinstance(document, Document) and not _is_held_out(document):
            lengths[document.position] = len(document.text)
            characters -= len(document.text)
        if characters < 0:
            break
    return lengths
