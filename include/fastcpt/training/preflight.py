"""Checks before the first step: the model, the GPUs, the output folder, its disk, one step's memory."""

from __future__ import annotations

import shutil
import socket
import time
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from fastcpt.families import read_config, refusal
from fastcpt.recipe import Recipe
from fastcpt.recipe_sections import Training
from fastcpt.step_memory import training_disk_bytes
from fastcpt.training.data import Rows, make_batch
from fastcpt.training.engine import begin_step, parameters
from fastcpt.training.exits import TrainingError
from fastcpt.training.metrics import peak_memory_gb
from fastcpt.training.model import (
    base_of,
    choose_attention,
    load_config,
    require_fp8,
)

SLOW = 0.75  # of the fastest GPU's rate: a GPU below it is throttled or broken


def check_model(recipe: Recipe, path: str, use_fp8: bool) -> None:
    """Raise a kind of ``ValueError`` if this host cannot train the model as the recipe says.

    Called before the process group is created and before weights are loaded.
    """
    base = base_of(path)
    config = read_config(load_config(base).to_dict(), base)
    attention = choose_attention(recipe.model.attn_implementation)
    why = refusal(config, recipe, use_fp8, attention)
    if why is not None:
        raise TrainingError(f"--model {base}: {why}")
    if use_fp8:
        require_fp8()


class TriedGpu(NamedTuple):
    """One rank's GPU: ``flops`` of a product of bf16 matrices, and whether the result was right."""

    host: str
    name: str
    memory: int  # bytes
    right: bool
    flops: float


def check_gpus(device: torch.device) -> None:
    """Multiply matrices on every rank; ``TrainingError`` if one is wrong or slow, or if the GPUs differ."""
    if device.type == "cpu":
        name, memory, side = "CPU", 0, 256
    else:
        facts = torch.cuda.get_device_properties(device)
        name, memory, side = facts.name, facts.total_memory, 8192
    drawn = torch.Generator(device).manual_seed(0)
    left, right = torch.randn(2, side, side, generator=drawn, device=device)
    narrow = left.bfloat16(), right.bfloat16()
    times = []
    for _ in range(5):
        product = narrow[0] @ narrow[1]
        product[0, 0].item()  # synchronizes
        begin = time.monotonic()
        for _ in range(4):
            torch.mm(*narrow, out=product)
        product[0, 0].item()
        times.append(time.monotonic() - begin)
    wide = narrow[0].float() @ narrow[1].float()
    off = float((product.float() - wide).norm() / wide.norm())  # bf16 rounds to 8 bits
    own = TriedGpu(socket.gethostname(), name, memory, off < 0.01, 4 * 2 * side**3 / min(times))
    del left, right, narrow, product, wide
    gpus: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gpus, own)
    wrong = what_is_wrong(gpus)
    if wrong:
        raise TrainingError(wrong)


def what_is_wrong(gpus: list[TriedGpu]) -> str | None:
    """Why these GPUs (one per rank) cannot train together; None if they can."""
    for rank, gpu in enumerate(gpus):
        if not gpu.right:
            return f"rank {rank}, {gpu.name} on {gpu.host}, computes wrong: take it out of service"
    if len({(gpu.name, gpu.memory) for gpu in gpus}) > 1:
        seen = ", ".join(f"{gpu.name} of {gpu.memory / 1e9:.0f} GB on {gpu.host}" for gpu in gpus)
        return f"the GPUs are not the same: {seen}; leave the odd one out"
    fastest = max(gpu.flops for gpu in gpus)
    for rank, gpu in enumerate(gpus):
        if gpu.memory and gpu.flops < SLOW * fastest:  # not on CPUs, whose cores are shared
            return (
                f"rank {rank}, {gpu.name} on {gpu.host}, reaches {gpu.flops / 1e12:.0f} TFLOP/s, "
                f"the fastest {fastest / 1e12:.0f}: it is too hot, broken or in use; leave it out"
            )
    return None


def check_shared(output: Path) -> None:
    """``TrainingError`` unless all ranks see what rank 0 writes: a checkpoint is one shared folder."""
    name: list[Any] = [f".seen_by_all_{uuid.uuid4().hex}"]
    dist.broadcast_object_list(name)
    marker = output / name[0]
    if dist.get_rank() == 0:
        output.mkdir(parents=True, exist_ok=True)
        marker.touch()
    dist.barrier()
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, (marker.exists(), socket.gethostname()))
    if dist.get_rank() == 0:
        marker.unlink()
    blind = sorted({host for sees, host in seen if not sees})
    if blind:
        raise TrainingError(
            f"{output} is not the same folder on {', '.join(blind)}: put cluster.root on a file "
            "system that all hosts share"
        )


def check_disk(trainee: torch.nn.Module, training: Training, output: Path) -> None:
    """``TrainingError`` unless checkpoints (at most 12 bytes per trained weight) and the model fit the disk."""
    trained = parameters(trainee, trained=True)
    needed = training_disk_bytes(trained, training.save_total_limit, training.optimizer_states)
    output.mkdir(parents=True, exist_ok=True)
    there = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    free = shutil.disk_usage(output).free
    if free + there < needed:
        raise TrainingError(
            f"{output}: {free / 1e9:.1f} GB are free, {training.save_total_limit} checkpoints, the "
            f"next one and the model need {needed / 1e9:.1f} GB; make room, or lower "
            "save_total_limit"
        )


def try_one_step(
    engine: Any, rows: Rows, micro: int, accumulation: int, device: torch.device
) -> None:
    """Run a step's last micro-batches at the real shape, and the optimizer without its update.

    ``TrainingError`` if there is not enough memory.
    """
    batch = make_batch([rows[n % len(rows)] for n in range(micro)], rows.size)
    engine.optimizer.optimizer.allowed = lambda: False
    # two micro-batches: the second needs memory for its activations and the first one's gradients
    engine.micro_steps = max(0, accumulation - 2)
    try:
        begin_step(engine)
        while engine.micro_steps < accumulation:
            engine.backward(engine(batch, device))
            engine.step()
    except torch.OutOfMemoryError as error:
        total = torch.cuda.get_device_properties(device).total_memory
        raise TrainingError(
            f"a step of {micro} x {rows.size} tokens does not fit the GPU's {total / 1e9:.0f} GB: "
            "lower per_device_train_batch_size (raise gradient_accumulation_steps with it), "
            "set gradient_checkpointing to true, optimizer_states to bfloat16 or int8, or use more GPUs"
        ) from error
    engine.micro_steps = 0
    if dist.get_rank() == 0:
        print(f"a step fits: {peak_memory_gb(device):.1f} GB", flush=True)
