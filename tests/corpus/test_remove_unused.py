"""What `remove_unused.py` removes, and what it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from corpus.made import act
from fastcpt.corpus.build import build
from fastcpt.corpus.documents import list_parts
from fastcpt.corpus.score import score_parts
from fastcpt.corpus.select import select
from fastcpt.recipe import Recipe

SCRIPT = Path(__file__).resolve().parents[2] / "include" / "scripts" / "remove_unused.py"
OLD = time.time() - 40 * 86_400


def removed(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *words],
        env={**os.environ, "FASTCPT_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )


def aged(folder: Path) -> Path:
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (OLD, OLD))
    return folder


def folder_of(home: Path, name: str) -> Path:
    folder = home / name
    folder.mkdir(parents=True)
    (folder / "content").write_bytes(bytes(1000))
    return folder


def record(home: Path, built: dict[str, str]) -> Path:
    """A run that has ended, with the corpus that it built."""
    folder = home / "runs" / "r"
    (folder / "outputs").mkdir(parents=True, exist_ok=True)
    (folder / "outputs" / "build.json").write_text(json.dumps(built))
    moment = "2026-01-01T00:00:00+00:00"
    (folder / "run.json").write_text(json.dumps({"run": "r", "started": moment, "ended": moment}))
    return folder


def test_old_corpora_that_no_run_names_and_unused_ids_go(tmp_path: Path) -> None:
    old = ("corpora/old", "tokens/old", "selections/old", "scores/old")
    gone = [aged(folder_of(tmp_path, name)) for name in old]
    named = aged(folder_of(tmp_path, "corpora/named"))
    young = [folder_of(tmp_path, name) for name in ("corpora/young", "tokens/young")]
    others = [aged(folder_of(tmp_path, name)) for name in ("models/m", "ledger/c", "runs/r")]
    record(tmp_path, {"path": str(named), "digest": "named"})
    listed = removed(tmp_path, "--dry_run")
    assert all(str(folder) in listed.stdout for folder in gone)
    assert all(folder.is_dir() for folder in gone)
    assert removed(tmp_path).returncode == 0
    assert not any(folder.exists() for folder in gone)
    assert all((folder / "content").is_file() for folder in [named, *young, *others])
    assert not list(tmp_path.glob("*/.*"))
    assert removed(tmp_path, "--days", "0").returncode == 0
    assert not any(folder.exists() for folder in young)
    assert named.is_dir()


def test_a_record_that_cannot_be_read_keeps_everything(tmp_path: Path) -> None:
    old = aged(folder_of(tmp_path, "corpora/old"))
    (record(tmp_path, {}) / "outputs" / "build.json").write_text('{"pa')
    done = removed(tmp_path)
    assert done.returncode == 1
    assert "build.json cannot be read" in done.stderr
    assert old.is_dir()


def test_what_a_build_finds_again_counts_as_used(
    documents: Callable[..., Path], recipe_for: Callable[..., Recipe], home: Path
) -> None:
    recipe = recipe_for(
        documents([act(n, year=2000 + n % 20, words=150 + n) for n in range(1, 41)])
    )
    scores = score_parts(list_parts(recipe.documents), recipe, home, 1)
    selection = select([score["path"] for score in scores], recipe, home)["path"]
    made = Path(build(selection, recipe, home, 1)["path"])
    ids = [aged(folder) for folder in home.glob("tokens/*")]
    aged(made)
    assert build(selection, recipe, home, 1)["reused"]
    removed(home)
    assert made.is_dir()
    assert ids
    assert not any(folder.exists() for folder in ids)  # the complete corpus needs none


def test_a_moved_home_keeps_what_its_records_name_and_half_removed_folders_go(
    tmp_path: Path,
) -> None:
    named = aged(folder_of(tmp_path, "corpora/named"))
    half = folder_of(tmp_path, "tokens/.gone.removed")
    record(tmp_path, {"path": "/elsewhere/corpora/named"})
    assert removed(tmp_path).returncode == 0
    assert named.is_dir()
    assert not half.exists()
