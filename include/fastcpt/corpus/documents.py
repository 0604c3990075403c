"""Documents as they come: JSON, JSONL (.gz, .zst) and Parquet, in a folder or behind a URL.

A *part* is one file. Parts are read as streams, a record at a time, so that memory depends on
the longest document and not on the folder (a plain ``.json`` file, which holds one document or a
list of them, is the exception: it is read whole). What cannot be read comes out of the same
stream as ``Unreadable`` with file, line and reason, and the rest goes on.

Any fsspec URL works where its file system's package is installed (``s3://`` wants s3fs).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import fsspec

from fastcpt.corpus.processes import Progress
from fastcpt.recipe import Documents, Fields

SUFFIXES = (".json", ".jsonl", ".ndjson")
PACKED = ("", ".gz", ".zst")
CHUNK = 1 << 20
BATCH_CHARACTERS = 1 << 20  # handled in one call
PARQUET_BATCH = 64  # documents in memory at once; some acts have 3 M characters


class DocumentsError(ValueError):
    """The documents cannot be used; the message says where and what to do."""


@dataclass(frozen=True, slots=True)
class Document:
    """One document. ``position`` is its record's number in the part, from 0."""

    position: int
    id: str
    text: str
    title: str
    date: str | None
    doc_type: str
    subjects: tuple[str, ...]
    language: str | None
    celex: str | None
    in_force: bool | None
    directory_code: str | None

    @property
    def year(self) -> int | None:
        """The year of ``date``; None where it is missing or no date."""
        found = re.match(r"(\d{4})(?!\d)", self.date or "")
        return int(found[1]) if found else None


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A record set aside. ``line`` counts from 1 (in Parquet, rows); None is the file itself."""

    file: str
    line: int | None
    reason: str


def list_parts(documents: Documents) -> list[str]:
    """Paths (or URLs) of the files to read, sorted; ``DocumentsError`` where there are none."""
    if not documents.path:
        raise DocumentsError(
            "documents.path is empty: give the folder or URL of the documents in the recipe"
        )
    return files_under(documents.path, "documents.path")


def files_under(path: str, key: str) -> list[str]:
    """The readable files under ``path``; ``key`` is the recipe's key, for the error."""
    try:
        system, root = fsspec.url_to_fs(path)
    except (ValueError, ImportError) as error:
        raise DocumentsError(f"{key}: cannot open '{path}': {error}") from error
    if not system.exists(root):
        raise DocumentsError(f"{key}: '{path}' does not exist; give a folder of documents")
    found = [root] if system.isfile(root) else system.find(root)
    hidden = len(root)
    parts = sorted(
        name for name in found if _is_part(name) and "/." not in name[hidden:].replace("\\", "/")
    )
    if not parts:
        wanted = "JSON, JSONL (.gz, .zst) or Parquet"
        raise DocumentsError(f"{key}: no {wanted} files in '{path}' ({len(found)} other files)")
    return parts if _is_local(system) else [system.unstrip_protocol(name) for name in parts]


def _is_part(name: str) -> bool:
    return name.endswith(".parquet") or name.endswith(
        tuple(suffix + packed for suffix in SUFFIXES for packed in PACKED)
    )


def _is_local(system: Any) -> bool:
    return "file" in (system.protocol if isinstance(system.protocol, tuple) else (system.protocol,))


