"""Digests of a checkpoint's files, to detect damage by the disk or the network.

Digests are computed while the files are written, so nothing is read twice. All files are verified before
a checkpoint is used. For a checkpoint of 112 GB each of eight ranks verifies 14 GB, which takes eleven
seconds of SHA-256; loading has to read the files anyway.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fastcpt.files import flush, read_json, sha256_of_file, write_json

DIGESTS = "digests.json"  # written last: {file: {"bytes": ..., "sha256": ...}}

Digest = dict[str, Any]


class _Digesting:
    """A file object that hashes what is written to it, sequentially."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256, self.bytes = file, hashlib.sha256(), 0

    def write(self, content: Any) -> int:
        self.sha256.update(content)
        self.bytes += memoryview(content).nbytes
        return self.file.write(content)

    def flush(self) -> None:
        self.file.flush()


def save_tensors(content: Any, path: Path) -> Digest:
    """``torch.save`` to a new file, flushed to disk; its digest."""
    with path.open("xb") as file:
        digesting = _Digesting(file)
        torch.save(content, digesting)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": digesting.bytes, "sha256": digesting.sha256.hexdigest()}


def digest_of_file(path: Path) -> Digest:
    return {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}


def write_digests(folder: Path, digests: Mapping[str, Digest]) -> None:
    """Complete a folder whose files are on disk."""
    write_json(folder / DIGESTS, digests)
    flush(folder)


def what_is_damaged(folder: Path, rank: int, ranks: int) -> str | None:
    """What is wrong with this rank's share of a folder's files; None if they are undamaged.

    Sizes are compared first: that is fast and finds most damage. ``OSError`` if the disk does not answer,
    which may pass and does not mean damage.
    """
    try:
        digests: dict[str, Digest] = read_json(folder / DIGESTS)
        files: Sequence[tuple[str, Digest]] = sorted(digests.items())
        for name, digest in files:
            size = (folder / name).stat().st_size
            if size != digest["bytes"]:
                return f"{name} has {size:,} bytes of {digest['bytes']:,}"
        for name, digest in files[rank::ranks]:
            if sha256_of_file(folder / name) != digest["sha256"]:
                return f"{name} has another content than was written (its SHA-256 differs)"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        return f"it cannot be read: {error}"
    return None
