"""Checkpoints that are complete or absent, and the final model.

DeepSpeed writes one file a rank into ``.step_N.partial``; when all have, the folder gets the
trainer's own state and its name. On hosts that share no file system a checkpoint cannot be
renamed for all at once: the output folder has to be shared.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fastcpt.files import read_json, write_json
from fastcpt.training.layers import plain_weights
from fastcpt.training.model import Trainee

TAG = "deepspeed"


class CheckpointError(ValueError):
    """A checkpoint does not fit this training."""


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a training, oldest first."""
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def save_checkpoint(engine: Any, folder: Path, state: dict[str, Any], keep: int) -> None:
    """Save ``folder/step_N`` (N is ``state["step"]``) and keep the newest ``keep``."""
    step = state["step"]
    target, partial = folder / f"step_{step}", folder / f".step_{step}.partial"
    if target.is_dir():
        return
    if dist.get_rank() == 0:
        for left_over in folder.glob(".step_*.partial"):  # of a training that was killed
            shutil.rmtree(left_over)
        partial.mkdir(parents=True)
    dist.barrier()
    # adapters: the base model is not saved again and again
    engine.save_checkpoint(
        str(partial), tag=TAG, save_latest=False, exclude_frozen_parameters=_has_frozen(engine)
    )
    dist.barrier()
    if dist.get_rank() == 0:
        write_json(partial / "state.json", {**state, "ranks": dist.get_world_size()})
        partial.rename(target)
        for old in checkpoints(folder)[:-keep]:
            gone = old.with_name(f".{old.name}.partial")
            old.rename(gone)
            shutil.rmtree(gone)
    dist.barrier()


def load_newest(engine: Any, folder: Path) -> dict[str, Any] | None:
    """Put the newest checkpoint into the engine; returns its state, None where there is none."""
    found = checkpoints(folder)
    if not found:
        return None
    state: dict[str, Any] = read_json(found[-1] / "state.json")
    if state["ranks"] != dist.get_world_size():
        raise CheckpointError(
            f"{found[-1]} was written by {state['ranks']} ranks, this training has "
            f"{dist.get_world_size()}; use as many GPUs as before, or another output folder"
        )
    engine.load_checkpoint(str(found[-1]), tag=TAG, load_module_strict=not _has_frozen(engine))
    return state


def save_final(engine: Any, target: Path, tokenizer: Path, base: str) -> None:
    """Write the folder that transformers (or peft, for adapters) loads; whole or not at all."""
    trainee: Trainee = engine.module
    adapters = _has_frozen(engine)
    if engine.zero_optimization_stage() == 3:
        weights = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=adapters)
    else:
        weights = {
            name: parameter.detach()
            for name, parameter in trainee.named_parameters()
            if parameter.requires_grad or not adapters
        }
    if dist.get_rank() == 0:
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        named = {name.removeprefix("model."): value for name, value in weights.items()}
        if trainee.packing is not None:
            named = plain_weights(named, trainee.causal.config)
        trainee.model.save_pretrained(partial, state_dict=named)
        if adapters:
            (partial / "base.json").write_text(json.dumps({"base": base}) + "\n")
        for file in tokenizer.iterdir():
            if "token" in file.name or file.suffix in {".txt", ".jinja"}:
                shutil.copyfile(file, partial / file.name)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(partial, target)
    dist.barrier()


def _has_frozen(engine: Any) -> bool:
    return any(not parameter.requires_grad for parameter in engine.module.parameters())
