"""Checkpoints that are complete or absent, and the final model.

A checkpoint holds what the optimizer knows: the float32 weights and Adam's two moments (12 bytes a
trained weight; frozen ones come from the base model again), or what it has in their place
(``rounded_adamw``). Each rank writes its own slices under the weights' names, and reads those it needs
from whichever files have them: a training goes on with another number of ranks. Ranks write into ``.step_N.partial``, which gets its name when all of it is
on the disk, ``digests.json`` last. A checkpoint whose files differ from their digests is not used.
On hosts that share no file system a checkpoint cannot be renamed for all at once: the output folder
has to be shared.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from fastcpt.files import flush, read_json, write_json
from fastcpt.step_memory import MOMENTS_BLOCK
from fastcpt.training.digests import (
    digest_of_file,
    save_tensors,
    what_is_damaged,
    write_digests,
)
from fastcpt.training.layers import plain_weights
from fastcpt.training.model import BASE, Trainee
from fastcpt.training.rounded_adamw import SLICE, dequantized, quantized

MOMENTS = ("exp_avg", "exp_avg_sq")


class CheckpointError(ValueError):
    """A checkpoint does not fit this training, or none of several is whole."""


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
    own = f"rank_{dist.get_rank()}.pt"
    written: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(written, (own, save_tensors(_own_state(engine), partial / own)))
    if dist.get_rank() == 0:
        write_json(partial / "state.json", {**state, "ranks": dist.get_world_size()})
        written.append(("state.json", digest_of_file(partial / "state.json")))
        write_digests(partial, dict(written))
        partial.rename(target)
        flush(folder)
        for old in checkpoints(folder)[:-keep]:
            gone = old.with_name(f".{old.name}.partial")
            old.rename(gone)
            shutil.rmtree(gone)
    dist.barrier()


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint whose files are as they were written; None where there is none at all.

    Called by every rank; each looks at its share of the files. A damaged one is named in the log and set
    aside. ``CheckpointError`` where all are damaged. ``OSError`` on every rank where a file could not
    be read: a retry may read it, so no checkpoint is set aside for that.
    """
    found = checkpoints(folder)
    damaged: list[str] = []
    for checkpoint in reversed(found):
        wrong: list[Any] = [None] * dist.get_world_size()
        own: str | OSError | None
        try:
            own = what_is_damaged(checkpoint, dist.get_rank(), dist.get_world_size())
        except OSError as error:
            own = error
        dist.all_gather_object(wrong, own)
        unread = next((one for one in wrong if isinstance(one, OSError)), None)
        if unread:
            raise OSError(f"{checkpoint} could not be read: {unread}")
        wrong = sorted({one for one in wrong if one})
        if not wrong:
            if damaged and dist.get_rank() == 0:
                for line in damaged:
                    print(f"damaged and not used: {line}", flush=True)
                for newer in found[found.index(checkpoint) + 1 :]:
                    newer.rename(newer.with_name(f".{newer.name}.partial"))
            dist.barrier()
            return checkpoint
        damaged.append(f"{folder.name}/{checkpoint.name}: {'; '.join(wrong)}")
    if damaged:
        raise CheckpointError(
            f"none of the checkpoints in {folder} is whole ({', '.join(damaged)}). Look for the "
            "fault of that disk; remove the folder to begin again from the first step"
        )
    return None


def load_newest(engine: Any, folder: Path) -> dict[str, Any] | None:
    """Put the newest whole checkpoint into the engine; returns its state, None without any.

    Called once before the first step, also where there is no checkpoint: it makes Adam's moments.
    """
    _make_moments(engine)
    newest = newest_whole(folder)
    if newest is None:
        return None
    state: dict[str, Any] = read_json(newest / "state.json")
    files = [
        torch.load(newest / f"rank_{rank}.pt", map_location="cpu", mmap=True)
        for rank in range(state["ranks"])
    ]
    ours = {name for name, parameter in _trained(engine)}
    theirs = set(files[0]["slices"])
    if ours != theirs:
        raise CheckpointError(
            f"{newest} is of another model or other layers ({len(theirs)} weights, this "
            f"training has {len(ours)}); use another output folder"
        )
    zero = engine.optimizer
    with torch.no_grad():
        for flat, places in _flats(engine):
            moments = zero.optimizer.state[flat]
            for place in places:
                _fill_weights(flat, place, [file["slices"][place.name][0] for file in files])
            for n, moment in enumerate(MOMENTS, 1):
                scales = moments.get(f"{moment}_scale")
                whole = moments[moment] if scales is None else torch.zeros(len(moments[moment]))
                for place in places:
                    slices = [_values(file["slices"][place.name][n], moment) for file in files]
                    _fill(whole.narrow(0, place.begin, place.size), slices)
                if scales is not None:
                    _quantize(whole, moment, moments[moment], scales)
            moments["step"].fill_(files[0]["adam_step"])
    _forget_gathered(engine)
    return state


