"""benchmarks/selection_value.py: arms by hand, and the whole experiment with a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import selection_arms
from selection_pool import Pool
from selection_rows import SpanRows
from selection_table import comparison_table, difference

from fastcpt.corpus.sample import generate_sample

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "selection_value.py"


def pool_of(*documents: list[int]) -> Pool:
    length = np.array([len(ids) for ids in documents])
    begin = np.cumsum(length) - length
    table = pa.table({"year": np.full(len(length), 2020, dtype=np.int16)})
    ids = np.concatenate(documents).astype(np.int32)
    return Pool(ids, begin, length, begin, table, Path("none"))


def test_documents_are_cut_where_the_budget_is_full() -> None:
    pool = pool_of([1] * 2, [2] * 5, [3] * 10)
    spans = selection_arms.head(pool, 12, np.random.default_rng(0))
    assert spans.tolist() == [[0, 2], [2, 5], [7, 5]]


def test_a_window_lies_inside_its_document() -> None:
    pool = pool_of([1] * 2, [2] * 5, [3] * 10)
    spans = selection_arms.window(pool, 12, np.random.default_rng(0))
    assert spans[:, 1].tolist() == [2, 5, 5]
    assert spans[2, 0] in range(7, 13)


def test_rows_do_not_join_documents_or_pieces() -> None:
    pool = pool_of([1, 2, 3, 4], [5, 6, 7])
    pool.pieces = np.array([0, 2, 4])  # the first document lost a passage before its third token
    rows = SpanRows(pool, np.array([[0, 4], [4, 2]]), 6)
    assert len(rows) == 1
    row = rows[0]
    assert sorted(
        np.split(row.input_ids, np.cumsum(row.lengths)[:-1])[n].tolist() for n in range(3)
    ) == [
        [1, 2],
        [3, 4],
        [5, 6],
    ]
    assert rows.targets_in(0) == 3


def test_what_is_covered_is_not_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection_arms, "PASSAGE", 8)
    law, other, figures = list(range(8)), list(range(10, 18)), list(range(30, 38))
    # twice the law, twice the other text, and figures that one document alone has
    pool = pool_of(law, law, other, figures, other)
    spans = selection_arms.novel(pool, 16, np.random.default_rng(0))
    assert len(spans) == 2
    assert {tuple(pool.ids[b : b + n].tolist()) for b, n in spans} == {tuple(law), tuple(other)}


def test_a_difference_is_paired() -> None:
    runs = {
        seed: {"random": {"nats": [90.0, 900.0 * (seed + 1)], "bytes": [50, 500]}}
        for seed in (0, 1)
    }
    others = {
        seed: {"random": {"nats": [100.0, 1000.0 * (seed + 1)], "bytes": [50, 500]}}
        for seed in (0, 1)
    }
    # each document costs a tenth less, in every draw: no width, whatever the spread
    found = difference(runs, others, "random")
    assert found == pytest.approx({"percent": -10.0, "low": -10.0, "high": -10.0})


def test_the_best_trivial_arm_is_named_for_each_set() -> None:
    def run(arm: str, random: float, newest: float) -> dict[str, object]:
        sets = {"random": random, "newest": newest}
        return {"arm": arm, "seed": 0} | {
            name: {"nats": [nats], "bytes": [10]} for name, nats in sets.items()
        }

    _, figures = comparison_table(
        [run("lots", 8, 4), run("head", 4, 8), run("legal", 2, 2)], ["lots", "head"]
    )
    own = figures["legal"]
    assert own["random"]["against_best_trivial"]["arm"] == "head"
    assert own["random"]["against_best_trivial"]["percent"] == pytest.approx(-50)
    assert own["newest"]["against_best_trivial"]["arm"] == "lots"


@pytest.mark.slow
def test_the_experiment_goes_on_where_it_was_ended(tmp_path: Path) -> None:
    generate_sample(tmp_path / "sample", 100, seed=0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    command = [
        *(sys.executable, str(SCRIPT), "--work", str(tmp_path / "work")),
        *(
            "--arms",
            "legal",
            "--without",
            "shortest,window,all,head",
            "--seeds",
            "0",
            "--steps",
            "2",
        ),
        *("--vocabulary", "512", "--shape", json.dumps(shape), "--sequence", "128"),
        *("--micro", "1", "--accumulation", "1", "--dtype", "float32"),
        *("--held_out_tokens", "5000", "--side_by_side", "2"),
    ]
    environment = os.environ | {"FASTCPT_HOME": str(tmp_path / "home")}

    def run(*more: str) -> str:
        return subprocess.run(
            [*command, *more], env=environment, check=True, capture_output=True, text=True
        ).stdout

    run("--documents", str(tmp_path / "sample" / "parsed"), "--only_arms")
    first = run()
    figures = json.loads(first.splitlines()[-1])["arms"]
    assert set(figures) == {"lots", "legal"}
    # an untrained model of 512 words: about 9 bits a token
    assert 1 < figures["legal"]["random"]["bits_per_byte"] < 9
    again = run()
    assert "tokens/s" in first
    assert "tokens/s" not in again
    assert json.loads(again.splitlines()[-1])["arms"] == figures
