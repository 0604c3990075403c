"""A recipe's job on given GPUs, its memory, and the fastest job that fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastcpt.families import cannot_fuse, refusal
from fastcpt.planning.costs import (
    RUNTIME_GB,
    USABLE,
    Attention,
    Job,
    as_the_trainer_runs,
    host_bytes,
    memory_parts,
    tokens_per_second,
)
from fastcpt.planning.hardware import Hardware
from fastcpt.planning.history import Measured
from fastcpt.planning.placement import SECTIONS, placement
from fastcpt.recipe import Recipe
from fastcpt.shapes import Shape
from fastcpt.step_memory import STATE_BYTES

NEAR_BEST = 0.01  # a smaller micro-batch is preferred if it loses no more than this
WORTH_IT = 0.03  # a smaller gain is no reason to change a recipe


def refused_by_trainer(recipe: Recipe, shape: Shape, fp8: bool) -> str | None:
    """Why the trainer refuses the model on a host with the GPU packages; None if it does not."""
    # flash-attn is only built if a recipe names it
    attention = recipe.model.attn_implementation.replace("auto", "sdpa")
    return refusal(shape.configuration, recipe, fp8, attention)


def fuses(recipe: Recipe, shape: Shape) -> bool:
    """Whether the trainer uses fused blocks for the model on a host with the GPU packages."""
    model, size = recipe.model, recipe.corpus.max_seq_length
    return cannot_fuse(shape.configuration, model.dtype, model.attn_implementation, size) is None


def job_of(recipe: Recipe, shape: Shape, hardware: Hardware, micro: int) -> Job:
    """One step on one GPU; recomputation as the recipe says, or as the trainer decides."""
    assert hardware.gpu is not None
    wanted, fused = recipe.training.gradient_checkpointing, fuses(recipe, shape)
    fastest: Attention = "cudnn" if fused else "sdpa"
    attention: dict[str, Attention] = {"auto": fastest, "flash_attention_2": "flash"}
    accumulation = recipe.global_batch_size // (micro * hardware.count)
    job = Job(
        shape,
        recipe.corpus.max_seq_length,
        micro,
        max(1, accumulation),
        hardware.count,
        lora=recipe.lora,
        fp8=recipe.training.use_fp8,
        offload=recipe.training.offloads,
        states=recipe.training.optimizer_states,
        attention=attention.get(recipe.model.attn_implementation, "sdpa"),
        kernels="fused" if fused else "liger" if shape.family.liger else "plain",
    )
    if fused:
        return as_the_trainer_runs(job, 1e9 * hardware.gpu.memory_gb, wanted=wanted)
    if isinstance(wanted, bool):
        return replace(job, checkpointing="full" if wanted else "none")
    return job if fits_memory(job, hardware) else replace(job, checkpointing="full")


def fits_memory(job: Job, hardware: Hardware) -> bool:
    """Whether the job fits a GPU."""
    assert hardware.gpu is not None
    return memory_gb(job)["total"] <= USABLE * hardware.gpu.memory_gb


def host_has_memory(job: Job, hardware: Hardware) -> bool:
    """Whether what the job offloads fits into nine tenths of the hosts' memory."""
    return host_bytes(job) <= 0.9e9 * hardware.host_memory_gb


def best_job(recipe: Recipe, shape: Shape, hardware: Hardware) -> Job | None:
    """The fastest micro-batch that fits, with the same global batch and the trainer's recomputation."""
    free = changed(recipe, {"training.gradient_checkpointing": "auto"})
    batch = recipe.global_batch_size
    micros = [micro for micro in range(1, 65) if not batch % (micro * hardware.count)]
    jobs = [job_of(free, shape, hardware, micro) for micro in micros]
    rates = [(tokens_per_second(job, hardware), job) for job in jobs if fits_memory(job, hardware)]
    if not rates:
        return None
    enough = (1 - NEAR_BEST) * max(rate for rate, _ in rates)
    return next(job for rate, job in rates if rate >= enough)


def memory_gb(job: Job, before: Measured | None = None) -> dict[str, float]:
    """GB per GPU by part, with the runtime and the total; corrected to the peak of a similar run ``before``."""
    parts = {name: size / 1e9 for name, size in memory_parts(job).items() if size}
    alike = before is not None and (
        (before.gpus, before.micro_batch) == (job.ranks, job.micro_batch)
        and before.checkpointing in (None, job.recomputation)
        and before.optimizer_states == job.states
    )
    if alike and before is not None and before.peak_memory_gb:
        parts["measured beyond these"] = before.peak_memory_gb - sum(parts.values())
    parts["runtime"] = RUNTIME_GB
    return {**parts, "total": sum(parts.values())}


def everywhere(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Changes that apply the same settings to all three trainings."""
    return {f"{section}.{key}": value for section in SECTIONS for key, value in settings.items()}


def smaller_states(recipe: Recipe) -> list[dict[str, Any]]:
    """Changes to smaller optimizer states, the most precise first; only for full training."""
    if recipe.lora or recipe.training.offloads or recipe.model.dtype != "bfloat16":
        return []
    every = list(STATE_BYTES)
    smaller = every[every.index(recipe.training.optimizer_states) + 1 :]
    return [everywhere({"optimizer_states": states}) for states in smaller]


def what_fits(recipe: Recipe, shape: Shape, hardware: Hardware) -> str | None:
    """Settings with which a recipe fits memory without another change; None if there are none (see
    ``alternatives``)."""
    automatic = {"training.gradient_checkpointing": "auto"}
    for states in [{}, *smaller_states(recipe)]:
        other = changed(recipe, {**states, **automatic})
        best = best_job(other, shape, hardware)
        if best is None:
            continue
        own = job_of(other, shape, hardware, recipe.training.per_device_train_batch_size)
        words = [f"training.optimizer_states: {best.states}"] if states else []
        if not fits_memory(own, hardware):
            words.append(f"training.per_device_train_batch_size: {best.micro_batch}")
        elif recipe.training.gradient_checkpointing != "auto" and not states:
            words.append("training.gradient_checkpointing: auto")
        return " with ".join(words)
    return None


def job_changes(recipe: Recipe, job: Job, hardware: Hardware) -> dict[str, Any]:
    """Changes that make ``recipe`` run as ``job`` on ``hardware``; each training keeps its batch.

    Later trainings get micro-batches that are no larger.
    """
    automatic = everywhere({"gradient_checkpointing": "auto"})
    return {**placement(recipe, hardware, job.micro_batch), **automatic}


def changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with dotted keys replaced; validated like any other."""
    content = recipe.model_dump()
    for key, value in changes.items():
        *sections, last = key.split(".")
        place: Any = content
        for section in sections:
            place = place[section]
        place[last] = value
    return Recipe.model_validate(content)
