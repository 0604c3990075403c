"""Token ids of a part's documents, stored so that no document is tokenized twice.

``home/tokens/<digest>`` belongs to one part's content, its field mapping and one tokenizer. It has any
number of files of ids (documents one after another, each from BOS to end-of-text; ``.ids2`` and ``.ids3``
have two and three bytes per id), each with an index. An existing index is complete. Another selection
adds missing documents, and a killed run continues after the last index.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastcpt.corpus.documents import Document, in_batches, read_documents
from fastcpt.corpus.processes import in_order
from fastcpt.corpus.tokenizer import CorpusTokenizer
from fastcpt.files import digest_of, whole_file
from fastcpt.ids import Ids, read_ids, to_bytes, width_of
from fastcpt.manifests import Tokenized
from fastcpt.progress import Progress
from fastcpt.recipe_sections import Fields

log = logging.getLogger(__name__)

FORMAT = 2
FILE_TOKENS = 1 << 22  # ids per file: the most that a killed run loses

Ints = npt.NDArray[np.int64]


class TokenIndex(NamedTuple):
    """Locations of documents' ids, one entry per document."""

    files: list[str]
    position: Ints
    file: Ints
    offset: Ints  # of the first id, in ids
    length: Ints  # in ids, including BOS and end of text


def token_folder(source: str, fields: Fields, tokenizer: CorpusTokenizer, home: Path) -> Path:
    """The folder of a part's ids; ``source`` is the content's identity."""
    settings = [tokenizer.sha256, tokenizer.bos_id, tokenizer.end_id, tokenizer.ranked]
    return home / "tokens" / digest_of("tokens", FORMAT, source, fields.model_dump(), settings)


def read_index(folder: Path) -> TokenIndex:
    """The documents of a part that are tokenized so far."""
    files: list[str] = []
    columns: list[Ints] = [np.empty((4, 0), dtype=np.int64)]
    for index in sorted(folder.glob("*.npy")):
        position, offset, length = np.load(index)
        columns.append(np.stack([position, np.full(len(position), len(files)), offset, length]))
        files += [str(file) for file in folder.glob(f"{index.stem}.ids?")]
    return TokenIndex(files, *np.concatenate(columns, axis=1))


def tokenize_part(
    part: str,
    source: str,
    fields: Fields,
    tokenizer: CorpusTokenizer,
    positions: Ints,
    home: Path,
    processes: int = 1,
) -> Tokenized:
    """Tokenize the documents of a part (by position) that are not tokenized yet, and count them."""
    folder = token_folder(source, fields, tokenizer, home)
    missing = np.setdiff1d(positions, read_index(folder).position)
    if folder.is_dir():
        os.utime(folder)  # marks it as used (scripts/remove_unused.py)
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
    return {"documents": documents, "tokens": tokens}


def encode_documents(
    documents: Sequence[Document], tokenizer: CorpusTokenizer
) -> list[tuple[int, npt.NDArray[np.int32]]]:
    """Positions of some documents with their ids, without BOS and end of text."""
    encoded = _encoder(tokenizer)([document.text for document in documents])
    return [(document.position, ids) for document, ids in zip(documents, encoded, strict=True)]


@lru_cache(maxsize=1)
def _encoder(tokenizer: CorpusTokenizer) -> Callable[[Sequence[str]], Any]:
    return tokenizer.encoder()  # takes a second to load


def write_ids(path: Path, ids: Ids) -> Path:
    """Write a file of ids with the smallest width; the width ends its name: ``path.ids2``."""
    width = width_of(int(ids.max(initial=0)))
    file = path.with_name(f"{path.name}.ids{width}")
    with whole_file(file) as aside:
        to_bytes(ids, width).tofile(aside)
    return file


class TokenFiles:
    """Reads pieces of files of ids with pread, without mapping or caching."""

    def __init__(self, files: list[str]):
        self.files = files
        self.open: dict[int, int] = {}

    def __enter__(self) -> TokenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self.open.values():
            os.close(descriptor)

    def read(self, file: Ints, offset: Ints, length: Ints) -> Ids:
        """The pieces' ids, one after another."""
        values = np.empty(int(length.sum()), dtype=np.int32)
        at = 0
        for number, begin, count in zip(
            file.tolist(), offset.tolist(), length.tolist(), strict=True
        ):
            if number not in self.open:
                if len(self.open) >= 256:
                    os.close(self.open.pop(next(iter(self.open))))
                self.open[number] = os.open(self.files[number], os.O_RDONLY)
            width = int(self.files[number][-1])
            values[at : at + count] = read_ids(self.open[number], width, begin, count)
            at += count
        return values


class _OpenFile:
    """Collects ids for the next file of a folder."""

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
        """Write the ids, then their index, so that a reader only sees complete files."""
        if not self.ids:
            return
        # named by its content, so that two builds at once do not overwrite each other
        name = digest_of(self.positions)
        write_ids(self.folder / name, np.concatenate(self.ids))
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
