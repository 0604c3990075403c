"""Ranks and models without an optimizer, for evaluation, generation and publishing.

A script runs as one process, or as several started by DeepSpeed's launcher. A model that fits one GPU is
loaded whole on each; a larger one is partitioned over all of them by ZeRO-3, where all ranks have to make
the same calls in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers.utils import logging

from fastcpt.files import digest_of, sha256_of_file
from fastcpt.training.model import ModelError, base_of, load_config, load_model
from fastcpt.training.ranks import start_ranks, world_size

ROOM = 0.8  # the share of a GPU's memory for weights; the rest is for activations
SMALL = 10**6  # bytes; larger files of a model are identified by size and time alone


@contextmanager
def ranks() -> Iterator[torch.device]:
    """Set up this process's device and, under a launcher, the process group."""
    logging.disable_progress_bar()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield device
        dist.barrier()
    finally:
        dist.destroy_process_group()


def model_for_inference(
    path: str | Path,
    attention: str,
    dtype: str,
    device: torch.device,
    *,
    wrap: Callable[[Any], torch.nn.Module] | None = None,
    in_parts: bool | None = None,
) -> tuple[Any, bool]:
    """The model of ``load_model`` on ``device`` in eval mode, and whether it is partitioned.

    ``wrap`` puts a module around it, which is then returned. ``in_parts`` None partitions only a model
    that does not fit one GPU. Raises ``ModelError`` if there is no such model, or if the GPUs of all ranks
    cannot hold it.
    """
    if in_parts is None:
        in_parts = not _fits(str(path), dtype, device)
    if in_parts:
        return _partitioned(path, attention, dtype, wrap), True
    with device:  # load the weights directly onto the device
        model, _ = load_model(path, attention, dtype)
    module = wrap(model) if wrap else model
    return module.to(device).eval(), False


def _fits(path: str, dtype: str, device: torch.device) -> bool:
    if device.type == "cpu":
        return True
    from transformers import AutoModelForCausalLM

    config = load_config(base_of(path))
    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(config)
    needed = sum(parameter.numel() for parameter in shape.parameters())
    needed *= getattr(torch, dtype).itemsize
    room = ROOM * torch.cuda.get_device_properties(device).total_memory
    if needed > room * world_size():
        raise ModelError(
            f"{path} has {needed / 1e9:,.0f} GB of weights, which {world_size()} GPU(s) of "
            f"{room / ROOM / 1e9:,.0f} GB cannot hold; launch with `deepspeed --num_gpus N`, on "
            "enough of them"
        )
    return bool(needed <= room)


def _partitioned(
    path: str | Path, attention: str, dtype: str, wrap: Callable[[Any], torch.nn.Module] | None
) -> Any:
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": {"stage": 3},
        "steps_per_print": 10**9,
    }
    start_ranks()  # uses the existing process group
    partitioned = HfDeepSpeedConfig(config)  # from_pretrained loads only this rank's partition
    model, _ = load_model(path, attention, dtype)
    engine, *_ = deepspeed.initialize(model=wrap(model) if wrap else model, config=config)
    del partitioned
    return engine.module.eval()


def final_of(path: str | Path) -> str:
    """The ``final`` folder in ``path`` if that is the output folder of a training, else ``path``."""
    if (Path(path) / "final").is_dir():
        return str(Path(path) / "final")
    if (Path(path) / "state.json").is_file():
        raise ModelError(
            f"{path} is for resuming its training: its weights are in parts. Give the output "
            "folder of a training that has ended, or its final/"
        )
    return str(path)


def model_identity(model: str | Path) -> Any:
    """A JSON value that changes when the model does.

    A hub name is its own identity. In a folder small files count by their content, weights (too large to
    read each time) by size and modification time; an adapter's base counts too.
    """
    folder = Path(model)
    if not folder.is_dir():
        return str(model)
    files: dict[str, Any] = {}
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        facts = file.stat()
        files[file.name] = (
            sha256_of_file(file)
            if facts.st_size <= SMALL and file.suffix != ".safetensors"
            else [facts.st_size, facts.st_mtime_ns]
        )
    base = base_of(model)
    return digest_of(files, model_identity(base) if base != str(model) else None)
