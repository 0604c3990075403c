"""What runs took, kept so that the next plan for the same is better than a formula.

One JSON line a training in ``home/plan_history.jsonl``: its key (model, method, precision,
sequence length, GPU), how it was run (GPUs, micro-batch, recomputation) and what was measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastcpt.files import whole_file
from fastcpt.planning.costs import Checkpointing
from fastcpt.planning.hardware import Hardware, hardware_of
from fastcpt.planning.shapes import Shape, shape_of
from fastcpt.recipe import Recipe

FILE = "plan_history.jsonl"


@dataclass(frozen=True)
class Measured:
    """One training. Rates in tokens/s a GPU (or a CPU rank), memory in 10^9 bytes, times in s."""

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
    checkpointing: Checkpointing | None
    tokens_per_s_per_gpu: float
    peak_memory_gb: float | None = None
    startup_seconds: float | None = None
    evaluation_seconds: float | None = None

    @property
    def key(self) -> tuple[str, str, str, int, str]:
        return (self.model, self.method, self.precision, self.sequence, self.gpu)


def shape_key(shape: Shape) -> str:
    """A name for a model's shape: what its speed depends on, not what it was trained on."""
    return (
        f"L{shape.num_hidden_layers}-h{shape.hidden_size}-f{shape.intermediate_size}"
        f"-q{shape.queries}-k{shape.keys}-V{shape.vocab_size}"
    )


def key_of(recipe: Recipe, shape: Shape, hardware: Hardware) -> tuple[str, str, str, int, str]:
    """The key under which a recipe's runs on this hardware are kept."""
    precision = "fp8" if recipe.training.use_fp8 else recipe.model.dtype
    return (
        shape_key(shape),
        "lora" if recipe.lora else "full",
        precision,
        recipe.corpus.max_seq_length,
        hardware.gpu.name if hardware.gpu else "CPU",
    )


def read_history(path: Path | None) -> list[Measured]:
    """All runs kept, the oldest first; none where there is no file yet."""
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
    """The newest run of the same key, one on as many GPUs before any other."""
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
    *,
    checkpointing: Checkpointing | None = None,
    startup_seconds: float | None = None,
    evaluation_seconds: float | None = None,
) -> Measured | None:
    """Keep what a training took; ``training`` is its ``training.json``.

    The same ``run`` recorded again takes the place of its first record. None where the model's
    shape is not known here or nothing was trained.
    """
    shape, hardware = shape_of(recipe), hardware_of(recipe.cluster, cluster)
    if shape is None or not training.get("tokens_per_s_per_gpu"):
        return None
    model, method, precision, sequence, gpu = key_of(recipe, shape, hardware)
    micro = recipe.training.per_device_train_batch_size
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
        accumulation=max(1, recipe.global_batch_size // (micro * hardware.count)),
        checkpointing=training.get("checkpointing") or checkpointing,
        tokens_per_s_per_gpu=float(training["tokens_per_s_per_gpu"]),
        peak_memory_gb=training.get("peak_memory_gb"),
        startup_seconds=startup_seconds,
        evaluation_seconds=evaluation_seconds,
    )
    path = home / FILE
    kept = [old for old in read_history(path) if old.run != run] + [measured]
    with whole_file(path) as aside:
        aside.write_text("".join(json.dumps(asdict(row)) + "\n" for row in kept), encoding="utf-8")
    return measured


Row = tuple[str, float, float, float | None, bool]


def compare(plan: Mapping[str, Any], training: Mapping[str, Any], gpus: int) -> list[Row]:
    """A plan beside what its training took: (what, planned low, planned high, actual, inside).

    ``plan`` is ``plan.json``, ``training`` the ``training.json`` of the run on ``gpus`` GPUs. Rows
    whose plan is unknown are left out; ``inside`` says whether the actual figure is in the range
    (memory: at most what was planned).
    """
    rows: list[Row] = []
    rate = training.get("tokens_per_s_per_gpu")
    actual = {
        "tokens_per_s": rate * gpus if rate else None,
        "hours": training["seconds"] / 3600 if "seconds" in training else None,
    }
    for what, value in actual.items():
        promised = plan.get(what)
        if promised:
            low, high = float(promised["low"]), float(promised["high"])
            rows.append((what, low, high, value, value is not None and low <= value <= high))
    memory = plan.get("memory_gb")
    if memory:
        peak = training.get("peak_memory_gb")
        total = float(memory["total"])
        rows.append(("memory_gb", 0.0, total, peak, peak is not None and peak <= total))
    return rows
