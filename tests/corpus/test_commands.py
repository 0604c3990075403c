"""The commands of the corpus, as typed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq

from corpus.made import act
from fastcpt.files import read_json

SCRIPTS = Path(__file__).resolve().parents[2] / "include" / "scripts"


def typed(home: Path, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPTS / script), *map(str, arguments)],
        env={**os.environ, "FASTCPT_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_filter_then_build_then_explain(
    documents: Callable[..., Path], tokenizer_folder: Path, home: Path, tmp_path: Path
) -> None:
    folder = documents([act(n, year=2000 + n % 20, words=200) for n in range(1, 81)])
    best, shards = tmp_path / "best", tmp_path / "shards"
    flags = ("--tokenizer", tokenizer_folder)
    create = ("create_fast_cpt_corpus.py", "--input_dir", folder, "--output_dir", best)
    made = typed(home, *create, "--target_tokens", 20_000, "--quality_threshold", 40, *flags)
    assert made.returncode == 0, made.stderr
    assert "outside_top_share" in (best / "funnel.md").read_text()
    assert (
        "holds this selection already"
        in typed(home, *create, "--target_tokens", 20_000, "--quality_threshold", 40, *flags).stdout
    )
    builder = ("cpt_corpus_builder.py", "--input_dir", best, "--output_dir", shards)
    built = typed(home, *builder, "--max_seq_length", 128, "--num_shards", 4, *flags)
    assert built.returncode == 0, built.stderr
    manifest = read_json(shards / "corpus_manifest.json")
    assert len(manifest["shards"]) == 4
    assert manifest["tokens"] <= 20_000 * 1.05
    assert {path.name for path in shards.glob("*.parquet")} == {
        f"cpt_train_shard_{n:02}.parquet" for n in range(4)
    }
    assert pq.read_table(shards / "cpt_train_shard_00.parquet").num_rows > 0
    told = typed(home, "explain.py", "32019R0019", "--input_dir", folder, *flags)
    assert told.returncode == 0, told.stderr
    assert "recency" in told.stdout
    assert "taken for" in told.stdout


def test_one_clear_line_where_something_is_wrong(home: Path, tmp_path: Path) -> None:
    wrong = typed(
        home, "cpt_corpus_builder.py", "--input_dir", tmp_path / "none", "--output_dir", tmp_path
    )
    assert wrong.returncode == 1
    assert wrong.stderr.splitlines() == [
        f"documents.path: '{tmp_path / 'none'}' does not exist; give a folder of documents"
    ]


def test_the_filter_needs_no_tokenizer(
    documents: Callable[..., Path], home: Path, tmp_path: Path
) -> None:
    """Only the build does: the default recipe's tokenizer is behind a login on the hub."""
    folder = documents([act(n, year=2021, words=200) for n in range(1, 41)])
    best = tmp_path / "best"
    flags = ("--target_tokens", 2_000_000_000, "--quality_threshold", 1)
    made = typed(
        home, "create_fast_cpt_corpus.py", "--input_dir", folder, "--output_dir", best, *flags
    )
    assert made.returncode == 0, made.stderr
    assert "tokens are estimated from words" in made.stderr
    assert "Llama-3.1-70B-Instruct" in made.stderr
    assert list(best.glob("*.jsonl.zst"))
    built = typed(
        home, "cpt_corpus_builder.py", "--input_dir", best, "--output_dir", tmp_path / "shards"
    )
    assert built.returncode != 0
    assert "is not on this machine" in built.stderr
