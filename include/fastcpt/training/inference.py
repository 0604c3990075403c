"""What evaluation, generation and publishing share: ranks, models without an optimizer, progress.

A script runs as one process, or as several started by DeepSpeed's launcher, each with a whole
copy of the model on its own GPU.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers.utils import logging

from fastcpt.files import digest_of, read_json, sha256_of_file
from fastcpt.training.model import load_model

SILENCE = 20.0  # seconds without a progress line
SMALL = 10**6  # bytes; larger files of a model are known by size and time alone


@contextmanager
def ranks() -> Iterator[torch.device]:
    """This process's device; inside, the ranks of a launcher (if any) can talk to each other."""
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


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def model_for_inference(path: str | Path, attention: str, dtype: str, device: torch.device) -> Any:
    """The model of ``load_model`` on ``device``, without dropout."""
    model, _ = load_model(path, attention, dtype)
    return model.to(device).eval()


def identity(model: str | Path) -> Any:
    """What tells whether a model is still the same one; JSON.

    A hub name stands for itself. In a folder small files count by their bytes, weights (too large
    to read again each time) by size and time of change; the base of an adapter counts too.
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
    reference = folder / "base.json"
    base = identity(read_json(reference)["base"]) if reference.is_file() else None
    return digest_of(files, base)


class Progress:
    """Prints a line when ``SILENCE`` seconds have passed since the last one; on rank 0 alone."""

    def __init__(self) -> None:
        self.said = time.monotonic()

    def say(self, line: str, now: bool = False) -> None:
        if rank() == 0 and (now or time.monotonic() - self.said > SILENCE):
            print(line, flush=True)
            self.said = time.monotonic()
