"""Reads documents: JSON, JSONL (.gz, .zst) and Parquet, in a folder or at a URL.

A *part* is one file. Parts are streamed one record at a time, so memory depends on the longest record,
which the recipe limits, and not on the folder. A record that cannot be read comes out of the same stream
as ``Unreadable``, with file, line and reason, and reading continues.

Any fsspec URL works if its file system's package is installed (``s3://`` needs s3fs).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import sys
import unicodedata
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import fsspec

from fastcpt.corpus.parquet import DamagedParquetError, Unconvertible, read_rows
from fastcpt.corpus.streams import DamagedError, Most, elements, lines, unpacked
from fastcpt.progress import Progress
from fastcpt.recipe_sections import Documents, Fields

log = logging.getLogger(__name__)

SUFFIXES = (".json", ".jsonl", ".ndjson")
PACKED = ("", ".gz", ".zst")
BATCH_CHARACTERS = 1 << 20  # of the documents handled in one call
MAX_RECORD_MB: float = Documents.model_fields["max_record_mb"].default


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
    work: str | None = None

    @property
    def year(self) -> int | None:
        """The year of ``date``; None if it is missing or not a date."""
        found = re.match(r"(\d{4})(?!\d)", self.date or "", re.ASCII)
        return int(found[1]) if found else None


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A record set aside. ``line`` counts from 1 (Parquet: rows; JSON list: elements); None: the file."""

    file: str
    line: int | None
    reason: str


def list_parts(documents: Documents) -> list[str]:
    """Paths (or URLs) of the files to read, sorted; ``DocumentsError`` if there are none."""
    if not documents.path:
        raise DocumentsError(
            "documents.path is empty: give the folder or URL of the documents in the recipe"
        )
    return files_under(documents.path, "documents.path")


def files_under(path: str, key: str) -> list[str]:
    """The files of documents under ``path``; ``key`` is the recipe's key, for the error.

    Files that cannot be read at all are listed too: ``read_documents`` sets them aside.
    """
    try:
        system, root = located(path)
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
    if _is_local(system):
        return sorted(map(_printable, parts))
    for name in parts:
        if "::" in name:
            log.warning("%s: '%s' is left out: rename it, '::' has a meaning in URLs", key, name)
    return [system.unstrip_protocol(name) for name in parts if "::" not in name]


def located(part: str) -> tuple[Any, str]:
    """A part's file system, and its name there.

    Only a part with ``://`` is a URL: a ``::`` in a local file's name must not become an fsspec chain.
    """
    if "://" in part:
        system, name = fsspec.url_to_fs(part)
        return system, str(name)
    local = fsspec.filesystem("file")
    return local, str(local._strip_protocol(part))


def _printable(name: str) -> str:
    r"""A local file's name, with bytes that are not UTF-8 written as ``\xe9``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def spelled(part: str) -> str:
    """A part's name as it goes into digests: NFC, as macOS may store it decomposed."""
    return unicodedata.normalize("NFC", part)


def why_set_aside(part: str) -> str | None:
    """Why a part cannot be opened; None if it can. ``DocumentsError`` if it has disappeared."""
    system, name = located(part)
    if system.isfile(name):
        return None
    if _is_local(system):
        if os.path.lexists(name):
            broken = os.path.islink(name) and not os.path.exists(name)
            return "a link to nothing" if broken else "no regular file (a pipe, socket or device)"
        if re.search(r"\\x[89a-f][0-9a-f]", name):
            return "the file's name is not UTF-8 text; rename it"
    raise DocumentsError(f"'{part}' is gone since the documents were listed; start again")


def _is_part(name: str) -> bool:
    return name.endswith(".parquet") or name.endswith(
        tuple(suffix + packed for suffix in SUFFIXES for packed in PACKED)
    )


def _is_local(system: Any) -> bool:
    return "file" in (system.protocol if isinstance(system.protocol, tuple) else (system.protocol,))


