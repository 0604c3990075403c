"""The figures of a recipe on given machines: time, memory, money, disk, and why it cannot run.

The rate comes from the newest run of the same model, method, precision, sequence length and GPU. Without
one it comes from the cost model (``costs``), as a range: narrow if this project measured that method on that
chip, otherwise up to the best published rate. ``docs/planning.md`` has the figures.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastcpt.planning.costs import (
    USABLE,
    Job,
    checkpoint_bytes,
    communication_seconds,
    host_bytes,
    model_flops,
    tokens_per_second,
)
from fastcpt.planning.hardware import Hardware, prices_source
from fastcpt.planning.history import Measured, last_run, line_of, measured_bytes_s
from fastcpt.planning.jobs import (
    WORTH_IT,
    best_job,
    changed,
    fits_memory,
    host_has_memory,
    job_of,
    memory_gb,
    refused_by_trainer,
    what_fits,
)
from fastcpt.planning.measured import measured_rows, published_rows
from fastcpt.planning.models import known_name, shape_of, unknown_model
from fastcpt.planning.placement import batch_of, batch_problem
from fastcpt.planning.ranges import (
    OF_LAST_RUN,
    Range,
    differing,
    measured_range,
    range_words,
    widened,
)
from fastcpt.planning.result import Plan
from fastcpt.recipe import Recipe
from fastcpt.recipe_sections import Lora, Training
from fastcpt.shapes import Shape
from fastcpt.step_memory import training_disk_bytes

BYTES_PER_TOKEN_ON_DISK = 1.1  # of the shards: zstd over int32 ids
STARTUP_SECONDS = (
    120.0  # importing packages, building kernels, starting NCCL; without loading weights
)
# For one question of each of five kinds: four answers with at most 900 characters, for two kinds also alone.
TOKENS_A_QUESTION = 4_200
A_LAYER_SECONDS = 1e-3  # per generated token: transformers' kernel launches, on any GPU; assumed
GENERATED_TOGETHER = 32  # batch of answers (fastcpt.training.generation)


def plan_on(recipe: Recipe, tokens: int | None, hardware: Hardware, history: Path | None) -> Plan:
    """The plan on given machines, without its alternatives."""
    if tokens is not None and tokens < 1:
        raise ValueError(f"a corpus of {tokens} tokens: there is nothing to train on")
    training, shape = recipe.training, shape_of(recipe)
    sequence = recipe.corpus.max_seq_length
    name = recipe.model.name_or_path
    plain = Plan(
        recipe=recipe.name,
        model=(known_name(name) or name) if name else "own shape",
        method="LoRA" if recipe.lora else "full",
        precision="FP8" if training.use_fp8 else recipe.model.dtype,
        cluster=hardware.name,
        gpus=hardware.count,
        sequence=sequence,
        steps=training.max_steps,
        tokens=training.max_steps * recipe.global_batch_size * sequence,
        corpus_tokens=tokens if tokens is not None else recipe.selection.target_tokens,
        budget_hours=recipe.budget.hours,
        budget_money=recipe.budget.money,
        max_passes=recipe.budget.max_passes,
        claim=recipe.claim.model_dump() if recipe.claim else None,
    )
    if shape is None:
        assert name is not None  # a model.config always has a shape
        return replace(plain, problems=(unknown_model(name),))
    plain = replace(plain, flops=model_flops(shape, sequence, recipe.lora) * plain.tokens)
    refused = refused_by_trainer(recipe, shape, fp8=False)
    if refused is not None:
        return replace(plain, problems=(f"model: {_size(shape)}; {refused}",))
    if training.use_fp8:
        refused = refused_by_trainer(recipe, shape, fp8=True)
        if hardware.gpu is None or hardware.gpu.fp8 is None:
            refused = f"{hardware.gpu.name if hardware.gpu else 'a CPU'} has no FP8"
        if refused is not None:
            # plan in bf16, which is what would run there
            bf16 = changed(recipe, {"training.use_fp8": False})
            words = f"precision: {refused}; the figures are those of {recipe.model.dtype}"
            found = plan_on(bf16, tokens, hardware, history)
            return replace(found, problems=(words, *found.problems))
    before = last_run(history, recipe, shape, hardware)
    if hardware.gpu is None:
        return _cpu_plan(plain, before)
    micro = training.per_device_train_batch_size
    unsplit = batch_problem(recipe, hardware)
    if unsplit is not None:
        return replace(plain, problems=(unsplit,))
    job = job_of(recipe, shape, hardware, micro)
    return _gpu_plan(plain, recipe, job, hardware, before, history)


def _cpu_plan(plain: Plan, before: Measured | None) -> Plan:
    """On CPUs the only source is the last run of the same recipe."""
    if before is None:
        return replace(plain, rate_source="unknown: no run of it on CPUs yet")
    likely = before.tokens_per_s_per_gpu * plain.gpus
    rate = Range(likely * 0.5, likely * 1.5)  # other work on the same cores
    train = Range(plain.tokens / rate.high, plain.tokens / rate.low).times(1 / 3600)
    parts = {
        "start-up": (before.startup_seconds or 0.0) / 3600,
        "evaluation": (before.evaluation_seconds or 0.0) / 3600,
    }
    return replace(
        plain,
        tokens_per_s=rate,
        hours=train.plus(sum(parts.values())),
        hours_parts={"training": train.middle, **parts},
        training_hours=train,
        rate_source=_last(before),
        notes=("fine-tuning is not in these hours",),
    )


def _last(before: Measured) -> str:
    there = f"{before.gpus}x{before.gpu}"
    return f"last run here, {before.run} of {before.time[:10]} on {there}"


def _gpu_plan(
    plain: Plan,
    recipe: Recipe,
    job: Job,
    hardware: Hardware,
    before: Measured | None,
    history: Path | None,
) -> Plan:
    assert hardware.gpu is not None
    memory = memory_gb(job, before)
    available = USABLE * hardware.gpu.memory_gb
    rate, source = _rate(recipe, job, hardware, before)
    found = replace(
        plain,
        memory_gb=memory,
        available_gb=available,
        micro_batch=job.micro_batch,
        accumulation=job.accumulation,
        checkpointing=job.recomputation,
        fits_memory=memory["total"] <= available,
        tokens_per_s=rate.times(hardware.count),
        rate_source=source,
    )
    if not found.fits_memory:
        found = replace(found, memory_setting=what_fits(recipe, job.shape, hardware))
    elif job.states != "float32" and fits_memory(replace(job, states="float32"), hardware):
        note = "optimizer states in float32 would fit too (training.optimizer_states)"
        found = replace(found, notes=(*found.notes, note))
    best = best_job(recipe, job.shape, hardware)
    found = replace(found, best_micro_batch=_better(job, best, hardware, found.fits_memory))
    found = _with_hours(found, recipe, job, hardware, before)
    found = _with_bringing(found, recipe, job, hardware, history)
    found = _with_cost(found, recipe, hardware)
    found = _with_disk(found, recipe, job, hardware)
    return _with_host_memory(found, job, hardware)


def _better(job: Job, best: Job | None, hardware: Hardware, fits: bool) -> dict[str, Any] | None:
    """The best micro-batch and its gain; None if there is none, or if it is not worth a change."""
    if best is None:
        return None
    gain = tokens_per_second(best, hardware) / tokens_per_second(job, hardware) - 1
    if gain < WORTH_IT and fits:
        return None
    return {
        "micro_batch": best.micro_batch,
        "accumulation": best.accumulation,
        "checkpointing": best.recomputation,
        "gain": gain,
    }


def _with_hours(
    found: Plan, recipe: Recipe, job: Job, hardware: Hardware, before: Measured | None
) -> Plan:
    """Add the hours of the jobs on the GPUs, and their tokens and operations."""
    everyone, tokens, notes = found.tokens_per_s, found.tokens, found.notes
    assert everyone is not None
    assert hardware.gpu is not None
    middle = everyone.middle
    parts = _overheads(recipe, job, hardware, middle, found.corpus_tokens or tokens, before)
    train = Range(tokens / everyone.high, tokens / everyone.low).times(1 / 3600)
    budget = recipe.training.time_budget_hours
    if budget:
        # the trainer's budget includes start-up, saving and evaluation
        own = ("start-up", "checkpoints", "evaluation")
        room = max(0.0, budget - sum(parts[name] for name in own))
        if tokens > middle * 3600 * room:
            tokens = int(middle * 3600 * room)
            notes += (
                f"the trainer ends so that the evaluation fits {budget:g} h (time_budget_hours), at "
                "about these tokens",
            )
        train = Range(min(train.low, room), min(train.high, room))
    hours = train.plus(sum(parts.values()))
    flops = model_flops(job.shape, job.sequence, recipe.lora) * tokens
    more = recipe.stage2.max_steps * batch_of(recipe, recipe.stage2) * job.sequence
    return replace(
        found,
        tokens=tokens,
        flops=flops,
        hours=hours,
        hours_parts={"training": train.middle, **parts},
        training_hours=train,
        fits_time=recipe.budget.hours is None or hours.high <= recipe.budget.hours,
        peak_hours=flops / (hardware.gpu.peak(job.fp8) * hardware.count) / 3600,
        stage2_hours=Range(more / everyone.high, more / everyone.low).times(1 / 3600),
        stage2_passes=more / found.corpus_tokens if found.corpus_tokens else None,
        notes=notes,
    )


def _with_bringing(
    found: Plan, recipe: Recipe, job: Job, hardware: Hardware, history: Path | None
) -> Plan:
    """Add how long a checkpoint takes to get here, and whether that is within the interval.

    The last transfer is in the hours and the money, as it happens after training.
    """
    minutes, size = recipe.checkpoints.bring_every_minutes, checkpoint_bytes(job)
    saving = size / (1e9 * hardware.host.disk_gb_s * hardware.hosts) / 3600
    if minutes is None:
        return replace(found, reserve_hours=saving)
    assert found.hours is not None
    measured = measured_bytes_s(history, line_of(recipe.cluster))
    slow, fast = hardware.host.ssh_mbit_s
    rate = measured or Range(slow * 1e6 / 8, fast * 1e6 / 8)
    transfer = Range(size / rate.high, size / rate.low).times(1 / 3600)
    hours = found.hours.plus(transfer.high)
    return replace(
        found,
        hours=hours,
        hours_parts={**found.hours_parts, "last transfer": transfer.high},
        fits_time=recipe.budget.hours is None or hours.high <= recipe.budget.hours,
        checkpoint_gb=size / 1e9,
        bring_hours=transfer,
        reserve_hours=saving + transfer.high,
        bring_every_minutes=minutes,
        bring_source="measured" if measured else "assumed, none was brought from there yet",
    )


def _with_cost(found: Plan, recipe: Recipe, hardware: Hardware) -> Plan:
    """Add the rent of all GPUs for the hours, if a price is known."""
    assert hardware.gpu is not None
    assert found.hours is not None
    assert found.stage2_hours is not None
    own = recipe.budget.price_per_gpu_hour
    price = hardware.gpu.usd_hour if own is None else own
    if price is None:
        note = f"no price for {hardware.gpu.name}: set budget.price_per_gpu_hour, or add it to gpus.yaml"
        return replace(found, notes=(*found.notes, note))
    cost = found.hours.times(price * hardware.count)
    return replace(
        found,
        cost=cost,
        price_source="price of the recipe" if own is not None else prices_source(),
        fits_money=recipe.budget.money is None or cost.high <= recipe.budget.money,
        stage2_cost=found.stage2_hours.times(price * hardware.count),
    )


def _with_disk(found: Plan, recipe: Recipe, job: Job, hardware: Hardware) -> Plan:
    """Add the disk space needed on the host, and what is transferred.

    On disk: each training's checkpoints, one more than it keeps, and its model; the base model and the
    published one; the shards and the trainer's decoded rows; a checkpoint on its way here.
    """
    parameters, corpus = job.shape.parameters, found.corpus_tokens or found.tokens

    def disk_gb(training: Training) -> float:
        limit, states = training.save_total_limit, training.optimizer_states
        return training_disk_bytes(job.trained, limit, states) / 1e9

    stage2 = disk_gb(recipe.stage2)
    disk = disk_gb(recipe.training) + stage2
    if recipe.sft.instructions:
        disk += disk_gb(recipe.sft.training)
    if recipe.checkpoints.bring_every_minutes is not None:
        disk += checkpoint_bytes(job) / 1e9  # held while it is copied away
    disk += (4 * parameters + corpus * (BYTES_PER_TOKEN_ON_DISK + 4)) / 1e9
    back = 2 * parameters if recipe.publish.destination == "bring_back" else 0
    moved = (corpus * BYTES_PER_TOKEN_ON_DISK + back) / 1e9
    slow, fast = hardware.host.ssh_mbit_s
    return replace(
        found,
        transfer_gb=moved,
        transfer_hours=Range(moved * 8000 / fast / 3600, moved * 8000 / slow / 3600),
        checkpoint_disk_gb=disk,
        stage2_disk_gb=stage2,
        fits_disk=hardware.disk_free_gb is None or disk <= hardware.disk_free_gb,
    )


def _with_host_memory(found: Plan, job: Job, hardware: Hardware) -> Plan:
    """Add the host memory that an offloaded optimizer needs."""
    found = replace(found, host_seen=hardware.seen)
    if not job.offload:
        return found
    takes, there = host_bytes(job) / 1e9, hardware.host_memory_gb
    found = replace(found, host_memory_gb=takes, host_available_gb=there)
    if host_has_memory(job, hardware):
        return found
    have = "have" if hardware.seen else "usually have"
    problem = f"host memory: offloading takes {takes:,.0f} GB of main memory, the hosts {have} {there:,.0f}"
    return replace(found, problems=(*found.problems, problem))


def _size(shape: Shape) -> str:
    words = f"{shape.parameters / 1e9:.1f} B parameters"
    return words + (f", {shape.active_parameters / 1e9:.1f} B a token" if shape.experts else "")


def _overheads(
    recipe: Recipe,
    job: Job,
    hardware: Hardware,
    rate: float,
    corpus_tokens: int,
    before: Measured | None,
) -> dict[str, float]:
    """Hours apart from the training's steps: start-up, checkpoints, evaluation of model and base; with
    instructions also fine-tuning and its evaluation."""
    disk = 1e9 * hardware.host.disk_gb_s * hardware.hosts
    loading = 2 * job.shape.parameters / disk
    startup = STARTUP_SECONDS + loading
    saves = recipe.training.max_steps // recipe.training.save_steps + 1
    shares = recipe.corpus.validation_share, recipe.corpus.newest_share
    held_out = sum(min(corpus_tokens * s, recipe.corpus.validation_tokens) for s in shares)
    # model and base, each a forward (a third of a step) over windows that overlap by half
    read = 2 * held_out + TOKENS_A_QUESTION * recipe.evaluation.questions
    evaluation = STARTUP_SECONDS + 2 * loading + 2 * read / 3 / rate
    if before is not None:
        startup = before.startup_seconds or startup
        evaluation = before.evaluation_seconds or evaluation
    seconds = {
        "start-up": startup,
        "checkpoints": saves * checkpoint_bytes(job) / disk,
        "evaluation": evaluation,
    }
    if recipe.sft.instructions:
        sft = recipe.sft.training
        rows = sft.max_steps * batch_of(recipe, sft)
        seconds["fine-tuning"] = startup + rows * job.sequence / rate
        seconds["its evaluation"] = STARTUP_SECONDS + loading + _answers(recipe, job, hardware)
    return {name: value / 3600 for name, value in seconds.items()}


def _answers(recipe: Recipe, job: Job, hardware: Hardware) -> float:
    """Seconds to answer the held-out instructions, token by token, 32 answers at a time.

    Each token reads all weights once; a model that does not fit one GPU is also gathered for each token.
    """
    assert hardware.gpu is not None
    weights = 2.0 * job.shape.parameters
    token = job.shape.num_hidden_layers * A_LAYER_SECONDS
    token += weights / (1e12 * hardware.gpu.memory_tb_s)
    ranks = hardware.count
    if weights > 0.8e9 * hardware.gpu.memory_gb:
        token += communication_seconds(replace(job, lora=Lora()), hardware) / 2
    batches = math.ceil(recipe.sft.held_out / GENERATED_TOGETHER / ranks)
    return batches * recipe.sft.max_new_tokens * token


def _rate(
    recipe: Recipe, job: Job, hardware: Hardware, before: Measured | None
) -> tuple[Range, str]:
    """Tokens/s per GPU as a range, and its source."""
    likely = tokens_per_second(job, hardware)
    if before is None:
        return measured_range(job, hardware, likely, measured_rows(), published_rows())
    # for another number of GPUs or micro-batch, scale by the cost model's ratio
    there = hardware.with_count(before.gpus)
    then = job_of(recipe, job.shape, there, before.micro_batch)
    then = replace(then, accumulation=before.accumulation)
    rate = before.tokens_per_s_per_gpu * likely / tokens_per_second(then, there)
    differences = differing(job, hardware, then, there)
    found = widened(rate, OF_LAST_RUN, differences)
    return found, _last(before) + range_words(found, rate, differences)
