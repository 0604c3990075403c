"""What has come to a folder of documents since a run took it, told by names, sizes and times alone.

Nothing is read, so that looking costs seconds, however large the folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from fastcpt.corpus.documents import located, why_set_aside

# Bytes of text in a byte of file, about.
PACKED = {".gz": 4, ".zst": 6, ".parquet": 4}
# What file systems call the change of a file: its time here, a tag or a time in an object store.
CHANGED = ("mtime", "ETag", "etag", "md5Hash", "LastModified", "last_modified", "updated")

# Of each part its bytes and what tells that it was changed; JSON keeps it.
State = Mapping[str, tuple[int, str]]


def state_of(parts: Iterable[str]) -> State:
    """The documents as they are now; what is no file counts as empty."""
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
    """Bytes of text, about: for a plan before any document is read."""
    return sum(size * PACKED.get(Path(part).suffix, 1) for part, (size, _) in state.items())


def arrived(before: State, now: State) -> State:
    """The parts that are new or changed, with the bytes that are new.

    Of a file that grew those it grew by: it was appended to. One that was changed otherwise is new.
    """
    found: dict[str, tuple[int, str]] = {}
    for part, (size, changed) in now.items():
        old, old_changed = before.get(part, (0, ""))
        if part not in before:
            found[part] = (size, changed)
        elif (size, changed) != (old, old_changed):
            found[part] = (size - old if size > old else size, changed)
    return found
