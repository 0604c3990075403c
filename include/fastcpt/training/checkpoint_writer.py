"""Checkpoints that are written while the training goes on.

At a step's end each rank copies what its optimizer knows into memory of the host, and a thread writes the copy.
Every step's all-reduce tells whether all ranks have ended (``writing``); at the same step all of them then
complete the checkpoint, and rank 0 gives it its name. A training that is killed before leaves a folder without a name,
which the next one removes.

The copy takes the checkpoint's bytes of host memory (``step_memory.checkpoint_bytes_per_weight`` a trained weight, over all
ranks of a host). Where they are not free, a rank writes at once and the training waits.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import torch.distributed as dist

from fastcpt.files import flush, write_json
from fastcpt.training.checkpoints import checkpoints, file_of_rank, own_state, set_aside
from fastcpt.training.digests import Digest, digest_of_file, save_tensors, write_digests

SPARE = 0.1  # of the free memory of a host, left alone


class Written(NamedTuple):
    """A checkpoint that is complete."""

    step: int
    stopped: float  # seconds for which the training waited
    seconds: float  # until it was on the disk


class CheckpointWriter:
    """The checkpoints of one training, one being written at a time.

    ``begin`` and ``complete`` are called by every rank at the same step.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        """Checkpoints are ``folder/step_N``; the newest ``keep`` stay."""
        self.folder, self.keep = folder, keep
        self.thread: threading.Thread | None = None
        self.state: dict[str, Any] = {}
        self.began = self.stopped = self.ended = 0.0
        self.outcome: Digest | Exception | None = None

    @property
    def begun(self) -> bool:
        """Whether there is a checkpoint that ``complete`` has to name."""
        return self.thread is not None

    @property
    def writing(self) -> bool:
        """Whether this rank's file is still being written."""
        return self.thread is not None and self.thread.is_alive()

    def begin(self, engine: Any, state: dict[str, Any]) -> None:
        """Begin to write ``step_N`` (N is ``state["step"]``); the weights may change when this returns.

        A checkpoint of that step that is there already stays as it is.
        """
        assert not self.begun
        if (self.folder / f"step_{state['step']}").is_dir():
            return
        self.began, self.state, self.outcome = time.monotonic(), state, None
        if dist.get_rank() == 0:
            for left_over in self.folder.glob(".step_*.partial"):  # of a training that was killed
                shutil.rmtree(left_over)
            self._partial.mkdir(parents=True)
        dist.barrier()
        content = own_state(engine)
        copied = has_room(content)
        if copied:
            content = copy_of(content)
        # a daemon: a training that fails does not wait for a checkpoint that nobody will name
        self.thread = threading.Thread(target=self._write, args=(content,), daemon=True)
        self.thread.start()
        if not copied:
            self.thread.join()
        self.stopped = time.monotonic() - self.began

    def complete(self) -> Written:
        """Wait for this rank's file, then name the checkpoint and remove older ones.

        ``OSError`` on every rank where one of them could not write.
        """
        waited = time.monotonic()
        assert self.thread
        self.thread.join()
        self.thread = None
        written: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(written, self.outcome)
        failed = next((one for one in written if isinstance(one, Exception)), None)
        if failed:
            raise OSError(f"{self._target} could not be written: {failed}")
        if dist.get_rank() == 0:
            self._name({file_of_rank(rank): digest for rank, digest in enumerate(written)})
        dist.barrier()
        here = time.monotonic()
        return Written(self.state["step"], self.stopped + here - waited, self.ended - self.began)

    @property
    def _target(self) -> Path:
        return self.folder / f"step_{self.state['step']}"

    @property
    def _partial(self) -> Path:
        return self.folder / f".step_{self.state['step']}.partial"

    def _write(self, content: dict[str, Any]) -> None:
        try:
            self.outcome = save_tensors(content, self._partial / file_of_rank(dist.get_rank()))
        except Exception as error:  # told to every rank by ``complete``
            self.outcome = error
        self.ended = time.monotonic()

    def _name(self, digests: dict[str, Digest]) -> None:
        file = self._partial / "state.json"
        write_json(file, {**self.state, "ranks": dist.get_world_size()})
        write_digests(self._partial, {**digests, file.name: digest_of_file(file)})
        self._partial.rename(self._target)
        flush(self.folder)
        for old in checkpoints(self.folder)[: -self.keep]:
            shutil.rmtree(set_aside(old))


def tensors_of(content: Any) -> list[torch.Tensor]:
    """All tensors of nested dicts and lists."""
    if isinstance(content, torch.Tensor):
        return [content]
    if isinstance(content, dict):
        content = list(content.values())
    return (
        [one for item in content for one in tensors_of(item)] if isinstance(content, list) else []
    )


def has_room(content: Any) -> bool:
    """Whether every rank of this host can have a copy of its state in the host's free memory."""
    size = sum(one.numel() * one.element_size() for one in tensors_of(content))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return bool(size * ranks <= (1 - SPARE) * psutil.virtual_memory().available)


def copy_of(content: Any) -> Any:
    """``content`` with every tensor copied into memory of the host."""
    if isinstance(content, torch.Tensor):
        return content.to("cpu", copy=True)
    if isinstance(content, dict):
        return {key: copy_of(value) for key, value in content.items()}
    return [copy_of(item) for item in content] if isinstance(content, list) else content
