"""What counts as new in a folder of documents."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastcpt.corpus.documents import list_parts
from fastcpt.corpus.new_documents import State, arrived, state_of, text_bytes
from fastcpt.recipe import Documents


def look(folder: Path) -> State:
    return state_of(list_parts(Documents(path=str(folder))))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("x" * 100)
    return tmp_path


def test_nothing_is_new_where_nothing_was_changed(folder: Path) -> None:
    before = look(folder)
    (folder / "notes.txt").write_text("no document")
    assert arrived(before, look(folder)) == {}


def test_new_files_count_whole_grown_ones_by_their_growth_and_changed_ones_whole(
    folder: Path,
) -> None:
    before = look(folder)
    (folder / "c.jsonl.gz").write_text("x" * 10)
    with (folder / "a.jsonl").open("a") as grown:
        grown.write("y" * 30)
    os.utime(folder / "b.jsonl", (0, 0))
    new = arrived(before, look(folder))
    sizes = {Path(part).name: size for part, (size, _) in new.items()}
    assert sizes == {"a.jsonl": 30, "b.jsonl": 100, "c.jsonl.gz": 10}
    # gzip packs text to about a quarter
    assert text_bytes(new) == 30 + 100 + 4 * 10


def test_a_file_that_was_taken_away_is_nothing_new(folder: Path) -> None:
    before = look(folder)
    (folder / "a.jsonl").unlink()
    assert arrived(before, look(folder)) == {}


def test_a_link_to_nothing_is_empty(folder: Path) -> None:
    (folder / "gone.jsonl").symlink_to(folder / "nowhere")
    assert look(folder)[str(folder / "gone.jsonl")] == (0, "")
