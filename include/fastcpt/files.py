"""Files that appear whole, and digests of what they were made from.

Every output folder of a run is named by a digest of its inputs, and a file is either absent
or complete: it is written aside, flushed to the disk and renamed into place.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Where corpora, records, models and all other state of this machine lie.
HOME = Path(os.environ.get("FASTCPT_HOME") or Path(__file__).resolve().parents[2] / ".fastcpt")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to; it takes the place of ``path`` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # two machines that share the folder may have processes of the same number
    aside = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.partial")
    try:
        yield aside
        flush(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    flush(path.parent)


def flush(path: Path) -> None:
    """Return when a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as readable JSON; the file appears whole."""
    with whole_file(path) as aside:
        aside.write_text(json.dumps(content, indent=2, sort_keys=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file; ``FileNotFoundError`` or ``json.JSONDecodeError`` otherwise."""
    return json.loads(path.read_text())


def sha256_of_file(path: Path) -> str:
    """The hexadecimal SHA-256 of a file's bytes, read in pieces."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def hash_of(*parts: object) -> int:
    """64 bits that stand for a value, the same on every machine."""
    joined = "\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "little")


def digest_of(*parts: Any) -> str:
    """16 hexadecimal digits that name an output by what it was made from.

    ``parts`` are JSON-serialisable; the order of a mapping's keys does not matter.
    """
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
