"""Removes what nothing in FASTCPT_HOME needs any more (``in_use``)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from fastcpt.registry.in_use import Policy, unused


def clean(home: Path, policy: Policy, dry_run: bool) -> Iterator[tuple[Path, int]]:
    """Remove folder after folder, or only list them (``dry_run``); yields each with its bytes.

    Raises ``InUseError`` before anything is removed.
    """
    gone = unused(home, policy)
    if not dry_run:
        for left in home.glob("*/.*.removed"):
            shutil.rmtree(left)  # left by a removal that was killed
    for folder in gone:
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        if not dry_run:
            # rename first, so that a half-removed folder is never used
            aside = folder.with_name(f".{folder.name}.removed")
            folder.rename(aside)
            shutil.rmtree(aside)
        yield folder, size


def line(place: object, size: int) -> str:
    """One line of the list: a folder, or a word for the sum, with its size."""
    return f"{size / 1e9:8.2f} GB  {place}"
