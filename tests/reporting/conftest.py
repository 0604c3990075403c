"""A small record like that of a finished run, with every file of a run with both stages."""

import json

import pytest

from fastcpt.files import write_json
from fastcpt.recipe import load_recipe
from fastcpt.reporting import record as records

RUN = "manual__2026-11-23T01:00:00+00:00"


def write_metrics(path, first_loss, steps):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lines:
        for step in range(1, steps + 1):
            row = {
                "step": step,
                "loss": first_loss / (1 + step / 20),
                "learning_rate": 3e-5 * min(1.0, step / 10) * (1 - step / (steps + 1)),
                "tokens_per_s_per_gpu": 1200.0,
            }
            lines.write(json.dumps(row) + "\n")


def funnel_row(stage, reason, documents, characters, tokens):
    numbers = {"documents": documents, "characters": characters, "tokens": tokens}
    return {"stage": stage, "reason": reason, **numbers}


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


@pytest.fixture
def finished(home, tmp_path):
    return finished_record(home, tmp_path)


def finished_record(home, folder):
    """The record of a run whose first stage missed the gate and whose second passed; ``folder`` for its sources."""
    record = records.open_record(home, RUN, "fast_cpt", load_recipe("cpt_config_fast"))
    records.add(
        record,
        "plan.json",
        {
            "tokens": 4_718_592_000,
            "hours": {"low": 75.5, "high": 140.0},
            "training_hours": {"low": 75.0, "high": 139.5},
            "rate_source": "this project's measurements on H100",
            "cost": {"low": 1208.0, "high": 2240.0},
            "memory_gb": {"weights": 35.3, "total": 151.2},
            "tokens_per_s": {"low": 9300.0, "high": 17300.0},
        },
    )
    records.add(
        record,
        "corpus_manifest.json",
        {
            "digest": "00aa11bb22cc33dd",
            "tokens": 376_000,
            "documents": 320,
            "max_seq_length": 3072,
            "padding_share": 0.0012,
            "bytes_per_token": 1.04,
            "shards": [{"file": f"cpt_train_shard_{n:02}.parquet"} for n in range(16)],
            "funnel": [
                funnel_row("read", "unreadable", 5, 0, 0),
                funnel_row("read", "", 400, 1_650_000, 402_000),
                funnel_row("duplicates", "older version", 80, 110_000, 26_000),
                funnel_row("kept", "train", 320, 1_540_000, 376_000),
            ],
        },
    )
    add_trainings(record, folder)
    add_evaluations(record)
    add_answers(record)
    records.add_output(record, "build", {"path": "/data/corpora/00aa11bb22cc33dd",
                                         "digest": "00aa11bb22cc33dd", "reused": True})  # fmt: skip
    records.add_output(record, "publish", {"path": "/data/models/fast", "digest": "beef"})
    records.add_cost(record, gpus=4, price_per_gpu_hour=4.0)
    add_plan_and_actual(record)
    records.close_record(record, "success")
    return record


def add_answers(record):
    records.add(
        record,
        "evaluation_sft.json",
        {
            "rouge_l": {"value": 0.612, "low": 0.587, "high": 0.640},
            "citation_accuracy": {"value": 0.41, "low": 0.30, "high": 0.52, "counted": 128},
            "examples": 64,
            "samples": [
                {
                    "id": "a",
                    "prompt": "Summarise <this>",
                    "base": "this this this",
                    "answer": "It | lays down",
                    "reference": "It",
                }
            ],
        },
    )


def add_trainings(record, folder):
    for training, loss, seconds in (
        ("train_cpt", 7.6, 5400.0),
        ("train_cpt_stage2", 3.1, 1800.0),
        ("train_sft", 2.2, 450.0),
    ):
        source = folder / training / "metrics.jsonl"
        write_metrics(source, loss, steps=60)
        records.add(record, f"{training}/metrics.jsonl", source)
        write_json(
            folder / training / "training.json",
            {
                "steps": 60,
                "tokens": 245_760,
                "seconds": seconds,
                "tokens_per_s_per_gpu": 1234.5,
                "loss": loss / 4,
                "peak_memory_gb": 61.2,
                "skipped_steps": 0,
            },
        )
        records.add(record, f"{training}/training.json", folder / training / "training.json")


def add_evaluations(record):
    for stage, perplexity in (("", 21.5), ("_stage2", 11.25)):
        figures = {
            "model": {"perplexity": perplexity, "bits_per_byte": 0.71, "tokens": 12_592},
            "base": {"perplexity": 2081.0, "bits_per_byte": 2.4, "tokens": 12_592},
        }
        newest = {"model": {"perplexity": perplexity + 4}, "base": {"perplexity": 2100.5}}
        evaluation = {"validation_set": "random", **figures, "random": figures, "newest": newest}
        records.add(record, f"evaluation{stage}.json", evaluation)
        gate = {
            "decision": "pass" if perplexity < 18 else "miss",
            "passed": perplexity < 18,
            "value": perplexity,
            "base_value": 2081.0,
            "threshold": 18.0,
            "validation_set": "random",
        }
        records.add(record, f"gate{stage}.json", gate)


def add_plan_and_actual(record):
    rows = [
        {
            "what": "tokens/s, all GPUs",
            "low": 9300.0,
            "high": 17300.0,
            "actual": 4938.0,
            "off": -0.469,
        },
        {"what": "cost (USD)", "low": 1208.0, "high": 2240.0, "actual": 1300.0, "off": 0.0},
        {"what": "memory per GPU (GB)", "low": 149.7, "high": 149.7, "actual": 61.2, "off": -0.591},
        {"what": "hours of evaluation", "low": None, "high": None, "actual": 0.25, "off": None},
        {"what": "hours of fine-tuning", "low": 0.5, "high": 0.5, "actual": None, "off": None},
    ]
    records.add(record, "plan_and_actual.json", {"rows": rows})
