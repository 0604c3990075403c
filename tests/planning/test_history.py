"""Learning: a measured run makes the next plan of the same key narrower, and right."""

import json

import pytest

from fastcpt.planning.history import FILE, compare, read_history, record_run
from fastcpt.planning.measured import check_rows
from fastcpt.planning.plan import changed, plan
from fastcpt.recipe import load_recipe

EIGHT = {
    "model.name_or_path": "meta-llama/Llama-3.1-8B",
    "budget.hours": None,
    "budget.money": None,
}
TOOK = {
    "tokens": 78_643_200,
    "seconds": 3600.0,
    "tokens_per_s_per_gpu": 11_000.0,
    "peak_memory_gb": 101.5,
}


@pytest.fixture
def recipe():
    return changed(
        load_recipe("cpt_config_fast"), {**EIGHT, "cluster.gpus": 2, "cluster.gpu": "H200"}
    )


def test_the_next_plan_uses_the_last_run(recipe, tmp_path):
    before = plan(recipe)
    record_run(tmp_path, "run_1", recipe, None, TOOK, startup_seconds=60.0, evaluation_seconds=30.0)
    after = plan(recipe, history=tmp_path / FILE)
    assert after.rate_source.startswith("last run here, run_1 of 2")
    assert (after.tokens_per_s.low + after.tokens_per_s.high) / 2 == pytest.approx(22_000)
    assert after.hours.high - after.hours.low < before.hours.high - before.hours.low
    assert after.hours_parts["start-up"] == pytest.approx(60 / 3600)
    assert after.hours_parts["evaluation"] == pytest.approx(30 / 3600)
    # torch's own peak, and the runtime beside it
    assert after.memory_gb["total"] == pytest.approx(101.5 + 1.5)


@pytest.mark.parametrize(
    "other",
    [
        {"training.use_fp8": False},
        {"corpus.max_seq_length": 2048},
        {"model.name_or_path": "meta-llama/Llama-3.2-3B"},
        {"cluster.gpu": "H100"},
        {"lora": {}},
    ],
    ids=["precision", "sequence", "model", "gpu", "method"],
)
def test_only_the_same_is_taken_for_the_same(recipe, other, tmp_path):
    record_run(tmp_path, "run_1", recipe, None, TOOK)
    assert "last run" not in plan(changed(recipe, other), history=tmp_path / FILE).rate_source


def test_another_number_of_gpus_is_scaled(recipe, tmp_path):
    record_run(tmp_path, "run_1", recipe, None, TOOK)
    four = plan(recipe, cluster="4xH200", history=tmp_path / FILE)
    assert four.rate_source.startswith("last run here")
    assert 1.7 * 22_000 < (four.tokens_per_s.low + four.tokens_per_s.high) / 2 < 2.1 * 22_000


def test_a_run_recorded_twice_is_kept_once_and_the_newest_counts(recipe, tmp_path):
    record_run(tmp_path, "run_1", recipe, None, TOOK)
    record_run(tmp_path, "run_2", recipe, None, {**TOOK, "tokens_per_s_per_gpu": 12_000.0})
    record_run(tmp_path, "run_2", recipe, None, {**TOOK, "tokens_per_s_per_gpu": 12_500.0})
    assert [run.run for run in read_history(tmp_path / FILE)] == ["run_1", "run_2"]
    found = plan(recipe, history=tmp_path / FILE)
    assert (found.tokens_per_s.low + found.tokens_per_s.high) / 2 == pytest.approx(25_000)


def test_cpus_learn_too(tmp_path):
    sample = load_recipe("sample")
    record_run(
        tmp_path, "first", sample, None, {"tokens_per_s_per_gpu": 1500.0, "peak_memory_gb": 0.0}
    )
    found = plan(sample, history=tmp_path / FILE)
    assert found.fits
    assert found.hours.low < 245_760 / 3000 / 3600 < found.hours.high


def test_a_broken_line_says_which(tmp_path):
    (tmp_path / FILE).write_text('{"run": "x"}\n')
    with pytest.raises(ValueError, match=r"plan_history.jsonl:1: not a measured run"):
        read_history(tmp_path / FILE)


def test_plan_beside_actual(recipe):
    content = json.loads(json.dumps(plan(recipe).to_json()))
    hours = (content["hours"]["low"] + content["hours"]["high"]) / 2
    took = {"seconds": hours * 3600, "tokens_per_s_per_gpu": 1000.0, "peak_memory_gb": 99.0}
    rows = {what: inside for what, *_, inside in compare(content, took, gpus=2)}
    assert rows == {"tokens_per_s": False, "hours": True, "memory_gb": True}


def test_replay_of_recorded_runs(tmp_path):
    """Every measured full-training row, planned before it ran: the plan held in all of them.

    And planned again after it, from the run itself: the range is about that figure.
    """
    full = [row for row in check_rows() if "DeepSpeed" in row.what]
    assert len(full) == 2
    for number, row in enumerate(full):
        fp8 = "FP8" in row.what
        recipe = changed(
            load_recipe("cpt_config_fast"),
            {**EIGHT, "training.use_fp8": fp8, "training.gradient_accumulation_steps": 1,
             "training.gradient_checkpointing": False, "cluster.gpus": 2, "cluster.gpu": "H200"},
        )  # fmt: skip
        training = {"tokens_per_s_per_gpu": row.rate, "seconds": 12_000 * 4 * 3072 / row.rate / 2}
        rows = compare(plan(recipe).to_json(), training, gpus=2)
        assert rows[0][-1], rows[0]
        home = tmp_path / str(number)
        record_run(home, "replayed", recipe, None, training)
        after = plan(recipe, history=home / FILE)
        assert after.tokens_per_s.low < 2 * row.rate < after.tokens_per_s.high
