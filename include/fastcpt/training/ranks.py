"""The ranks of a training: process group, work done once per host, and SIGTERM."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from fastcpt.training.exits import TrainingError


def start_ranks() -> torch.device:
    """Join the launcher's process group; returns this rank's device."""
    import deepspeed  # slow to import, and not needed to evaluate or publish in one process
    from deepspeed.accelerator import get_accelerator

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce, which takes minutes and needs a compiler
        deepspeed.ops.__compatible_ops__.pop("deepspeed_shm_comm", None)
        deepspeed.init_distributed("gloo", verbose=False)
        return torch.device("cpu")
    accelerator.set_device(local_rank)
    # so that the step's large buffers can reuse the activations' memory
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    deepspeed.init_distributed(verbose=False)
    return torch.device(accelerator.device_name(local_rank))


def say_once(line: str) -> None:
    """Print a line on rank 0."""
    if rank() == 0:
        print(line, flush=True)


def once_a_host(work: Callable[[], Any]) -> Any:
    """Run ``work`` on the first rank of each host; every rank gets its host's result, which must be JSON.

    A ``ValueError`` is raised on all ranks as ``TrainingError``, so that all of them end.
    """
    answer: list[Any] = [None]
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        try:
            answer = [{"result": work()}]
        except ValueError as error:
            answer = [{"error": str(error)}]
    hosts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, [socket.gethostname(), answer[0]])
    for _, got in hosts:
        if got and "error" in got:
            raise TrainingError(got["error"])
    here = socket.gethostname()
    return next(got["result"] for host, got in hosts if got and host == here)


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


class StopSignal:
    """Set by SIGTERM; checked after every step."""

    def __init__(self) -> None:
        self.came = False
        signal.signal(signal.SIGTERM, self._set)

    def _set(self, *_: Any) -> None:
        self.came = True
