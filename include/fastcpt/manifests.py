"""Types of the manifests in the corpus room's folders, for all rooms that read them.

A folder's manifest is written last, so a folder with one is complete. The functions that write one return
it with the folder's ``path`` and whether the folder existed before (``reused``).
"""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict


class FileEntry(TypedDict):
    """A file of a folder, for a transfer to verify; ``bytes`` is its size."""

    file: str
    bytes: int
    sha256: str


class Shard(FileEntry):
    """A file of token rows."""

    rows: int
    tokens: int


class HeldOutShard(Shard):
    """``set`` is the held-out set's name."""

    set: str


class FunnelRow(TypedDict):
    """What a stage dropped for a reason, or keeps in a split; tokens are estimates until the build."""

    stage: str
    reason: str
    documents: int
    characters: int
    tokens: int


class ScoresManifest(TypedDict):
    """``home/scores/<digest>/manifest.json``: the scores of a part's documents."""

    digest: str
    part: str
    source: str  # identity of the part's content
    method: str
    documents: int
    unreadable: int
    characters: int


class ScoresFolder(ScoresManifest):
    path: str
    reused: bool


class Tokenized(TypedDict):
    """What was newly tokenized."""

    documents: int
    tokens: int


class SelectedPart(TypedDict):
    part: str
    source: str
    digest: str
    scores: str  # folder of its scores
    kept: int


class SelectionManifest(TypedDict):
    """``home/selections/<digest>/manifest.json``."""

    digest: str
    parts: list[SelectedPart]
    documents: int
    unreadable: int
    kept: int
    tokens: int  # estimated
    tokens_per_piece: float
    target_tokens: int | None
    # most tokens per document (estimated), and whether target_tokens sets them: the build then recounts
    max_document_tokens: NotRequired[int | None]
    cut_fills_target: NotRequired[bool]
    comparison: str | None  # digest of the set that models are compared on
    newest_year: int
    oddly_dated: int
    same_for_all: NotRequired[list[str]]  # components of the score with one value for all documents
    funnel: list[FunnelRow]


class SelectionFolder(SelectionManifest):
    path: str
    reused: bool


class TokenizerFacts(TypedDict):
    sha256: str
    vocab_size: int
    bos_id: int | None
    eos_id: int
    pad_id: int


class ReplayFacts(TypedDict):
    """The general documents that are trained on; ``share`` is of the tokens."""

    documents: int
    tokens: int
    share: float


class GoneOn(TypedDict):
    """Of a corpus that goes on from a champion: its documents, and the tokens from the base model."""

    model: str
    new_documents: int
    new_tokens: int
    replayed_documents: int  # that the champion was trained on
    replayed_tokens: int
    all_tokens: int  # of all documents: what would be trained on from the base model


class CorpusManifest(TypedDict):
    """``home/corpora/<digest>/corpus_manifest.json``; ``files`` lists all other files of the folder."""

    digest: str
    selection: str
    recipe: dict[str, Any]
    tokenizer: TokenizerFacts
    max_seq_length: int
    tokens: int
    documents: int
    max_document_tokens: NotRequired[int | None]
    sequences: int
    padding_share: float
    bytes_per_token: float
    replay: ReplayFacts
    gone_on: NotRequired[GoneOn | None]  # None: from the base model
    held_out_before: NotRequired[int]  # of the documents trained on: by other corpora
    shards: list[Shard]
    validation: list[HeldOutShard]
    funnel: list[FunnelRow]
    files: list[FileEntry]


class CorpusFolder(CorpusManifest):
    path: str
    reused: bool


class InstructionsManifest(TypedDict):
    """``home/instructions/<digest>/manifest.json``."""

    digest: str
    train: int
    held_out: int
    unreadable: int
    files: list[FileEntry]


class InstructionsFolder(InstructionsManifest):
    path: str
    reused: bool
