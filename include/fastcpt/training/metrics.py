"""A training's metrics: metrics.jsonl, TensorBoard, operations, memory."""

from __future__ import annotations

import json
import math
import os
import resource
from pathlib import Path
from typing import Any

import torch

from fastcpt.families import head_width
from fastcpt.gpus import HardwareError, find_gpu
from fastcpt.shapes import shape_from_config
from fastcpt.training.data import Ints
from fastcpt.training.model import Trainee


class MetricsLog:
    """metrics.jsonl and TensorBoard. A resumed training repeats some steps; they are not written again."""

    def __init__(self, output: Path, step: int) -> None:
        self.file = output / "metrics.jsonl"
        self.last = 0
        output.mkdir(parents=True, exist_ok=True)
        if self.file.is_file():
            content = self.file.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):  # killed while writing a line
                os.truncate(self.file, len(whole))
            if whole:
                self.last = json.loads(whole.splitlines()[-1])["step"]
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            if name not in ("step", "area"):
                self.board.add_scalar(name, value, step)
        self.board.flush()
        if step <= self.last:
            return
        # JSON has no NaN
        finite = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in metrics.items()
        }
        with self.file.open("a") as out:
            out.write(json.dumps(finite) + "\n")


class Work:
    """FLOP of the model itself, without recomputation, for the MFU (share of the GPU's peak).

    Per token 6 for each weight of a matrix product (4 if frozen: no weight gradient), and per document
    6 x layers x heads x width x length squared for the causal half of attention.
    """

    def __init__(self, trainee: Trainee, device: torch.device) -> None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak = _peak(name)
        config = trainee.causal.config
        shape = shape_from_config(config.to_dict(), "the model")
        trained = sum(
            getattr(parameter, "ds_numel", parameter.numel())
            for words, parameter in trainee.named_parameters()
            if "lora_" in words
        )
        # frozen weights in one byte are no parameters: counted by the model's dimensions
        self.per_token = (4 if trained else 6) * shape.matrix_parameters + 6.0 * trained
        width = config.num_attention_heads * head_width(config)
        self.attention = 6 * config.num_hidden_layers * width
        self.flop = 0.0

    def add(self, lengths: list[Ints]) -> None:
        """Count rows; ``lengths``: those of each row's segments."""
        for of_row in lengths:
            wide = of_row.astype(float)
            self.flop += self.per_token * wide.sum() + self.attention * (wide**2).sum()


def _peak(name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by name; None on CPUs and for a GPU that is not in ``gpus.yaml``."""
    try:
        return find_gpu(name).peak(fp8=False)
    except HardwareError:
        return None


def peak_memory_gb(device: torch.device) -> float:
    """This rank's peak memory (10^9 bytes): of the GPU, or of the process on a CPU."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return float(torch.cuda.max_memory_allocated(device)) / 1e9


def hours_minutes_seconds(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
