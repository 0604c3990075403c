"""Token ids of a part's documents, kept so that no document is tokenized twice.

``home/tokens/<digest>`` belongs to one part's content, its field mapping and one tokenizer. It
holds any number of files of ids (int32, documents one after another, each from BOS to
end-of-text) with an index each; an index that is there is complete. Another selection adds the
documents that are missing, and a killed run goes on after the last index written.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastcpt.corpus.documents import Document, read_documents
from fastcpt.corpus.tokenizer import CorpusTokenizer
from fastcpt.files import digest_of, whole_file
from fastcpt.recipe import Fields

log = logging.getLogger(__name__)

FORMAT = 1
BATCH_CHARACTERS = 1 << 20  # encoded in one call
FILE_TOKENS = 1 << 22  # ids of a file: what a killed run may lose

Ints = npt.NDArray[np.int64]


class TokenIndex(NamedTuple):
    """Where documents' ids are: entry n of each array is one document."""

    files: list[str]
    position: Ints
    file: Ints
    offset: Ints  # of the first id, in ids
    length: Ints  # in ids, BOS and end of text among them


def token_folder(source: str, fields: Fields, tokenizer: CorpusTokenizer, home: Path) -> Path:
    """The folder of a part's ids; ``source`` is the content's identity."""
    settings = [tokenizer.sha256, tokenizer.bos_id, tokenizer.end_id, tokenizer.ranked]
    return home / "tokens" / digest_of("tokens", FORMAT, source, fields.model_dump(), settings)


def read_index(folder: Path) -> TokenIndex:
    """What of a part is tokenized so far."""
    files: list[str] = []
    columns: list[Ints] = [np.empty((4, 0), dtype=np.int64)]
    for index in sorted(folder.glob("*.npy")):
        position, offset, length = np.load(index)
        columns.append(np.stack([position, np.full(len(position), len(files)), offset, length]))
        files.append(str(index.with_suffix(".ids")))
    return TokenIndex(files, *np.concatenate(columns, axis=1))


def tokenize_part(
    part: str,
    source: str,
    fields: Fields,
    tokenizer: CorpusTokenizer,
    positions: Ints,
    home: Path,
) -> dict[str, Any]:
    """Tokenize those documents of a part (by position) that are not tokenized yet.

    Returns ``{folder, documents, tokens}``, the counts of what this call did.
    """
    folder = token_folder(source, fields, tokenizer, home)
    missing = np.setdiff1d(positions, read_index(folder).position)
    documents = tokens = 0
    if len(missing):
        encode = tokenizer.encoder()
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        begin, end = np.array(bos, dtype=np.int32), np.array([tokenizer.end_id], dtype=np.int32)
        file = _OpenFile(folder)
        for batch in _batches(part, fields, missing):
            texts = [document.text for document in batch]
            for document, encoded in zip(batch, encode(texts), strict=True):
                ids = np.concatenate([begin, encoded, end])
                file.add(document.position, ids)
                tokens += len(ids)
            documents += len(batch)
            if file.length >= FILE_TOKENS:
                file.write()
        file.write()
    return {"folder": str(folder), "documents": documents, "tokens": tokens}


class _OpenFile:
    """Ids on their way to the next file of a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.positions: list[int] = []
        self.ids: list[npt.NDArray[np.int32]] = []
        self.length = 0

    def add(self, position: int, ids: npt.NDArray[np.int32]) -> None:
        self.positions.append(position)
        self.ids.append(ids)
        self.length += len(ids)

    def write(self) -> None:
        """Write the ids, then their index: what a reader sees is complete."""
        if not self.ids:
            return
        # named by what it holds, so that two builds side by side do not overwrite each other
        name = digest_of(self.positions)
        with whole_file(self.folder / f"{name}.ids") as aside:
            np.concatenate(self.ids).tofile(aside)
        lengths = np.array([len(ids) for ids in self.ids], dtype=np.int64)
        index = np.stack([np.array(self.positions), np.cumsum(lengths) - lengths, lengths])
        with whole_file(self.folder / f"{name}.npy") as aside, aside.open("wb") as file:
            np.save(file, index)
        self.positions, self.ids, self.length = [], [], 0


def _batches(part: str, fields: Fields, wanted: Ints) -> Iterator[list[Document]]:
    """The documents at ``wanted`` positions, some at a time."""
    left = set(wanted.tolist())
    batch: list[Document] = []
    characters = 0
    for document in read_documents(part, fields):
        if isinstance(document, Document) and document.position in left:
            left.remove(document.position)
            batch.append(document)
            characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
        if not left:
            break
    if batch:
        yield batch
