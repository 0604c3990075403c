"""Atomic file writes, and digests of inputs.

Every output folder is named by a digest of its inputs, and a file is either absent or complete: it is
written under another name, flushed to disk and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# The folder of corpora, records, models and all other state on this machine.
HOME = Path(os.environ.get("FASTCPT_HOME") or Path(__file__).resolve().parents[2] / ".fastcpt")
BASE_MODELS = "base_models"  # folder of converted base models, in HOME and in a GPU host's root


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to; it replaces ``path`` if the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # random, as machines that share the folder may have equal pids
    aside = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.partial")
    try:
        yield aside
        flush(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    flush(path.parent)


def flush(path: Path) -> None:
    """fsync a file, or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as readable JSON, atomically."""
    with whole_file(path) as aside:
        aside.write_text(json.dumps(content, indent=2, sort_keys=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file; ``FileNotFoundError`` or ``json.JSONDecodeError`` otherwise."""
    return json.loads(path.read_text())


def sha256_of_file(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def hash_of(*parts: object) -> int:
    """A 64-bit hash of a value, the same on every machine."""
    joined = "\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "little")


def digest_of(*parts: Any) -> str:
    """16 hexadecimal digits that name an output by its inputs.

    ``parts`` are JSON-serialisable; the order of a mapping's keys does not matter.
    """
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
