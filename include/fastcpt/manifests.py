"""What the manifests in the corpus room's folders say, for all rooms that read them.

A folder's manifest is written last: where it is, the folder is whole. What the functions that write
them return is the manifest with the folder's ``path`` and whether it was there before (``reused``).
"""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict


class FileEntry(TypedDict):
    """A file of a folder, as a transfer verifies it; ``bytes`` is its size."""

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
    """What a stage left out for a reason, or keeps in a split; tokens are estimates until the build."""

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
    """What was tokenized and had not been before."""

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
    # of a document at most, estimated, and whether that is to fill target_tokens: counted by the build
    max_document_tokens: NotRequired[int | None]
    cut_fills_target: NotRequired[bool]
    comparison: str | None  # digest of the set that models are compared on
    newest_year: int
    oddly_dated: int
    same_for_all: NotRequired[list[str]]  # components of the score with one value throughout
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
    """General documents among those to train on; ``share`` of the tokens."""

    documents: int
    tokens: int
    share: float


class CorpusManifest(TypedDict):
    """``home/corpora/<digest>/corpus_manifest.json``; ``files`` are all of the folder but itself."""

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