def begin_again(engine: Any, weights: dict[str, torch.Tensor]) -> None:
    """Give the trained weights these values (whole tensors, by name) and forget the moments."""
    with torch.no_grad():
        for flat, places in _flats(engine):
            for place in places:
                _fill_weights(flat, place, [weights[place.name].flatten()])
    for moments in engine.optimizer.optimizer.state.values():
        for value in moments.values():
            value.zero_()
    _forget_gathered(engine)


def trained_weights(engine: Any) -> dict[str, torch.Tensor]:
    """The trained weights by name, whole, on the CPU of every rank: for adapters, which are small."""
    import deepspeed

    whole = {}
    for name, parameter in _trained(engine):
        if engine.zero_optimization_stage() == 3:
            with deepspeed.zero.GatheredParameters([parameter]):
                whole[name] = parameter.detach().cpu().clone()
        else:
            whole[name] = parameter.detach().cpu().clone()
    return whole


def adapter_weights(engine: Any, folder: Path) -> dict[str, torch.Tensor]:
    """The weights of an adapter's folder by this engine's names."""
    stored = load_file(folder / "adapter_model.safetensors")
    weights = {}
    for name, _ in _trained(engine):
        plain = name.removeprefix("model.").replace(".default.", ".")
        if plain not in stored:
            raise CheckpointError(f"{folder} has no {plain}: its adapter has other target_modules")
        weights[name] = stored[plain]
    return weights


def _forget_gathered(engine: Any) -> None:
    """Drop ZeRO-3's gathered copies: the next use gathers the new values."""
    zero = engine.optimizer
    if engine.zero_optimization_stage() == 3 and zero.persistent_parameters:
        zero.persistent_parameters[0].partition(zero.persistent_parameters)


def _make_moments(engine: Any) -> None:
    """Adam's state as its first step would make it, so that there is something to fill."""
    optimizer = engine.optimizer.optimizer
    for flat, _ in _flats(engine):
        optimizer.state[flat] = optimizer.fresh_state(flat)


def _trained(engine: Any) -> list[tuple[str, Any]]:
    return [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]


class Place(NamedTuple):
    """Where this rank's slice of a weight lies in a flat tensor of the optimizer."""

    name: str
    parameter: Any
    begin: int
    size: int  # on a single rank (stage 1) all of it


def _flats(engine: Any) -> Iterator[tuple[torch.Tensor, list[Place]]]:
    """The optimizer's flat tensors themselves, also where they are offloaded, and what lies in each.

    DeepSpeed's ``get_local_fp32_param`` answers with a copy on the GPU where they are not there.
    """
    zero = engine.optimizer
    names = {id(parameter): name for name, parameter in _trained(engine)}
    if engine.zero_optimization_stage() == 3:
        for flat, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
            begins = [zero.grad_position[zero.get_param_id(one)][1] for one in group]
            sizes = [one.partition_numel() for one in group]
            yield flat, _places(names, group, begins, sizes)
        return
    for flat, group, begins in zip(
        zero.single_partition_of_fp32_groups,
        zero.round_robin_bit16_groups,
        zero.round_robin_bit16_offsets,
        strict=True,
    ):
        yield flat, _places(names, group, begins, [one.numel() for one in group])


def _places(
    names: dict[int, str], group: list[Any], begins: list[int], sizes: list[int]
) -> list[Place]:
    return [
        Place(names[id(parameter)], parameter, begin, size)
        for parameter, begin, size in zip(group, begins, sizes, strict=True)
    ]


def _own_state(engine: Any) -> dict[str, Any]:
    """This rank's slices of every trained weight, flat: of the optimizer's weights, of both moments."""
    states = engine.optimizer.optimizer.state
    return {
        "slices": {
            place.name: [
                flat.detach().narrow(0, place.begin, place.size),
                *(_stored(states[flat], moment, place) for moment in MOMENTS),
            ]
            for flat, places in _flats(engine)
            for place in places
        },
        "adam_step": float(next(iter(states.values()))["step"]),
    }


