"""Measurements of earlier runs, which the next plan of the same kind uses instead of a formula.

``home/plan_history.jsonl`` has one JSON line per training: its key (model, method, precision, sequence
length, GPU), how it was run (GPUs, micro-batch, recomputation) and what was measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastcpt.files import whole_file
from fastcpt.planning.hardware import Hardware, hardware_of
from fastcpt.planning.models import shape_of
from fastcpt.planning.ranges import Range
from fastcpt.recipe import Recipe
from fastcpt.recipe_sections import Cluster
from fastcpt.shapes import Shape

FILE = "plan_history.jsonl"
TRANSFERS = "transfers.jsonl"  # beside it: transfer times of checkpoints
KEPT_TRANSFERS = 50
OF_TRANSFERS = 5  # the newest transfers of a line, which make the range
WORTH_MEASURING = 10_000_000  # bytes; a smaller transfer is mostly latency


@dataclass(frozen=True)
class Measured:
    """One training. Rates in tokens/s per GPU (or CPU rank), memory in 10^9 bytes, times in s."""

    run: str
    time: str
    model: str
    method: str
    precision: str
    sequence: int
    gpu: str
    gpus: int
    micro_batch: int
    accumulation: int
    checkpointing: str | None
    tokens_per_s_per_gpu: float
    peak_memory_gb: float | None = None
    startup_seconds: float | None = None
    evaluation_seconds: float | None = None
    optimizer_states: str = "float32"

    @property
    def key(self) -> tuple[str, str, str, int, str]:
        return (self.model, self.method, self.precision, self.sequence, self.gpu)


def shape_key(shape: Shape) -> str:
    """A name for a model's shape, on which its speed depends."""
    family = "" if shape.model_type == "llama" else f"{shape.model_type}-"
    return (
        f"{family}L{shape.num_hidden_layers}-h{shape.hidden_size}-f{shape.intermediate_size}"
        f"-q{shape.queries}-k{shape.keys}-V{shape.vocab_size}"
    )


def key_of(recipe: Recipe, shape: Shape, hardware: Hardware) -> tuple[str, str, str, int, str]:
    """The key of a recipe's runs on this hardware."""
    precision = "fp8" if recipe.training.use_fp8 else recipe.model.dtype
    return (
        shape_key(shape),
        "lora" if recipe.lora else "full",
        precision,
        recipe.corpus.max_seq_length,
        hardware.gpu.name if hardware.gpu else "CPU",
    )


def read_history(path: Path | None) -> list[Measured]:
    """All recorded runs, oldest first; empty if there is no file yet."""
    if path is None or not path.is_file():
        return []
    known = {field.name for field in fields(Measured)}
    runs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            content = json.loads(line)
            runs.append(Measured(**{key: content[key] for key in known & content.keys()}))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}:{number}: not a measured run ({error}); delete the line"
            ) from error
    return runs


def last_run(
    history: Path | None, recipe: Recipe, shape: Shape, hardware: Hardware
) -> Measured | None:
    """The newest run of the same key, preferably on the same number of GPUs."""
    key = key_of(recipe, shape, hardware)
    same = [run for run in read_history(history) if run.key == key]
    alike = [run for run in same if run.gpus == hardware.count]
    newest = alike or same
    return newest[-1] if newest else None


def record_run(
    home: Path,
    run: str,
    recipe: Recipe,
    cluster: Mapping[str, Any] | str | None,
    training: Mapping[str, Any],
    evaluation_seconds: float | None = None,
) -> Measured | None:
    """Record a training's measurements; ``training`` is its ``training.json``.

    Recording the same ``run`` again replaces its record. None if the model's shape is unknown here or
    nothing was trained.
    """
    shape, hardware = shape_of(recipe), hardware_of(recipe.cluster, cluster)
    if shape is None or not training.get("tokens_per_s_per_gpu"):
        return None
    model, method, precision, sequence, gpu = key_of(recipe, shape, hardware)
    micro = training.get("micro_batch") or recipe.training.per_device_train_batch_size
    accumulation = recipe.global_batch_size // (micro * hardware.count)
    measured = Measured(
        run=run,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        model=model,
        method=method,
        precision=precision,
        sequence=sequence,
        gpu=gpu,
        gpus=hardware.count,
        micro_batch=micro,
        accumulation=training.get("accumulation") or max(1, accumulation),
        checkpointing=_recomputation(training, shape),
        optimizer_states=training.get("optimizer_states", "float32"),
        tokens_per_s_per_gpu=float(training["tokens_per_s_per_gpu"]),
        peak_memory_gb=training.get("peak_memory_gb"),
        startup_seconds=training.get("startup_seconds"),
        evaluation_seconds=evaluation_seconds,
    )
    path = home / FILE
    kept = [old for old in read_history(path) if old.run != run] + [measured]
    with whole_file(path) as aside:
        aside.write_text("".join(json.dumps(asdict(row)) + "\n" for row in kept), encoding="utf-8")
    return measured


