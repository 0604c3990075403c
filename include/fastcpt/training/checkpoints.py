"""What a checkpoint holds, how it is read, and the final model; ``checkpoint_writer`` writes it.

A checkpoint holds the optimizer's state: the float32 weights and Adam's two moments (12 bytes per
trained weight; frozen weights are loaded from the base model), or their low-precision versions
(``rounded_adamw``). Each rank writes its own slices under the weights' names and reads those it needs
from any rank's file, so a training can resume on another number of ranks. Ranks write into
``.step_N.partial``, which is renamed once everything is on disk, ``digests.json`` last. A checkpoint with
a wrong digest is not used. The output folder has to be shared by all hosts, as one rename completes the
checkpoint for all.
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
    what_is_damaged,
)
from fastcpt.training.layers import plain_weights
from fastcpt.training.model import BASE, Trainee
from fastcpt.training.rounded_adamw import SLICE, dequantized, quantized

MOMENTS = ("exp_avg", "exp_avg_sq")


class CheckpointError(ValueError):
    """A checkpoint does not match this training, or all checkpoints are damaged."""


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a training, oldest first."""
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def file_of_rank(rank: int) -> str:
    return f"rank_{rank}.pt"


def set_aside(checkpoint: Path) -> Path:
    """Take a checkpoint's name away in one step; the next one that is written removes the rest."""
    return checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}.partial"))


def newest_whole(folder: Path) -> Path | None:
    """The newest undamaged checkpoint; None if there are no checkpoints.

    Called by every rank; each verifies its share of the files. A damaged checkpoint is logged and set
    aside. ``CheckpointError`` if all are damaged. ``OSError`` on every rank if a file could not be read: a
    retry may succeed, so no checkpoint is set aside.
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
                    set_aside(newer)
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
    """Load the newest undamaged checkpoint into the engine; its state, or None if there is none.

    Called once before the first step, even without checkpoints, as it creates Adam's moments.
    """
    _make_moments(engine)
    newest = newest_whole(folder)
    if newest is None:
        return None
    state: dict[str, Any] = read_json(newest / "state.json")
    files = [
        torch.load(newest / file_of_rank(rank), map_location="cpu", mmap=True)
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
    """Set the trained weights to these values (full tensors, by name) and zero the moments."""
    with torch.no_grad():
        for flat, places in _flats(engine):
            for place in places:
                _fill_weights(flat, place, [weights[place.name].flatten()])
    for moments in engine.optimizer.optimizer.state.values():
        for value in moments.values():
            value.zero_()
    _forget_gathered(engine)


def trained_weights(engine: Any) -> dict[str, torch.Tensor]:
    """The full trained weights by name, on every rank's CPU; only for adapters, which are small."""
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
    """The weights in an adapter's folder, under this engine's names."""
    stored = load_file(folder / "adapter_model.safetensors")
    weights = {}
    for name, _ in _trained(engine):
        plain = name.removeprefix("model.").replace(".default.", ".")
        if plain not in stored:
            raise CheckpointError(f"{folder} has no {plain}: its adapter has other target_modules")
        weights[name] = stored[plain]
    return weights


def _forget_gathered(engine: Any) -> None:
    """Drop ZeRO-3's gathered copies, so that the next use gathers the new values."""
    zero = engine.optimizer
    if engine.zero_optimization_stage() == 3 and zero.persistent_parameters:
        zero.persistent_parameters[0].partition(zero.persistent_parameters)


def _make_moments(engine: Any) -> None:
    """Create Adam's state as its first step would, so that a checkpoint can be loaded into it."""
    optimizer = engine.optimizer.optimizer
    for flat, _ in _flats(engine):
        optimizer.state[flat] = optimizer.fresh_state(flat)


def _trained(engine: Any) -> list[tuple[str, Any]]:
    return [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]


class Place(NamedTuple):
    """The location of this rank's slice of a weight in a flat tensor of the optimizer."""

    name: str
    parameter: Any
    begin: int
    size: int  # the whole weight on a single rank (stage 1)


def _flats(engine: Any) -> Iterator[tuple[torch.Tensor, list[Place]]]:
    """The optimizer's flat tensors themselves, even if offloaded, and the weights in each.

    DeepSpeed's ``get_local_fp32_param`` would return a GPU copy of offloaded ones.
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


def own_state(engine: Any) -> dict[str, Any]:
    """This rank's flat slices of every trained weight and its two moments."""
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
    """A moment's slice; for 8 bits, with the scales of its blocks."""
    values, scales = state[moment], state.get(f"{moment}_scale")
    if scales is None:
        return values.narrow(0, place.begin, place.size)
    first, end = place.begin // MOMENTS_BLOCK, place.begin + place.size
    return {
        "codes": values.narrow(0, place.begin, place.size),
        "scales": scales[first : -(-end // MOMENTS_BLOCK)],
        "before": place.begin
        % MOMENTS_BLOCK,  # codes in the first block that belong to another weight
    }


def _values(stored: Any, moment: str) -> torch.Tensor:
    """Decode what ``_stored`` wrote."""
    if isinstance(stored, torch.Tensor):
        return stored
    codes, before = stored["codes"], stored["before"]
    blocks = codes.new_zeros(len(stored["scales"]) * MOMENTS_BLOCK)
    blocks[before : before + len(codes)] = codes
    return dequantized(blocks, stored["scales"], moment)[before : before + len(codes)]


def _quantize(values: torch.Tensor, moment: str, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Fill 8-bit ``codes`` and their ``scales``; dequantized values get exactly their old codes."""
    for begin in range(0, len(values), SLICE):
        part = slice(begin, begin + SLICE)
        blocks = slice(begin // MOMENTS_BLOCK, (begin + SLICE) // MOMENTS_BLOCK)
        made = quantized(values[part].to(codes.device), moment)
        codes[part], scales[blocks] = made


def _fill_weights(flat: torch.Tensor, place: Place, slices: list[torch.Tensor]) -> None:
    """Fill this rank's slice of a weight, in the optimizer and in the model."""
    own, parameter = flat.narrow(0, place.begin, place.size), place.parameter
    _fill(own, slices)
    model = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter
    model.data.copy_(own.view_as(model))


def _fill(own: torch.Tensor, slices: list[torch.Tensor]) -> None:
    """Fill this rank's slice from the slices of the checkpoint's ranks; the last may be padded."""
    begin = dist.get_rank() * len(own)
    for n, piece in enumerate(slices):
        offset = n * len(slices[0])
        low, high = max(begin, offset), min(begin + len(own), offset + len(piece))
        if low < high:
            own[low - begin : high - begin] = piece[low - offset : high - offset].to(own.device)


def save_final(
    engine: Any, target: Path, tokenizer: Path, base: str, before: Path | None = None
) -> None:
    """Write the folder that transformers (or peft, for adapters) loads, atomically.

    The areas' adapters of ``before``, the model that training started from, are copied.
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
        if adapters:  # an absolute path, so that the base is found from anywhere
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
    """Write the mean of n adapters as one adapter, with the single ones under ``areas``.

    ``subjects``: the subjects of each area. Concatenating adapters of rank r gives one of rank n r whose
    update is exactly their sum; its scaling, alpha / (n r), turns the sum into the mean.
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
    """Flush a finished folder to disk and rename it to ``target``, replacing an older one."""
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