def _stored(state: dict[str, torch.Tensor], moment: str, place: Place) -> Any:
    """A moment's slice as it is; of 8 bits with the scales of the blocks that it lies in."""
    values, scales = state[moment], state.get(f"{moment}_scale")
    if scales is None:
        return values.narrow(0, place.begin, place.size)
    first, end = place.begin // MOMENTS_BLOCK, place.begin + place.size
    return {
        "codes": values.narrow(0, place.begin, place.size),
        "scales": scales[first : -(-end // MOMENTS_BLOCK)],
        "before": place.begin % MOMENTS_BLOCK,  # codes of the first block that are another weight's
    }


def _values(stored: Any, moment: str) -> torch.Tensor:
    """What ``_stored`` wrote, as numbers."""
    if isinstance(stored, torch.Tensor):
        return stored
    codes, before = stored["codes"], stored["before"]
    blocks = codes.new_zeros(len(stored["scales"]) * MOMENTS_BLOCK)
    blocks[before : before + len(codes)] = codes
    return dequantized(blocks, stored["scales"], moment)[before : before + len(codes)]


def _quantize(values: torch.Tensor, moment: str, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Fill 8-bit ``codes`` and their ``scales``; values that were dequantized get their codes back."""
    for begin in range(0, len(values), SLICE):
        part = slice(begin, begin + SLICE)
        blocks = slice(begin // MOMENTS_BLOCK, (begin + SLICE) // MOMENTS_BLOCK)
        made = quantized(values[part].to(codes.device), moment)
        codes[part], scales[blocks] = made


def _fill_weights(flat: torch.Tensor, place: Place, slices: list[torch.Tensor]) -> None:
    """Fill this rank's slice of a weight, for the optimizer and for the model."""
    own, parameter = flat.narrow(0, place.begin, place.size), place.parameter
    _fill(own, slices)
    model = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter
    model.data.copy_(own.view_as(model))


def _fill(own: torch.Tensor, slices: list[torch.Tensor]) -> None:
    """Fill this rank's slice from those of the checkpoint's ranks; the last may be padded."""
    begin = dist.get_rank() * len(own)
    for n, piece in enumerate(slices):
        offset = n * len(slices[0])
        low, high = max(begin, offset), min(begin + len(own), offset + len(piece))
        if low < high:
            own[low - begin : high - begin] = piece[low - offset : high - offset].to(own.device)


def save_final(
    engine: Any, target: Path, tokenizer: Path, base: str, before: Path | None = None
) -> None:
    """Write the folder that transformers (or peft, for adapters) loads; whole or not at all.

    Areas' adapters in ``before``, the model that was trained, are copied.
    """
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
        if adapters:  # a folder is named so that it is found from anywhere
            base = str(Path(base).resolve()) if Path(base).is_dir() else base
            for settings in trainee.model.peft_config.values():
                settings.base_model_name_or_path = base
        trainee.model.save_pretrained(partial, state_dict=named)
        if adapters:
            (partial / BASE).write_text(json.dumps({"base": base}) + "\n")
        if before and (before / "areas").is_dir():
            shutil.copytree(before / "areas", partial / "areas")
            shutil.copyfile(before / "areas.json", partial / "areas.json")
        for file in tokenizer.iterdir():
            if "token" in file.name or file.suffix in {".txt", ".jinja"}:
                shutil.copyfile(file, partial / file.name)
        put_in_place(partial, target)
    dist.barrier()


def save_mean(adapters: dict[str, Path], subjects: dict[str, list[str]], target: Path) -> None:
    """Write the mean of several adapters as one, with each of them under ``areas``.

    ``subjects`` are each area's. Adapters of rank r, concatenated, are one adapter of rank n r that adds
    the sum of what they add, exactly. Its scaling, alpha / (n r), makes the sum a mean.
    """
    if dist.get_rank() == 0:
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        folders = list(adapters.values())
        shutil.copytree(folders[0], partial)
        stored = [load_file(folder / "adapter_model.safetensors") for folder in folders]
        mean = {
            name: torch.cat([one[name] for one in stored], dim=0 if ".lora_A." in name else 1)
            for name in stored[0]
        }
        save_file(mean, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        settings = read_json(partial / "adapter_config.json")
        settings["r"] *= len(folders)
        write_json(partial / "adapter_config.json", settings)
        for area, folder in adapters.items():
            shutil.copytree(folder, partial / "areas" / area)
        write_json(partial / "areas.json", subjects)
        put_in_place(partial, target)
    dist.barrier()


def put_in_place(partial: Path, target: Path) -> None:
    """Rename a finished folder when all of it is on the disk; one with that name gives way to it."""
    for path in [*partial.rglob("*"), partial]:
        flush(path)
    old = target.with_name(f".{target.name}.old.partial")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _has_frozen(engine: Any) -> bool:
    return any(not parameter.requires_grad for parameter in engine.module.parameters())
