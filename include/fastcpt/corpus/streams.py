"""Splits a file into lines, or into the elements of its JSON list, in bounded memory.

A kilobyte of .gz or .zst can hold gigabytes, possibly in one line. Content is decompressed in small
steps, and a line or element that is too long is not kept.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

from fastcpt.progress import Progress

CHUNK = 1 << 20
# Bytes of .zst per step: four bytes decompress to at most a block of 128 KiB, so a step yields 64 MiB at most
ZSTD_STEP = 2048

# The most bytes that the record of a number (from 0) may have
Most = Callable[[int], float]


class DamagedError(Exception):
    """The compressed content is truncated or damaged."""


def unpacked(name: str, stream: Any, progress: Progress | None) -> Iterator[bytes]:
    """The decompressed content of a stream, a few megabytes at a time; ``name`` tells the format.

    ``progress`` counts stored bytes.
    """
    if progress:
        stream = _Counted(stream, progress)
    if name.endswith(".zst"):
        yield from _zstd_chunks(stream)
        return
    source: Any = gzip.GzipFile(fileobj=stream) if name.endswith(".gz") else stream
    try:
        while chunk := source.read(CHUNK):
            yield chunk
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DamagedError(str(error)) from error


class _Counted:
    """A stream whose reads are counted."""

    def __init__(self, stream: BinaryIO, progress: Progress):
        self.stream, self.progress = stream, progress

    def read(self, size: int = -1) -> bytes:
        content = self.stream.read(size)
        self.progress.add(len(content))
        return content


def _zstd_chunks(stream: Any) -> Iterator[bytes]:
    """Decompress the frames of a .zst file.

    The package's own stream reader does not notice a truncated file.
    """
    import zstandard

    frame = None
    while content := stream.read(CHUNK):
        compressed = memoryview(content)
        while len(compressed):
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            step, compressed = compressed[:ZSTD_STEP], compressed[ZSTD_STEP:]
            try:
                yield from _pieces(frame.decompress(step))
            except zstandard.ZstdError as error:
                raise DamagedError(str(error)) from error
            if frame.eof:
                # hand the unused bytes of this step to the next frame
                unused = len(frame.unused_data)
                done = len(content) - len(compressed) - unused
                compressed = memoryview(content)[done:]
                frame = None
    if frame is not None:
        raise DamagedError("the last zstd frame has no end")


def _pieces(content: bytes) -> Iterator[bytes]:
    if len(content) <= CHUNK:
        yield content
        return
    for begin in range(0, len(content), CHUNK):
        yield content[begin : begin + CHUNK]


def lines(chunks: Iterable[bytes], most: Most) -> Iterator[bytes | None]:
    """Lines of a stream of chunks; None for a line that is too long.

    A line's pieces are joined only once, so a long line takes linear time.
    """
    number = size = 0
    pieces: list[bytes] = []
    allowed = most(0)
    for chunk in chunks:
        *ended, rest = chunk.split(b"\n")
        for line in ended:
            size += len(line)
            if size > allowed:
                yield None
            else:
                yield b"".join([*pieces, line]) if pieces else line
            pieces, size, number = [], 0, number + 1
            allowed = most(number)
        size += len(rest)
        if size > allowed:
            pieces = []
        elif rest:
            pieces.append(rest)
    if size:
        yield None if size > allowed else b"".join(pieces)


_BLANKS = b" \t\r\n"
_SIGNIFICANT = re.compile(rb'["\[\]{},]')
_IN_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)


def elements(chunks: Iterable[bytes], most: Most) -> Iterator[bytes | None]:
    """The elements of a JSON list, as text; None for one that is too long.

    A file without a list is one element. Only brackets and quotes are scanned; elements are parsed
    later, so a broken one does not affect the next. ``DamagedError`` if the list has no end, or if
    something follows it.
    """
    reader = _Elements(most)
    for chunk in chunks:
        yield from reader.feed(chunk)
    yield from reader.end()


class _Elements:
    """The state of the scan between two chunks of a JSON text."""

    def __init__(self, most: Most):
        self.most = most
        self.number = self.size = 0
        self.pieces: list[bytes] = []
        self.depth = -1  # inside the list 0; -1 before it, -2 after it
        self.quoted = False
        self.is_list = True
        self.kept = b""  # a backslash at the end of the previous chunk

    def feed(self, chunk: bytes) -> Iterator[bytes | None]:
        chunk, self.kept = self.kept + chunk, b""
        at = 0
        if self.depth == -1:
            at = len(chunk) - len(chunk.lstrip(_BLANKS))
            if at == len(chunk):
                return
            self.is_list = chunk[at : at + 1] == b"["
            self.depth = 0
            at += self.is_list
        if not self.is_list:
            self._add(chunk[at:])
            return
        if (len(chunk) - len(chunk.rstrip(b"\\"))) % 2:
            chunk, self.kept = chunk[:-1], b"\\"
        begin = at
        while at < len(chunk):
            if self.depth == -2:
                if chunk[at:].strip(_BLANKS):
                    raise DamagedError("something follows the end of the list")
                return
            if self.quoted:
                at = _IN_STRING.match(chunk, at).end()  # type: ignore[union-attr]
                self.quoted = at == len(chunk)
                at += 1
                continue
            found = _SIGNIFICANT.search(chunk, at)
            if not found:
                break
            sign, at = found[0], found.end()
            if sign == b'"':
                self.quoted = True
            elif self.depth == 0 and sign in b",]":
                self._add(chunk[begin : at - 1])
                yield from self._ended(last=sign == b"]")
                begin = at
            elif sign in b"[{":
                self.depth += 1
            elif sign in b"]}" and self.depth:
                self.depth -= 1
        if self.depth >= 0:
            self._add(chunk[begin:])

    def end(self) -> Iterator[bytes | None]:
        if self.is_list and self.depth != -2:
            where = "holds nothing" if self.depth == -1 else "is a list that has no end"
            raise DamagedError(f"the file {where}")
        if not self.is_list:
            yield from self._ended(last=False)

    def _add(self, piece: bytes) -> None:
        self.size += len(piece)
        if self.size > self.most(self.number):
            self.pieces = []
        else:
            self.pieces.append(piece)

    def _ended(self, last: bool) -> Iterator[bytes | None]:
        element = None if self.size > self.most(self.number) else b"".join(self.pieces)
        empty = element is not None and not element.strip(_BLANKS)
        if not (last and empty and self.number == 0):  # an empty list has no element
            yield element
        self.pieces, self.size = [], 0
        self.number += 1
        if last:
            self.depth = -2
