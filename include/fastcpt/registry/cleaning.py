"""Removing what nothing in FASTCPT_HOME needs any more (``in_use``)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from fastcpt.registry.in_use import Policy, unused


def clean(home: Path, policy: Policy, dry_run: bool) -> Iterator[tuple[Path, int]]:
    """Remove, or in a ``dry_run`` only name, one folder after another: each with its bytes.

    ``InUseError`` before anything is removed.
    """
    gone = unused(home, policy)
    if not dry_run:
        for left in home.glob("*/.*.removed"):
            shutil.rmtree(left)  # what a removal that was killed had begun
    for folder in gone:
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        if not dry_run:
            # under another name first: half of a folder is never taken for the whole
            aside = folder.with_name(f".{folder.name}.removed")
            folder.rename(aside)
            shutil.rmtree(aside)
        yield folder, size


def line(place: object, size: int) -> str:
    """A folder, or the word for them all, with its size."""
    return f"{size / 1e9:8.2f} GB  {place}"