def identity(part: str) -> str:
    """An identity of the part's content: its SHA-256, or the object store's checksum."""
    if reason := why_set_aside(part):
        return f"{part}: {reason}"
    system, name = located(part)
    if not _is_local(system):
        return str(system.checksum(name))
    with system.open(name, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def size_of(part: str) -> int:
    """Stored (compressed) bytes of a part; 0 if its store does not say."""
    if why_set_aside(part):
        return 0
    system, name = located(part)
    return int(system.size(name) or 0)


def read_documents(
    part: str,
    fields: Fields,
    progress: Progress | None = None,
    max_record_mb: float = MAX_RECORD_MB,
    wanted: Container[int] | None = None,
) -> Iterator[Document | Unreadable]:
    """Every record of a part, in order. ``OSError`` if the file itself cannot be opened.

    ``progress`` counts stored bytes. Records of more than ``max_record_mb`` are set aside. ``wanted``
    limits the result to these positions, without a limit on length: they were accepted before.
    """
    if reason := why_set_aside(part):
        yield Unreadable(part, None, reason)
        return

    def most(position: int) -> float:
        if wanted is None:
            return max_record_mb * 1e6
        return math.inf if position in wanted else -1

    if part.endswith(".parquet"):
        records = _parquet_records(part, fields, progress, most)
    else:
        records = _json_records(part, progress, most)
    for position, record in enumerate(records):
        if record is _BLANK or (record is None and wanted is not None):
            continue
        if record is None:
            limit = f"{max_record_mb:g} MB (documents.max_record_mb)"
            yield Unreadable(part, position + 1, f"the record is longer than {limit}")
        elif isinstance(record, Unreadable):
            yield record
        else:
            try:
                yield _document(position, record, part, fields)
            except WrongFieldError as error:
                yield Unreadable(part, position + 1, str(error))


def in_batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in order, in batches of about ``BATCH_CHARACTERS``."""
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


# Records: an object, ``_BLANK``, ``Unreadable``, or None for one that is too long


_BLANK = object()  # an empty line: counted as a line, not as a record
_NULL = object()  # JSON's null


class WrongFieldError(ValueError):
    pass


def _json_records(part: str, progress: Progress | None, most: Most) -> Iterator[Any]:
    is_list = part.removesuffix(".gz").removesuffix(".zst").endswith(".json")
    system, name = located(part)
    with system.open(name, "rb") as stream:
        line = 0
        try:
            records = (elements if is_list else lines)(unpacked(part, stream, progress), most)
            for line, content in enumerate(records, start=1):
                if content is None:
                    yield None
                elif is_list or content.strip():
                    yield _parsed(content, part, line, is_list)
                else:
                    yield _BLANK
        except DamagedError as error:
            yield Unreadable(part, line + 1, f"file is cut short or damaged here: {error}")


def _parsed(content: bytes, part: str, line: int, of_list: bool) -> Any:
    try:
        record = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Unreadable(part, line, f"not UTF-8 text at byte {error.start}")
    except json.JSONDecodeError as error:
        if b"\x00" in content[:16]:
            return Unreadable(part, line, "not UTF-8 text (zero bytes; UTF-16?)")
        where = f"line {error.lineno} of it, column {error.colno}"
        where = where if of_list else f"column {error.colno}"
        return Unreadable(part, line, f"broken JSON: {error.msg} at {where}")
    except RecursionError:
        return Unreadable(part, line, "broken JSON: nested too deeply")
    except ValueError:
        return Unreadable(
            part, line, f"a number of more than {sys.get_int_max_str_digits()} digits"
        )
    return _NULL if record is None else record


def _parquet_records(
    part: str, fields: Fields, progress: Progress | None, most: Most
) -> Iterator[Any]:
    top = {path.split(".")[0] for path in fields.model_dump().values()}
    system, name = located(part)
    with system.open(name, "rb") as stream:
        row = 0
        try:
            for record, share in read_rows(stream, top, most):
                yield record
                row += 1
                if progress:
                    progress.add(progress.total * share)
        except DamagedParquetError as error:
            yield Unreadable(
                part, row + 1 if row else None, f"Parquet cut short or damaged: {error}"
            )


# Fields


def _document(position: int, record: Any, part: str, fields: Fields) -> Document:
    if not isinstance(record, dict):
        kind = "nothing" if record is _NULL else _kind(record)
        raise WrongFieldError(f"the record is {kind}, not an object")
    text = value_at(record, fields.text)
    if text is None:
        raise WrongFieldError(f"'{fields.text}' is missing")
    if not isinstance(text, str):
        raise WrongFieldError(f"'{fields.text}' is {_kind(text)}, not text")
    if not text.strip():
        raise WrongFieldError(f"'{fields.text}' is empty")
    _check_encodable(text, fields.text)
    in_force = value_at(record, fields.in_force)
    return Document(
        position=position,
        id=_string(record, fields.id) or f"{spelled(part).rsplit('/', 1)[-1]}:{position + 1}",
        text=text,
        title=_string(record, fields.title) or "",
        date=_string(record, fields.date),
        doc_type=_string(record, fields.doc_type) or "",
        subjects=_strings(record, fields.subject_matter),
        language=_string(record, fields.language),
        celex=_string(record, fields.celex),
        in_force=in_force if isinstance(in_force, bool) else None,
        directory_code=_string(record, fields.directory_code),
        work=_string(record, fields.work),
    )


def _check_encodable(text: str, path: str) -> None:
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise WrongFieldError(
                f"'{path}' has half a surrogate pair at character {error.start}"
            ) from error


def value_at(record: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path; None if it is missing. A key may itself contain the dots."""
    value: Any = record
    for key in [path] if path in record else path.split("."):
        if value is None:
            return None
        if not isinstance(value, dict):
            raise WrongFieldError(f"'{path}': {_kind(value)} where an object is expected")
        value = value.get(key)
        if isinstance(value, Unconvertible):
            raise WrongFieldError(f"'{path}' {value.reason}")
    return value


def _string(record: Mapping[str, Any], path: str) -> str | None:
    value = value_at(record, path)
    if value is None or value == "":
        return None
    if isinstance(value, (dict, list, tuple, bool, bytes)):
        raise WrongFieldError(f"'{path}' is {_kind(value)}, not text")
    text = str(value)
    _check_encodable(text, path)
    return text


def _strings(record: Mapping[str, Any], path: str) -> tuple[str, ...]:
    value = value_at(record, path)
    if value is None:
        return ()
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        for item in value:
            _check_encodable(item, path)
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
    """The error of a step that set too many records aside."""
    where = f"{first.file}:{first.line}" if first.line else first.file
    return (
        f"{unreadable} of {total} records ({unreadable / total:.1%}) cannot be read, more than "
        f"documents.max_unreadable_share allows ({limit:.1%}). The first: {where}: "
        f"{first.reason}. Repair the documents, or raise the share in the recipe."
    )


def open_lines(path: str, max_record_mb: float = MAX_RECORD_MB) -> Iterator[tuple[int, Any]]:
    """Line numbers (from 1) and records (or ``Unreadable``) of a JSONL file (.gz, .zst)."""
    limit = max_record_mb * 1e6
    for line, record in enumerate(_json_records(path, None, lambda _: limit), start=1):
        if record is None:
            yield line, Unreadable(path, line, f"the line is longer than {max_record_mb:g} MB")
        elif record is not _BLANK:
            yield line, record