def identity(part: str) -> str:
    """What the part's content is known by: its SHA-256, or what an object store says of it."""
    system, name = fsspec.url_to_fs(part)
    if not system.exists(name):
        raise DocumentsError(f"'{part}' is gone since the documents were listed; start again")
    if not _is_local(system):
        return str(system.checksum(name))
    with system.open(name, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def size_of(part: str) -> int:
    """Bytes of a part, as it lies there (packed); 0 where its store does not say."""
    system, name = fsspec.url_to_fs(part)
    return int(system.size(name) or 0)


def read_documents(
    part: str, fields: Fields, progress: Progress | None = None
) -> Iterator[Document | Unreadable]:
    """Every record of a part, in its order. ``OSError`` where the file itself cannot be opened.

    ``progress`` counts the bytes read, as they lie in the file.
    """
    records = _parquet_records if part.endswith(".parquet") else _json_records
    for position, record in enumerate(records(part, fields, progress)):
        if record is _BLANK:
            continue
        if isinstance(record, Unreadable):
            yield record
            continue
        try:
            yield _document(position, record, part, fields)
        except WrongFieldError as error:
            yield Unreadable(part, position + 1, str(error))


def in_batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in their order, as many together as have ``BATCH_CHARACTERS``."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


# Records


_BLANK = object()  # an empty line: it counts as a line and is no record


class WrongFieldError(ValueError):
    pass


def _json_records(part: str, fields: Fields, progress: Progress | None) -> Iterator[Any]:
    if part.removesuffix(".gz").removesuffix(".zst").endswith(".json"):
        yield from _json_file(part, progress)
        return
    with fsspec.open(part, "rb") as stream:
        line = 0
        try:
            for line, content in enumerate(_lines(_unpacked(part, stream, progress)), start=1):
                yield _parsed(content, part, line) if content.strip() else _BLANK
        except (EOFError, zlib.error, gzip.BadGzipFile, _CutShortError) as error:
            yield Unreadable(part, line + 1, f"file is cut short or damaged here: {error}")


def _json_file(part: str, progress: Progress | None) -> Iterator[Any]:
    try:
        with fsspec.open(part, "rb") as stream:
            content = b"".join(_unpacked(part, stream, progress))
    except (EOFError, zlib.error, gzip.BadGzipFile, _CutShortError) as error:
        yield Unreadable(part, None, f"file is cut short or damaged: {error}")
        return
    whole = _parsed(content, part, 1, of_file=True)
    yield from whole if isinstance(whole, list) else [whole]


def _parsed(content: bytes, part: str, line: int, of_file: bool = False) -> Any:
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Unreadable(part, line, f"not UTF-8 text at byte {error.start}")
    except json.JSONDecodeError as error:
        if b"\x00" in content[:16]:
            return Unreadable(part, line, "not UTF-8 text (zero bytes; UTF-16?)")
        where = error.lineno if of_file else line
        return Unreadable(part, where, f"broken JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return Unreadable(part, line, "broken JSON: nested too deeply")


class _Counted:
    """A stream whose reads are counted."""

    def __init__(self, stream: BinaryIO, progress: Progress):
        self.stream, self.progress = stream, progress

    def read(self, size: int = -1) -> bytes:
        content = self.stream.read(size)
        self.progress.add(len(content))
        return content


def _unpacked(part: str, stream: Any, progress: Progress | None) -> Iterator[bytes]:
    if progress:
        stream = _Counted(stream, progress)
    if part.endswith(".zst"):
        yield from _zstd_chunks(stream)
        return
    source: Any = gzip.GzipFile(fileobj=stream) if part.endswith(".gz") else stream
    while chunk := source.read(CHUNK):
        yield chunk


class _CutShortError(Exception):
    pass


def _zstd_chunks(stream: Any) -> Iterator[bytes]:
    """The frames of a .zst file, one after another.

    The package's own stream reader takes the end of a truncated file for the end of the content.
    """
    import zstandard

    frame = None
    while compressed := stream.read(CHUNK):
        while compressed:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                yield frame.decompress(compressed)
            except zstandard.ZstdError as error:
                raise _CutShortError(str(error)) from error
            compressed = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame = None
    if frame is not None:
        raise _CutShortError("the last zstd frame has no end")


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines of a stream of chunks; a line's pieces are joined once, however long it is."""
    pieces: list[bytes] = []
    for chunk in chunks:
        *ended, rest = chunk.split(b"\n")
        for line in ended:
            yield b"".join([*pieces, line]) if pieces else line
            pieces = []
        if rest:
            pieces.append(rest)
    if pieces:
        yield b"".join(pieces)


def _parquet_records(part: str, fields: Fields, progress: Progress | None) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with fsspec.open(part, "rb") as stream:
        row = 0
        try:
            file = pq.ParquetFile(stream)
            top = {path.split(".")[0] for path in fields.model_dump().values()}
            names = [name for name in file.schema_arrow.names if name in top or "." in name]
            for batch in file.iter_batches(batch_size=PARQUET_BATCH, columns=names):
                try:
                    rows = batch.to_pylist()
                except UnicodeDecodeError:
                    # one bad row must not take its neighbours along
                    rows = [_parquet_row(batch, n, part, row) for n in range(batch.num_rows)]
                for record in rows:
                    yield record
                    row += 1
                if progress:
                    progress.add(progress.total * len(rows) / file.metadata.num_rows)
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and not isinstance(error, pa.ArrowException):
                raise
            message = str(error).splitlines()[0]
            yield Unreadable(part, row + 1 if row else None, f"Parquet cut short: {message}")


def _parquet_row(batch: Any, number: int, part: str, before: int) -> Any:
    try:
        return batch.slice(number, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        return Unreadable(part, before + 1, f"not UTF-8 text at byte {error.start}")


# Fields


def _document(position: int, record: Any, part: str, fields: Fields) -> Document:
    if not isinstance(record, dict):
        raise WrongFieldError(f"the record is {_kind(record)}, not an object")
    text = value_at(record, fields.text)
    if text is None:
        raise WrongFieldError(f"'{fields.text}' is missing")
    if not isinstance(text, str):
        raise WrongFieldError(f"'{fields.text}' is {_kind(text)}, not text")
    if not text.strip():
        raise WrongFieldError(f"'{fields.text}' is empty")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise WrongFieldError(
                f"'{fields.text}' has half a surrogate pair at character {error.start}"
            ) from error
    in_force = value_at(record, fields.in_force)
    return Document(
        position=position,
        id=_string(record, fields.id) or f"{part.rsplit('/', 1)[-1]}:{position + 1}",
        text=text,
        title=_string(record, fields.title) or "",
        date=_string(record, fields.date),
        doc_type=_string(record, fields.doc_type) or "",
        subjects=_strings(record, fields.subject_matter),
        language=_string(record, fields.language),
        celex=_string(record, fields.celex),
        in_force=in_force if isinstance(in_force, bool) else None,
        directory_code=_string(record, fields.directory_code),
    )


def value_at(record: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path; None where it is missing. A key may itself hold the dots."""
    if path in record:
        return record[path]
    value: Any = record
    for key in path.split("."):
        if value is None:
            return None
        if not isinstance(value, dict):
            raise WrongFieldError(f"'{path}': {_kind(value)} where an object is expected")
        value = value.get(key)
    return value


def _string(record: Mapping[str, Any], path: str) -> str | None:
    value = value_at(record, path)
    if value is None or value == "":
        return None
    if isinstance(value, (dict, list, bool)):
        raise WrongFieldError(f"'{path}' is {_kind(value)}, not text")
    return str(value)


def _strings(record: Mapping[str, Any], path: str) -> tuple[str, ...]:
    value = value_at(record, path)
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise WrongFieldError(f"'{path}' is {_kind(value)}, not a list of texts")


def _kind(value: object) -> str:
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    return "text" if isinstance(value, str) else "nothing" if value is None else "no text"


def unreadable_message(unreadable: int, total: int, limit: float, first: Unreadable) -> str:
    """Why a step that set too many records aside fails."""
    where = f"{first.file}:{first.line}" if first.line else first.file
    return (
        f"{unreadable} of {total} records ({unreadable / total:.1%}) cannot be read, more than "
        f"documents.max_unreadable_share allows ({limit:.1%}). The first: {where}: "
        f"{first.reason}. Repair the documents, or raise the share in the recipe."
    )


def open_lines(path: str) -> Iterator[tuple[int, Any]]:
    """Line numbers (from 1) and records (or ``Unreadable``) of a JSONL file (.gz, .zst)."""
    for line, record in enumerate(_json_records(path, Fields(), None), start=1):
        if record is not _BLANK:
            yield line, record
