"""Alternatives for a recipe that does not fit: changed recipes, best first. Each can be written as a recipe
that plans to the same figures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from fastcpt.planning.costs import tokens_per_second
from fastcpt.planning.figures import plan_on
from fastcpt.planning.hardware import Hardware
from fastcpt.planning.jobs import (
    WORTH_IT,
    best_job,
    changed,
    everywhere,
    fits_memory,
    fuses,
    host_has_memory,
    job_changes,
    job_of,
    refused_by_trainer,
    smaller_states,
)
from fastcpt.planning.models import KNOWN, LLAMAS, known_name, shape_of
from fastcpt.planning.placement import batch_problem, placement
from fastcpt.planning.result import Alternative, Plan
from fastcpt.recipe import Recipe
from fastcpt.recipe_sections import Lora
from fastcpt.shapes import Shape

OFFLOAD_FILE = "ds_config_zero3_offload.json"
MORE_GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

Keep = Literal["model", "method"]


def alternatives(
    recipe: Recipe,
    tokens: int | None,
    hardware: Hardware,
    history: Path | None = None,
    keep: Iterable[Keep] = (),
) -> list[Alternative]:
    """Changed recipes with their own figures, best first.

    Those that fit come first; among them those that keep a twentieth of the tokens; then those that give
    up least: another micro-batch, FP8, more GPUs, offload, a smaller model, LoRA. If one exceeds the
    budgets, its tokens are cut. ``keep`` leaves out those that change the model, or full training to LoRA.
    """
    found: list[tuple[tuple[bool, int, int], Alternative]] = []
    planned = recipe.training.max_steps * recipe.global_batch_size * recipe.corpus.max_seq_length
    for order, (what, changes, count) in enumerate(_changes(recipe, hardware, set(keep))):
        machines = hardware.with_count(count)
        changes = {**placement(changed(recipe, changes), machines), **changes}
        figures = plan_on(changed(recipe, changes), tokens, machines, history)
        if not figures.fits and not figures.problems and figures.fits_memory:
            cut = cut_to_budget(changed(recipe, changes), figures)
            if cut is not None and (count == hardware.count or not figures.fits_passes):
                what = f"{what}, fewer tokens" if what else "fewer tokens"
                changes = {**changes, **cut}
                figures = plan_on(changed(recipe, changes), tokens, machines, history)
        if not what or figures.hours is None or figures.memory_gb is None:
            continue
        if figures.host_memory_gb is not None:
            what = f"{what}, {figures.host_memory_gb:,.0f} GB of host memory"
        choice = Alternative(
            what,
            changes,
            figures.tokens,
            figures.cluster,
            figures.hours,
            figures.cost,
            figures.memory_gb["total"],
            figures.fits,
        )
        kept = choice.tokens / planned
        rank = (not choice.fits, (kept < 0.05) + (kept < 0.01), order)
        found.append((rank, choice))
    return [choice for _, choice in sorted(found, key=lambda item: item[0])]


def _changes(
    recipe: Recipe, hardware: Hardware, keep: set[Keep]
) -> Iterator[tuple[str, dict[str, Any], int]]:
    """Possible changes as words, dotted keys and number of GPUs, those that lose least first."""
    count, shape, gpu = hardware.count, shape_of(recipe), hardware.gpu
    assert gpu is not None
    if shape is None:
        return
    if refused_by_trainer(recipe, shape, fp8=False) is not None:
        yield from _other_models(recipe, hardware, shape, {}, keep)
        return
    needed: dict[str, Any] = {}
    first = []
    if recipe.training.use_fp8 and (gpu.fp8 is None or not fuses(recipe, shape)):
        needed = everywhere({"use_fp8": False})
        recipe = changed(recipe, needed)
        first.append("bf16")
    more_gpus = list(_enough_gpus(recipe, hardware, shape, needed))
    if recipe.global_batch_size % count:
        needed = {**needed, **placement(recipe, hardware)}
        recipe = changed(recipe, needed)
        first.append(f"steps of {recipe.global_batch_size} sequences")
    if first:
        yield ", ".join(first), needed, count
    best = best_job(recipe, shape, hardware)
    own = job_of(recipe, shape, hardware, recipe.training.per_device_train_batch_size)
    if best and (
        not fits_memory(own, hardware)
        or tokens_per_second(best, hardware) > (1 + WORTH_IT) * tokens_per_second(own, hardware)
    ):
        words = f"micro-batch {best.micro_batch}, checkpointing {best.recomputation}"
        yield words, {**needed, **job_changes(recipe, best, hardware)}, count
    elif not first:
        yield "", needed, count  # the recipe itself, on fewer tokens
    if gpu.fp8 is not None and not recipe.training.use_fp8 and fuses(recipe, shape):
        tuned = _tuned(recipe, {**needed, **everywhere({"use_fp8": True})}, hardware)
        if tuned is not None:
            yield "FP8", tuned, count
    if best is None:
        yield from _smaller_states(recipe, hardware, needed)
    yield from more_gpus
    if recipe.lora is None and best is None:  # with enough memory, offloading would only be slower
        settings = {"deepspeed": OFFLOAD_FILE, "optimizer_states": "float32"}
        offload = {**needed, **everywhere(settings)}
        offloaded = _tuned(recipe, offload, hardware)
        if offloaded is not None:
            yield "optimizer offloaded to the hosts", offloaded, count
    yield from _other_models(recipe, hardware, shape, needed, keep)
    adaptable = set(shape.family.linears) >= set(Lora().target_modules)
    if recipe.lora is None and "method" not in keep and adaptable:
        rate = min(1e-3, 10 * recipe.training.learning_rate)  # LoRA needs about ten times the rate
        lora = {**needed, "lora": Lora().model_dump(), "training.learning_rate": rate}
        lora |= everywhere({"optimizer_states": "float32"})  # adapters' states are small
        tuned = _tuned(recipe, lora, hardware)
        if tuned is not None:
            yield "LoRA on q, k, v, o", tuned, count


def _smaller_states(
    recipe: Recipe, hardware: Hardware, needed: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any], int]]:
    """The largest optimizer states that fit."""
    for states in smaller_states(recipe):
        tuned = _tuned(recipe, {**needed, **states}, hardware)
        if tuned is not None:
            words = f"optimizer states in {tuned['training.optimizer_states']}"
            yield words, tuned, hardware.count
            return


def _other_models(
    recipe: Recipe, hardware: Hardware, shape: Shape, needed: dict[str, Any], keep: set[Keep]
) -> Iterator[tuple[str, dict[str, Any], int]]:
    """The next two smaller Llamas in place of the model."""
    smaller = [name for name in LLAMAS if KNOWN[name].parameters < 0.9 * shape.parameters]
    for name in () if "model" in keep else reversed(smaller[-2:]):
        model = {**needed, "model.name_or_path": f"meta-llama/{name}", "model.config": None}
        whole = everywhere({"optimizer_states": "float32"})
        tuned = _tuned(recipe, {**model, **whole}, hardware) or _tuned(recipe, model, hardware)
        if tuned is not None:
            yield f"{name} in place of {_called(recipe, shape)}", tuned, hardware.count


def _called(recipe: Recipe, shape: Shape) -> str:
    name = recipe.model.name_or_path
    return (known_name(name) if name else None) or f"{shape.parameters / 1e9:.0f}B"


def _tuned(recipe: Recipe, changes: dict[str, Any], hardware: Hardware) -> dict[str, Any] | None:
    """The changes with the fastest micro-batch that fits; None if none fits."""
    other = changed(recipe, changes)
    shape = shape_of(other)
    job = best_job(other, shape, hardware) if shape else None
    if job is None or not host_has_memory(job, hardware):
        return None
    return {**changes, **job_changes(other, job, hardware)}


def _enough_gpus(
    recipe: Recipe, hardware: Hardware, shape: Shape, precision: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any], int]]:
    """The fewest GPUs of the same kind that fit memory and hours with the same tokens; if none fits the
    hours, the fewest that fit memory."""
    assert hardware.gpu is not None
    first: tuple[str, dict[str, Any], int] | None = None
    for count in MORE_GPUS:
        if count <= hardware.count or recipe.global_batch_size % count:
            continue
        machines = hardware.with_count(count)
        job = best_job(recipe, shape, machines)
        if job is None or not host_has_memory(job, machines):
            continue
        changes = {**precision, **job_changes(recipe, job, machines)}
        choice = (f"{count} GPUs in place of {hardware.count}", changes, count)
        if plan_on(changed(recipe, changes), None, machines, None).fits_time:
            yield choice
            return
        first = first or choice
    if first is not None:
        yield first


def cut_to_budget(recipe: Recipe, figures: Plan) -> dict[str, Any] | None:
    """The steps that hours, money and passes allow, as changes; None if not even one step is allowed, or
    all are."""
    if figures.hours is None:
        return None
    parts, steps = dict(figures.hours_parts), recipe.training.max_steps
    saves = steps // recipe.training.save_steps + 1
    fixed = sum(parts.values()) - parts["training"] - parts["checkpoints"] * (1 - 1 / saves)
    allowed = recipe.budget.hours if recipe.budget.hours is not None else float("inf")
    if recipe.budget.money is not None and figures.cost:
        allowed = min(allowed, recipe.budget.money / (figures.cost.high / figures.hours.high))
    fewer = steps
    if allowed < figures.hours.high:
        a_step = (figures.hours.high - fixed) / steps
        fewer = int((allowed - fixed) / a_step * 0.999)
    if not figures.fits_passes and figures.steps_in_passes is not None:
        fewer = min(fewer, figures.steps_in_passes)
    if not 0 < fewer < steps:
        return None
    return {
        "training.max_steps": fewer,
        "training.warmup_steps": min(recipe.training.warmup_steps, fewer // 10),
    }


def own_recipe(
    recipe: Recipe, name: str, description: str, changes: Mapping[str, Any] | None = None
) -> Recipe:
    """The changed recipe under its own name, without the guide's claims, which do not apply to it."""
    own = {"name": name, "description": description, "claim": None}
    return changed(recipe, {**(changes or {}), **own})


def placed(recipe: Recipe, hardware: Hardware) -> Recipe:
    """The recipe with the GPUs that it was planned on; unchanged if they cannot split its batch, or are
    CPUs."""
    if hardware.gpu is None or batch_problem(recipe, hardware) is not None:
        return recipe
    return changed(recipe, placement(recipe, hardware))


def numbered(found: Plan, number: int) -> Alternative:
    """The alternative that the plan's message lists under ``number``, from 1; ``ValueError`` if there is
    none."""
    if found.fits:
        raise ValueError(f"--take {number}: '{found.recipe}' fits as it is, nothing else is listed")
    if not 1 <= number <= len(found.alternatives):
        raise ValueError(f"--take {number}: {len(found.alternatives)} alternatives are listed")
    return found.alternatives[number - 1]
