"""A training from its beginning to its final model: continued pre-training and fine-tuning alike.

They differ in their rows alone. Before the first step the GPUs are checked against each other, and one step is
run at the real shape without an update, to see that the memory suffices (``preflight``).
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

    Called by every rank. ``rows`` is called when the process group exists; where it answers with the
    rows of several areas, each gets an adapter of its own, one after another. A training that was
    stopped goes on from its newest checkpoint; a complete one is returned at once. A time budget
    leaves enough to evaluate ``evaluated_tokens``. Raises ``ValueError`` kinds for what a retry
    cannot heal, ``Stopped`` after SIGTERM and a checkpoint.
    """
    # one long function: the order of a training, from its checks to its final model
    done = output / "training.json"
    if done.is_file():
        result: dict[str, Any] = read_json(done)
        return result
    stop = StopSignal()
    use_fp8 = use_fp8 or training.use_fp8
    check_model(recipe, model, use_fp8)
    # deepspeed's calls of older torch names; bars that would break the progress lines
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.disable_progress_bar()
    device = start_ranks()
    check_gpus(device)
    check_shared(output)
    world = dist.get_world_size()
    accumulation = accumulation_steps(recipe, training, world)
    data = rows()
    phases = phases_of(training, data)
    several = isinstance(data, dict)  # adapters of areas, which begin anew
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
    known = os.environ.get(PRICE)  # the plan's, by the kind of GPU
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

    An adapter begins with the area's own in ``before``, or with the ``fresh`` weights.
    """
    engine = loop.engine
    adapters = {phase.area: output / "areas" / phase.area for phase in loop.phases}

    def begin(area: str) -> None:
        own = before / "areas" / area
        known = checkpoints.adapter_weights(engine, own) if own.is_dir() else fresh
        checkpoints.begin_again(engine, known)

    loop.run(begin, lambda area: save_final(engine, adapters[area], tokenizer, base))
    checkpoints.save_mean(adapters, lora.areas, output / "final")
