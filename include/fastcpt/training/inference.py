"""Models that answer but do not learn: whole on every GPU, or in parts over all of them.

A launcher's ranks share the work. A model that fits one GPU stands whole on each, and the ranks
speak to each other only at the end; one that does not is partitioned by ZeRO-3, whose ranks have
to make the same calls in the same order.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from fastcpt.files import digest_of, read_json
from fastcpt.training.model import ModelError, load_model

SILENCE = 20.0  # seconds without a line of progress
ROOM = 0.8  # of a GPU's memory that weights may take; the rest is for activations


class Ranks(NamedTuple):
    """The processes of this launch, and which of them this is."""

    rank: int
    size: int
    device: torch.device

    def say(self, line: str) -> None:
        if self.rank == 0:
            print(line, flush=True)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's ``values``; they are left alone."""
        total = values.to(self.device, copy=True)
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def gather(self, values: list[Any]) -> list[Any]:
        """Every rank's items in one list, in the order of the ranks."""
        if self.size == 1:
            return values
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, values)
        return [item for part in parts for item in part]

    def leave(self) -> None:
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()


def join_ranks() -> Ranks:
    """This process's place among those of the launcher (deepspeed, torchrun); alone without one."""
    size, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Ranks(int(os.environ.get("RANK", "0")), size, device)


@contextmanager
def still_at(what: str, ranks: Ranks) -> Iterator[None]:
    """Say now and then that ``what`` is going on, for steps that cannot say so themselves."""
    ended, begin = threading.Event(), time.monotonic()

    def speak() -> None:
        while not ended.wait(SILENCE):
            ranks.say(f"{what}, {time.monotonic() - begin:.0f} s so far")

    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    try:
        yield
    finally:
        ended.set()
        speaker.join()


def place_model(
    path: str,
    ranks: Ranks,
    *,
    attention: str = "auto",
    dtype: str = "bfloat16",
    sharded: bool | None = None,
    wrap: Callable[[Any], torch.nn.Module] | None = None,
) -> tuple[Any, bool]:
    """The model of ``path`` (as ``load_model`` takes it) on this rank's device, and whether in parts.

    ``sharded`` None shards only where the weights do not fit one GPU. ``wrap`` puts a module
    around it first, which is then what is returned. Raises ``ModelError`` where there is no such
    model, or it fits neither one GPU nor all of the ranks'.
    """
    if sharded is None:
        sharded = not _fits(path, dtype, ranks)
    with still_at(f"loading {path}", ranks):
        if sharded:
            return _partitioned(path, attention, dtype, wrap), True
        with ranks.device:  # from_pretrained reads the weights straight to this device
            model, _ = load_model(path, attention, dtype)
        module = wrap(model) if wrap else model
        return module.to(ranks.device).eval(), False


def _fits(path: str, dtype: str, ranks: Ranks) -> bool:
    if ranks.device.type != "cuda":
        return True
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(base_of(path))
    except (ValueError, OSError) as error:
        raise ModelError(f"model '{base_of(path)}' cannot be loaded: {error}") from error
    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(config)
    needed = sum(p.numel() for p in shape.parameters()) * getattr(torch, dtype).itemsize
    memory = ROOM * torch.cuda.get_device_properties(ranks.device).total_memory
    if needed > memory * ranks.size:
        raise ModelError(
            f"{path} has {needed / 1e9:.0f} GB of weights; {ranks.size} GPUs of "
            f"{memory / ROOM / 1e9:.0f} GB cannot hold them. Launch this script with "
            "`deepspeed --num_gpus N`, on enough GPUs"
        )
    return bool(needed <= memory)


def _partitioned(
    path: str, attention: str, dtype: str, wrap: Callable[[Any], torch.nn.Module] | None
) -> Any:
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": {"stage": 3},
        "steps_per_print": 10**9,
    }
    deepspeed.init_distributed(verbose=False)
    partitioned = HfDeepSpeedConfig(config)  # while it lives, each rank keeps only its part
    model, _ = load_model(path, attention, dtype)
    module = wrap(model) if wrap else model
    engine, *_ = deepspeed.initialize(model=module, config=config)
    del partitioned
    return engine.module.eval()


def base_of(path: str) -> str:
    """The model whose weights ``path`` has: another's, for adapters, else its own."""
    reference = Path(path) / "base.json"
    return str(read_json(reference)["base"]) if reference.is_file() else path


def final_of(path: str) -> str:
    """``path`` itself, or the ``final`` model in it where it is the output of a training."""
    final = Path(path) / "final"
    if final.is_dir():
        return str(final)
    if (Path(path) / "state.json").is_file():
        raise ModelError(
            f"{path} is a checkpoint to resume a training from, with the weights in parts; give "
            "the training's output folder, or its final/"
        )
    return path


def identity_of(path: str) -> str:
    """A digest that changes when the files of a model folder do; of the name for a hub model.

    By names, sizes and times: to read the weights of a large model takes minutes.
    """
    files = sorted(file for file in Path(path).glob("*") if file.is_file())
    facts = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    base = base_of(path)
    return digest_of(path if not files else facts, identity_of(base) if base != path else None)
