"""A measured run makes the next plan with the same key narrower, and correct."""

import json
from dataclasses import asdict

import pytest

from fastcpt.planning.history import FILE, compare_with_plan, read_history, record_run
from fastcpt.planning.jobs import changed
from fastcpt.planning.measured import measured_rows
from fastcpt.planning.plan import plan
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
    "startup_seconds": 60.0,
}


@pytest.fixture
def recipe():
    return changed(
        load_recipe("cpt_config_fast", {"training.optimizer_states": "float32"}),
        {**EIGHT, "cluster.gpus": 2, "cluster.gpu": "H200"},
    )


def test_the_next_plan_uses_the_last_run(recipe, tmp_path):
    before = plan(recipe)
    record_run(tmp_path, "run_1", recipe, None, TOOK, evaluation_seconds=30.0)
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
    took = {
        "hours": content["hours"]["high"] * 1.1,
        "training_hours": content["training_hours"]["low"],
        "tokens_per_s": content["tokens_per_s"]["low"] / 2,
        "memory_gb": 99.0,
        "cost": None,
    }
    rows = {row["what"]: row for row in compare_with_plan(content, took)}
    assert rows["hours on the GPUs, without stage 2"]["off"] == pytest.approx(0.1)
    assert rows["hours of training steps"]["off"] == 0
    assert rows["tokens/s, all GPUs"]["off"] == pytest.approx(-0.5)
    memory = rows["memory per GPU (GB, torch's)"]
    assert memory["low"] == memory["high"] == content["memory_gb"]["total"] - 1.5
    assert memory["off"] == pytest.approx(99.0 / memory["high"] - 1)
    # what the run has not got to stands there with its plan alone
    assert rows["cost (USD)"]["actual"] is None
    assert rows["cost (USD)"]["low"] == content["cost"]["low"]
    assert rows["hours of evaluation"]["off"] is None


def test_what_was_not_planned_is_shown_as_it_was():
    sample = plan(load_recipe("sample")).to_json()
    (row,) = compare_with_plan(sample, {"training_hours": 0.02})
    assert (row["low"], row["high"], row["actual"], row["off"]) == (None, None, 0.02, None)


RECORDED = [row for row in measured_rows() if "memory_gb" in row[2]]


@pytest.mark.parametrize(
    ("job", "hardware", "facts"), RECORDED, ids=[facts["what"] for *_, facts in RECORDED]
)
def test_replay_of_recorded_runs(job, hardware, facts, tmp_path):
    """Every recorded run of the trainer: planned before it ran, compared, and planned after it.

    The first plan's range holds the rate, its memory is within a tenth where the run kept and
    recomputed the same; the next plan is about the run's own figures.
    """
    attention = {"cudnn": "auto", "flash": "flash_attention_2"}[job.attention]
    recipe = changed(
        load_recipe("cpt_config_fast", {"training.optimizer_states": "float32"}),
        {
            "model.name_or_path": f"meta-llama/{facts['model']}" if "model" in facts else None,
            "model.config": None if "model" in facts else asdict(job.shape),
            "model.attn_implementation": attention,
            "lora": job.lora and job.lora.model_dump(),
            "training.use_fp8": job.fp8,
            "training.per_device_train_batch_size": job.micro_batch,
            "training.gradient_accumulation_steps": job.accumulation,
            "cluster.gpus": job.ranks,
            "cluster.gpu": hardware.gpu.name,
        },
    )
    before = plan(recipe)
    assert before.rate_source.startswith("this project's measurements")
    everyone = job.ranks * facts["rate"]
    took = {
        "tokens_per_s": everyone,
        "training_hours": before.tokens / everyone / 3600,
        "memory_gb": facts["memory_gb"],
    }
    rows = {row["what"]: row for row in compare_with_plan(before.to_json(), took)}
    frozen_in_bf16 = (
        job.lora and job.fp8 and not job.one_byte
    )  # when the row was measured; now they take one byte
    gathered_for_it = frozen_in_bf16 and job.ranks > 1
    if (
        job.attended is None and not gathered_for_it
    ):  # documents much shorter than a row are faster than any plan says
        assert rows["tokens/s, all GPUs"]["off"] == 0
        assert rows["hours of training steps"]["off"] == 0
    if before.checkpointing == job.recomputation and not frozen_in_bf16:
        assert abs(rows["memory per GPU (GB, torch's)"]["off"]) < 0.1

    training = {
        "tokens_per_s_per_gpu": facts["rate"],
        "peak_memory_gb": facts["memory_gb"],
        "startup_seconds": 75.0,
        "checkpointing": job.checkpointing,
        "layers_recomputed": job.layers_recomputed or 0,
    }
    record_run(tmp_path, "replayed", recipe, None, training, evaluation_seconds=900.0)
    after = plan(recipe, history=tmp_path / FILE)
    assert after.rate_source.startswith("last run here, replayed of 2")
    assert after.tokens_per_s.low == pytest.approx(0.93 * everyone)
    assert after.tokens_per_s.high == pytest.approx(1.07 * everyone)
    assert after.hours_parts["start-up"] == 75 / 3600
    assert after.hours_parts["evaluation"] == 900 / 3600
    if before.checkpointing == job.recomputation:
        assert after.memory_gb["total"] == pytest.approx(facts["memory_gb"] + 1.5)