def _recomputation(training: Mapping[str, Any], shape: Shape) -> str | None:
    """What the trainer recomputed, in the format of ``costs.Job.recomputation``."""
    level, layers = training.get("checkpointing"), training.get("layers_recomputed", 0)
    if level is None or not 0 < layers < shape.num_hidden_layers:
        return level
    return f"{level} of {layers}/{shape.num_hidden_layers} layers"


def line_of(cluster: Cluster) -> str:
    """The name of the network line to a host: its connection, or "rented" for all rented machines."""
    return "rented" if cluster.rent else cluster.connection


def record_transfer(home: Path, line: str, size: int, seconds: float) -> None:
    """Record how long ``size`` bytes took from a host to here."""
    if size < WORTH_MEASURING or seconds <= 0:
        return
    path = home / TRANSFERS
    row = {"line": line, "bytes": size, "seconds": seconds}
    kept = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    with whole_file(path) as aside:
        lines = [*kept, json.dumps(row)][-KEPT_TRANSFERS:]
        aside.write_text("\n".join(lines) + "\n", encoding="utf-8")


def measured_bytes_s(history: Path | None, line: str) -> Range | None:
    """Bytes/s from a host to here: slowest and fastest of the last five transfers; None without any.

    ``history`` is the file of ``record_run``; the transfers' file is beside it.
    """
    path = history.parent / TRANSFERS if history else None
    if path is None or not path.is_file():
        return None
    rates = []
    for text in path.read_text(encoding="utf-8").splitlines():
        # skip a damaged line
        with suppress(ValueError, TypeError, KeyError, ZeroDivisionError):
            row = json.loads(text)
            if row["line"] == line:
                rates.append(float(row["bytes"]) / float(row["seconds"]))
    newest = rates[-OF_TRANSFERS:]
    return Range(min(newest), max(newest)) if newest else None


# What is compared: the key in plan and measurements, and its description.
COMPARED = (
    ("hours", "hours on the GPUs, without stage 2"),
    ("training_hours", "hours of training steps"),
    ("start-up", "hours of start-up and saving"),
    ("evaluation", "hours of evaluation"),
    ("fine-tuning", "hours of fine-tuning"),
    ("its evaluation", "hours of its evaluation"),
    ("tokens_per_s", "tokens/s, all GPUs"),
    ("memory_gb", "memory per GPU (GB, torch's)"),
    ("cost", "cost (USD)"),
)


def compare_with_plan(
    plan: Mapping[str, Any], took: Mapping[str, float | None]
) -> list[dict[str, Any]]:
    """Compare a plan with the run's measurements; one row per figure that either of them has.

    ``plan`` is ``plan.json``; ``took`` has measured figures under the keys of ``COMPARED``. A row has
    ``what``, planned ``low`` and ``high`` (None: unknown), ``actual`` (None: not reached), and ``off``: how
    far the actual figure is outside the range, as a share of the nearer end.
    """
    parts = plan.get("hours_parts") or {}
    memory = plan.get("memory_gb")
    promised: dict[str, Any] = {
        **{name: plan.get(name) for name in ("hours", "training_hours", "tokens_per_s", "cost")},
        **parts,
        "memory_gb": memory and memory["total"] - memory["runtime"],
    }
    if "checkpoints" in parts:  # a job's seconds outside its steps include both
        promised["start-up"] = parts["start-up"] + parts["checkpoints"]
    rows = []
    for key, words in COMPARED:
        value, actual = promised.get(key), took.get(key)
        if value is None and actual is None:
            continue
        ends = (value["low"], value["high"]) if isinstance(value, Mapping) else (value, value)
        rows.append(
            {
                "what": words,
                "low": ends[0],
                "high": ends[1],
                "actual": actual,
                "off": _outside(actual, *ends),
            }
        )
    return rows


def _outside(actual: float | None, low: float | None, high: float | None) -> float | None:
    if actual is None or not low or not high:
        return None
    return actual / min(max(actual, low), high) - 1
