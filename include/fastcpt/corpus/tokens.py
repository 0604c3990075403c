"""Token ids of a part's documents, kept so that no document is tokenized twice.

``home/tokens/<digest>`` belongs to one part's content, its field mapping and one tokenizer. It
holds any number of files of ids (int32, documents one after another, each from BOS to
end-of-text) with an index each; an index that is there is complete. Another selection adds the
documents that are missing, and a killed run goes on after the last index written.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastcpt.corpus.documents import Document, in_batches, read_documents
from fastcpt.corpus.processes import Progress, in_order
from fastcpt.corpus.tokenizer import CorpusTokenizer
from fastcpt.files import digest_of, whole_file
from fastcpt.recipe import Fields

log = logging.getLogger(__name__)

FORMAT = 1
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
    processes: int = 1,
) -> dict[str, Any]:
    """Tokenize those documents of a part (by position) that are not tokenized yet.

    Returns ``{folder, documents, tokens}``, the counts of what this call did.
    """
    folder = token_folder(source, fields, tokenizer, home)
    missing = np.setdiff1d(positions, read_index(folder).position)
    documents = tokens = 0
    if len(missing):
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        begin, end = np.array(bos, dtype=np.int32), np.array([tokenizer.end_id], dtype=np.int32)
        file = _OpenFile(folder)
        progress = Progress(f"tokenize {part.rsplit('/', 1)[-1]}", "documents", len(missing))
        calls = ((batch, tokenizer) for batch in in_batches(_wanted(part, fields, missing)))
        for batch in in_order(encode_documents, calls, processes):
            for position, encoded in batch:
                ids = np.concatenate([begin, encoded, end])
                file.add(position, ids)
                tokens += len(ids)
            documents += len(batch)
            progress.add(len(batch))
            if file.length >= FILE_TOKENS:
                file.write()
        file.write()
    return {"folder": str(folder), "documents": documents, "tokens": tokens}


def encode_documents(
    documents: Sequence[Document], tokenizer: CorpusTokenizer
) -> list[tuple[int, npt.NDArray[np.int32]]]:
    """Positions of some documents with their ids, without BOS and end of text."""
    encoded = _encoder(tokenizer)([document.text for document in documents])
    return [(document.position, ids) for document, ids in zip(documents, encoded, strict=True)]


@lru_cache(maxsize=1)
def _encoder(tokenizer: CorpusTokenizer) -> Callable[[Sequence[str]], Any]:
    return tokenizer.encoder()  # a second to load, megabytes to keep


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


def _wanted(part: str, fields: Fields, positions: Ints) -> Iterator[Document]:
    """The documents at some positions."""
    left = set(positions.tolist())
    for document in read_documents(part, fields, wanted=set(left)) if left else ():
        if isinstance(document, Document):
            left.remove(document.position)
            yield document
            if not left:
                break
