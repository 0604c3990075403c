"""Finds what was added to a documents folder since a run, by names, sizes and times.

No file is read, so it takes seconds however large the folder is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from fastcpt.corpus.documents import located, why_set_aside

# About how many bytes of text a byte of file holds.
PACKED = {".gz": 4, ".zst": 6, ".parquet": 4}
# The keys that file systems use for a file's last change: a time, or an object store's tag.
CHANGED = ("mtime", "ETag", "etag", "md5Hash", "LastModified", "last_modified", "updated")

# For each part its bytes and its last change; stored as JSON.
State = Mapping[str, tuple[int, str]]


def state_of(parts: Iterable[str]) -> State:
    """The current state of the parts; a part that is not a file counts as empty."""
    state: dict[str, tuple[int, str]] = {}
    for part in parts:
        if why_set_aside(part):
            state[part] = (0, "")
            continue
        system, name = located(part)
        facts = system.info(name)
        changed = next((str(facts[key]) for key in CHANGED if facts.get(key)), "")
        state[part] = (int(facts.get("size") or 0), changed)
    return state


def text_bytes(state: State) -> int:
    """An estimate of the bytes of text, for a plan before any document is read."""
    return sum(size * PACKED.get(Path(part).suffix, 1) for part, (size, _) in state.items())


def arrived(before: State, now: State) -> State:
    """The parts that are new or changed, with their new bytes.

    A file that grew was appended to: only the growth is new. Any other changed file is all new.
    """
    found: dict[str, tuple[int, str]] = {}
    for part, (size, changed) in now.items():
        old, old_changed = before.get(part, (0, ""))
        if part not in before:
            found[part] = (size, changed)
        elif (size, changed) != (old, old_changed):
            found[part] = (size - old if size > old else size, changed)
    return found
