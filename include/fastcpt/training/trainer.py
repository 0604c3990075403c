"""Runs a training up to its final model: continued pre-training or fine-tuning.

They differ only in their rows. Before the first step the GPUs are compared with each other, and one step
without an update is run at the real shape to check that memory suffices (``preflight``).
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers.utils import logging

from fastcpt.files import read_json, write_json
from fastcpt.recipe import Recipe
from fastcpt.recipe_sections import Lora, Training
from fastcpt.training import checkpoints
from fastcpt.training.checkpoints import save_final
from fastcpt.training.commands import DEADLINE, PRICE
from fastcpt.training.data import Rows
from fastcpt.training.engine import build_engine
from fastcpt.training.loop import Loop
from fastcpt.training.model import base_of
from fastcpt.training.preflight import (
    check_disk,
    check_gpus,
    check_model,
    check_shared,
    try_one_step,
)
from fastcpt.training.ranks import StopSignal, start_ranks
from fastcpt.training.schedule import accumulation_steps, phases_of


def train(
    recipe: Recipe,
    training: Training,
    rows: Callable[[], Rows | dict[str, Rows]],
    *,
    model: str,
    tokenizer: Path,
    output: Path,
    deepspeed_file: Path,
    use_fp8: bool = False,
    evaluated_tokens: int = 0,
) -> dict[str, Any]:
    """Train ``model`` on ``rows`` and write everything under ``output``; the content of training.json.

    Called by every rank. ``rows`` is called once the process group exists. If it returns rows of several
    areas, each area gets its own adapter, one after another. A stopped training resumes from its newest
    checkpoint; a complete one returns at once. A time budget leaves enough to evaluate
    ``evaluated_tokens``. Raises kinds of ``ValueError`` for what a retry cannot heal, and ``Stopped``
    after SIGTERM and a checkpoint.
    """
    # one long function, in the order of a training from its checks to its final model
    done = output / "training.json"
    if done.is_file():
        result: dict[str, Any] = read_json(done)
        return result
    stop = StopSignal()
    use_fp8 = use_fp8 or training.use_fp8
    check_model(recipe, model, use_fp8)
    # DeepSpeed uses deprecated torch names, and progress bars would break the progress lines
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.disable_progress_bar()
    device = start_ranks()
    check_gpus(device)
    check_shared(output)
    world = dist.get_world_size()
    accumulation = accumulation_steps(recipe, training, world)
    data = rows()
    phases = phases_of(training, data)
    several = isinstance(data, dict)  # one adapter per area, each starting from the base model
    engine, chosen = build_engine(
        recipe,
        training,
        base_of(model) if several else model,
        deepspeed_file,
        accumulation,
        use_fp8,
        device,
    )
    fresh = checkpoints.trained_weights(engine) if several else {}
    if dist.get_rank() == 0:
        check_disk(engine.module, training, output)
    known = os.environ.get(PRICE)  # the plan's price for this kind of GPU
    price = float(known) if known else recipe.budget.price_per_gpu_hour
    deadline = os.environ.get(DEADLINE)
    ends = float(deadline) if deadline else None
    loop = Loop(training, phases, engine, output, accumulation, device, stop, price, ends)
    micro = training.per_device_train_batch_size
    try_one_step(engine, loop.phase.rows, micro, accumulation, device)
    loop.start_clock(evaluated_tokens)
    base = chosen["base"]
    if several:
        assert recipe.lora
        _train_areas(recipe.lora, loop, fresh, Path(model), output, tokenizer, base)
    else:
        loop.run()
        save_final(engine, output / "final", tokenizer, base, Path(model))
    result = {**loop.result(), **chosen}
    if dist.get_rank() == 0:
        shutil.rmtree(output / "rows", ignore_errors=True)
        write_json(done, result)
        print(f"done: {json.dumps(result)}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    return result


def _train_areas(
    lora: Lora,
    loop: Loop,
    fresh: dict[str, torch.Tensor],
    before: Path,
    output: Path,
    tokenizer: Path,
    base: str,
) -> None:
    """Train the adapter of each area, and write their mean as the final model.

    An adapter starts from the area's adapter in ``before``, or from the ``fresh`` weights.
    """
    engine = loop.engine
    adapters = {phase.area: output / "areas" / phase.area for phase in loop.phases}

    def begin(area: str) -> None:
        own = before / "areas" / area
        known = checkpoints.adapter_weights(engine, own) if own.is_dir() else fresh
        checkpoints.begin_again(engine, known)

    loop.run(begin, lambda area: save_final(engine, adapters[area], tokenizer, base))
    checkpoints.save_mean(adapters, lora.areas, output / "final")
