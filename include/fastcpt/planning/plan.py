"""What a recipe will take on a cluster: time, memory, money; or why it cannot be, and what can.

    plan(recipe, tokens, cluster, history) -> Plan

``tokens`` are the corpus's: counted by the build, or estimated from the documents' bytes
(``estimated_tokens``). ``cluster`` is what ``check_cluster`` found, or a name such as ``4xB200``.
A rate comes from the newest run of the same model, method, precision, sequence length and GPU;
without one from the cost model (``costs``), as a range: narrow where this project measured that
method on that chip, up to the best published rate elsewhere. ``docs/planning.md`` has the figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fastcpt.families import ADAPTABLE, cannot_fuse, refusal
from fastcpt.files import read_json
from fastcpt.planning.costs import (
    RUNTIME_GB,
    USABLE,
    Attention,
    Job,
    as_the_trainer_runs,
    checkpoint_bytes,
    communication_seconds,
    host_bytes,
    memory_parts,
    model_flops,
    tokens_per_second,
)
from fastcpt.planning.hardware import Hardware, hardware_of, prices_source
from fastcpt.planning.history import Measured, last_run
from fastcpt.planning.measured import measured_rows, published_rows
from fastcpt.planning.placement import SECTIONS, batch_of, batch_problem, placement
from fastcpt.planning.ranges import (
    OF_LAST_RUN,
    Range,
    differing,
    measured_range,
    range_words,
    widened,
)
from fastcpt.planning.shapes import KNOWN, LLAMAS, Shape, known_name, shape_of, unknown_model
from fastcpt.recipe import CONFIGS, Lora, Recipe, Training

OFFLOAD_FILE = "ds_config_zero3_offload.json"
CHARACTERS_PER_TOKEN = 4.4  # running legal text, Llama's and dolma2's vocabularies
BYTES_PER_TOKEN_ON_DISK = 1.1  # of the shards: zstd over int32 ids
STARTUP_SECONDS = 120.0  # packages imported, kernels built, NCCL up; without loading weights
A_LAYER_SECONDS = 1e-3  # of a generated token: transformers' launches, whatever the GPU; assumed
GENERATED_TOGETHER = 32  # answers (fastcpt.training.generation)
NEAR_BEST = 0.01  # a smaller micro-batch is taken where it costs no more than this
WORTH_IT = 0.03  # less than this is no reason to change a recipe
MORE_GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


Keep = Literal["model", "method"]


class PlanRefused(ValueError):
    """The recipe does not fit; the message says why, and what would."""


class CannotRun(PlanRefused):
    """The recipe cannot run at all, or not be planned, whatever hours and money there are."""


@dataclass(frozen=True)
class Alternative:
    """A changed recipe and what it takes; ``changes`` are dotted keys of the recipe."""

    what: str
    changes: dict[str, Any]
    tokens: int
    cluster: str
    hours: Range
    cost: Range | None
    memory_gb: float
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What ``plan`` found. None stands for unknown; GB are 10^9 bytes, hours and USD of all GPUs.

    ``fits_time`` and ``fits_money`` compare the *high* end with the recipe's budget, and are true
    without one; ``tokens_per_s`` is that of all GPUs together.
    """

    recipe: str
    model: str
    method: str
    precision: str
    cluster: str
    gpus: int
    sequence: int
    steps: int
    tokens: int
    corpus_tokens: int | None
    budget_hours: float | None = None
    budget_money: float | None = None
    max_passes: float | None = None
    flops: float | None = None
    memory_gb: dict[str, float] | None = None
    available_gb: float | None = None
    micro_batch: int | None = None
    accumulation: int | None = None
    checkpointing: str | None = None
    fits_memory: bool = True
    tokens_per_s: Range | None = None
    rate_source: str = "unknown"
    hours: Range | None = None
    hours_parts: dict[str, float] = field(default_factory=dict)  # their middles
    training_hours: Range | None = None  # of them, stage 1's steps
    fits_time: bool = True
    cost: Range | None = None
    fits_money: bool = True
    price_source: str | None = None
    peak_hours: float | None = None
    transfer_gb: float | None = None
    transfer_hours: Range | None = None
    checkpoint_disk_gb: float | None = None
    stage2_disk_gb: float | None = None  # of it, stage 2's, which only a missed gate starts
    fits_disk: bool = True
    host_memory_gb: float | None = None  # of all hosts, where the optimizer is offloaded
    host_available_gb: float | None = None
    host_seen: bool = False  # by check_cluster; else a usual host's
    stage2_hours: Range | None = None
    stage2_cost: Range | None = None
    stage2_passes: float | None = None
    best_micro_batch: dict[str, Any] | None = None
    alternatives: tuple[Alternative, ...] = ()
    problems: tuple[str, ...] = ()  # what keeps it from running, or from being planned, at all
    notes: tuple[str, ...] = ()
    claim: dict[str, str] | None = None

    @property
    def passes(self) -> float | None:
        """How often the training sees its corpus."""
        return self.tokens / self.corpus_tokens if self.corpus_tokens else None

    @property
    def fits_passes(self) -> bool:
        """Whether the corpus is seen no more often than ``budget.max_passes`` allows."""
        return self.passes is None or self.max_passes is None or self.passes <= self.max_passes

    @property
    def steps_in_passes(self) -> int | None:
        """The steps that ``max_passes`` over the corpus are; None where the corpus is not known."""
        if not self.corpus_tokens or not self.tokens or self.max_passes is None:
            return None
        return int(self.max_passes * self.corpus_tokens * self.steps // self.tokens)

    @property
    def fits(self) -> bool:
        fits = self.fits_memory and self.fits_time and self.fits_money and self.fits_disk
        return fits and self.fits_passes and not self.problems

    def to_json(self) -> dict[str, Any]:
        """Every field, ranges as {low, high}, with ``passes``, ``fits`` and ``message``."""
        content = asdict(self)
        content["alternatives"] = [asdict(alternative) for alternative in self.alternatives]
        passes = {"passes": self.passes, "fits_passes": self.fits_passes}
        return {**content, **passes, "fits": self.fits, "message": self.message()}

    def message(self, command: str = "the same command with") -> str:
        """Why it does not fit and what would, in lines; that it fits, in one.

        ``command``: what the user types to list the alternatives again, to take one of them.
        """
        what = f"'{self.recipe}' ({self.model}, {self.method}, {self.precision}) on {self.cluster}"
        if self.fits:
            return f"{what}: fits."
        verdict = "cannot run" if self.problems else "does not fit"
        lines = [f"{what} {verdict}:", *(f"  - {reason}" for reason in self._reasons())]
        if self.alternatives:
            lines.append("What would fit, best first:" if self.alternatives[0].fits else "Nearest:")
            lines += [
                f"  {number}. {_alternative_words(choice)}"
                for number, choice in enumerate(self.alternatives, 1)
            ]
            lines.append(f"To have one as a recipe: {command} --take NUMBER --out FILE.yaml")
        return "\n".join(lines)

    def _reasons(self) -> Iterator[str]:
        yield from self.problems
        if not self.fits_memory and self.memory_gb and self.available_gb:
            largest = sorted(self.memory_gb.items(), key=lambda part: -part[1])
            parts = ", ".join(f"{name} {size:.0f}" for name, size in largest if name != "total")
            yield (
                f"memory: {self.memory_gb['total']:.0f} GB a GPU of {self.available_gb:.0f} "
                f"({parts}; micro-batch {self.micro_batch}, checkpointing {self.checkpointing})"
            )
        if not self.fits_time and self.hours:
            peak = ""
            if self.peak_hours and self.budget_hours and self.peak_hours > self.budget_hours:
                times = self.peak_hours / self.budget_hours
                peak = (
                    f"; at the chips' very peak it would be {self.peak_hours:,.0f} h, "
                    f"{times:.1f} times the budget"
                )
            yield f"time: {self.hours.words()} h, budget {self.budget_hours:g} h{peak}"
        if not self.fits_money and self.cost:
            yield f"money: ${self.cost.words(0)}, budget ${self.budget_money:,.0f}"
        if not self.fits_disk:
            yield (
                f"disk: shards, checkpoints and models take {self.checkpoint_disk_gb:,.0f} GB there "
                f"({self.stage2_disk_gb:,.0f} of them stage 2's, where the gate is missed), more than is "
                "free; free some, or keep fewer checkpoints (save_total_limit of training and stage2)"
            )
        if not self.fits_passes and self.passes and self.max_passes and self.corpus_tokens:
            yield (
                f"passes: {self.passes:,.1f} over a corpus of {self.corpus_tokens:,} tokens, at most "
                f"{self.max_passes:g} (budget.max_passes): more tokens are needed, not more steps: "
                f"{math.ceil(self.tokens / self.max_passes):,} for these {self.steps:,} steps; the corpus "
                f"there is allows {self.steps_in_passes:,} (training.max_steps)"
            )

    def text(self, command: str = "the same command with") -> str:
        """The whole plan, to read; ``command`` as in ``message``."""
        passes = ""
        if self.passes and self.max_passes:
            verdict = "" if self.fits_passes else ": DOES NOT FIT"
            passes = (
                f", {self.passes:,.1f} passes over {self.corpus_tokens:,} "
                f"(at most {self.max_passes:g}){verdict}"
            )
        rows = [
            (
                "model",
                f"{self.model}, {self.method}, {self.precision}, sequences of {self.sequence}",
            ),
            ("cluster", self.cluster),
            ("tokens", f"{self.tokens:,} in {self.steps:,} steps{passes}"),
        ]
        if self.flops is not None and self.peak_hours is not None:
            rows.append(
                ("operations", f"{self.flops:.2g} FLOP; {self.peak_hours:,.1f} h at the peak")
            )
        if self.memory_gb is not None:
            parts = ", ".join(f"{k} {v:.1f}" for k, v in self.memory_gb.items() if k != "total")
            verdict = "fits" if self.fits_memory else "DOES NOT FIT"
            rows += [
                (
                    "memory a GPU",
                    f"{self.memory_gb['total']:.1f} of {self.available_gb:.1f} GB: {verdict}",
                ),
                ("", parts),
                (
                    "micro-batch",
                    f"{self.micro_batch} x {self.accumulation}, checkpointing {self.checkpointing}",
                ),
            ]
        if self.best_micro_batch:
            rows.append(
                (
                    "faster" if self.fits_memory else "that fits",
                    "micro-batch {micro_batch} x {accumulation}, checkpointing "
                    "{checkpointing}: {gain:+.0%} tokens/s".format(**self.best_micro_batch),
                )
            )
        rate = f"{self.tokens_per_s.words(0)} tokens/s" if self.tokens_per_s else "unknown"
        rows += [("rate", f"{rate} ({self.rate_source})")]
        if self.hours:
            rows.append(
                (
                    "time",
                    f"{self.hours.words()} h{_against(self.budget_hours, self.fits_time, ' h')}",
                )
            )
        if self.cost:
            rows.append(
                (
                    "cost",
                    f"${self.cost.words(0)}{_against(self.budget_money, self.fits_money, ' USD')}",
                )
            )
            rows.append(("", self.price_source or ""))
        if self.stage2_hours:
            cost = f", ${self.stage2_cost.words(0)}" if self.stage2_cost else ""
            if self.stage2_passes:
                cost += f", {self.stage2_passes:,.1f} passes"
            rows.append(
                ("stage 2", f"{self.stage2_hours.words()} h more{cost}, where the gate is missed")
            )
        if self.transfer_gb is not None and self.transfer_hours is not None:
            rows.append(
                ("transfer", f"{self.transfer_gb:,.1f} GB, {self.transfer_hours.words(2)} h")
            )
        if self.checkpoint_disk_gb is not None:
            stage2 = (
                f", {self.stage2_disk_gb:,.0f} of them stage 2's" if self.stage2_disk_gb else ""
            )
            free = "" if self.fits_disk else ": NOT FREE"
            rows.append(("disk there", f"{self.checkpoint_disk_gb:,.0f} GB{stage2}{free}"))
        if self.host_memory_gb is not None:
            there = "the hosts'" if self.host_seen else "what such hosts usually have:"
            rows.append(
                (
                    "host memory",
                    f"{self.host_memory_gb:,.0f} GB for the offloaded optimizer, of {there} "
                    f"{self.host_available_gb:,.0f} GB",
                )
            )
        if self.claim:
            rows.append(("published claim", f"{self.claim['hours']} h, {self.claim['cost']}"))
        rows += [("note", note) for note in self.notes]
        if self.fits_passes and self.steps_in_passes == self.steps:
            rows.append(
                (
                    "note",
                    f"no more steps than these are within {self.max_passes:g} passes over the corpus "
                    "(budget.max_passes): to train longer, more tokens are needed, not more steps",
                )
            )
        lines = [f"{name:<16}{value}" for name, value in rows]
        return "\n".join([f"plan of '{self.recipe}'", *lines, "", self.message(command)])


def _against(budget: float | None, fits: bool, unit: str) -> str:
    if budget is None:
        return ""
    return f"; budget {budget:g}{unit}: {'fits' if fits else 'DOES NOT FIT'}"


def _alternative_words(choice: Alternative) -> str:
    cost = f", ${choice.cost.words(0)}" if choice.cost else ""
    verdict = "" if choice.fits else " (does not fit either)"
    return (
        f"{choice.what}, on {choice.cluster}: {choice.tokens / 1e9:.3g} B tokens, {choice.hours.words()} h{cost}, "
        f"{choice.memory_gb:.0f} GB a GPU{verdict}"
    )


def estimated_tokens(document_bytes: int, recipe: Recipe) -> int:
    """Corpus tokens of documents of so many (uncompressed) bytes, before any is read.

    4.4 characters a token, then the recipe's selection. Thresholds, duplicates and held-out acts
    are not known yet, so this is what there is at most.
    """
    return selected_tokens(round(document_bytes / CHARACTERS_PER_TOKEN), recipe)


def selected_tokens(tokens: int, recipe: Recipe) -> int:
    """What a recipe takes of so many tokens: its share, and at most its budget of tokens."""
    share = round(tokens * (recipe.selection.top_share or 1.0))
    return min(share, recipe.selection.target_tokens or share)


def plan(
    recipe: Recipe,
    tokens: int | None = None,
    cluster: Mapping[str, Any] | str | None = None,
    history: Path | None = None,
    keep: Iterable[Keep] = (),
) -> Plan:
    """Plan ``recipe``'s continued pre-training.

    ``tokens``: of the corpus; None takes the recipe's ``target_tokens``. ``cluster``: facts of
    ``check_cluster``, a name (``4xB200``), or None for the recipe's own. ``history``: the file that
    ``record_run`` writes. ``keep``: what the alternatives may not change. Raises ``ValueError`` kinds for a cluster or model that cannot be read;
    that a recipe does not fit is an answer, not an error (``require_fit``).
    """
    hardware = hardware_of(recipe.cluster, cluster)
    found = plan_on(recipe, tokens, hardware, history)
    if found.fits or hardware.gpu is None:
        return found
    return replace(found, alternatives=tuple(alternatives(recipe, tokens, hardware, history, keep)))


def require_fit(plan: Plan, command: str = "the same command with") -> None:
    """``PlanRefused`` with the plan's message unless it fits; ``CannotRun`` where it never would."""
    if not plan.fits:
        raise (CannotRun if plan.problems else PlanRefused)(plan.message(command))


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
        assert name is not None  # a shape of one's own is known
        return replace(plain, problems=(unknown_model(name),))
    plain = replace(plain, flops=model_flops(shape, sequence, recipe.lora) * plain.tokens)
    refused = refused_by_trainer(recipe, shape, hardware, fp8=False)
    if refused is not None:
        return replace(plain, problems=(f"model: {_size(shape)}; {refused}",))
    if training.use_fp8:
        refused = refused_by_trainer(recipe, shape, hardware, fp8=True)
        if hardware.gpu is None or hardware.gpu.fp8 is None:
            refused = f"{hardware.gpu.name if hardware.gpu else 'a CPU'} has no FP8"
        if refused is not None:
            # planned in bf16, which is what would run there
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
    return _gpu_plan(plain, recipe, job, hardware, before)


def _cpu_plan(plain: Plan, before: Measured | None) -> Plan:
    """On CPUs nothing is promised but what the last run of the same recipe showed."""
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
        hours_parts={"training": (train.low + train.high) / 2, **parts},
        training_hours=train,
        rate_source=_last(before),
        notes=("fine-tuning is not in these hours",),
    )


def _last(before: Measured) -> str:
    there = f"{before.gpus}x{before.gpu}"
    return f"last run here, {before.run} of {before.time[:10]} on {there}"


def _gpu_plan(
    plain: Plan, recipe: Recipe, job: Job, hardware: Hardware, before: Measured | None
) -> Plan:
    gpu, training, shape = hardware.gpu, recipe.training, job.shape
    assert gpu is not None
    memory = memory_gb(job, before)
    available = USABLE * gpu.memory_gb
    rate, source = _rate(recipe, job, hardware, before)
    everyone = rate.times(hardware.count)
    notes: list[str] = []

    tokens = plain.tokens
    budget = training.time_budget_hours
    middle = (everyone.low + everyone.high) / 2
    parts = _overheads(recipe, job, hardware, middle, plain.corpus_tokens or tokens, before)
    train = Range(tokens / everyone.high, tokens / everyone.low).times(1 / 3600)
    if budget:
        # what the trainer leaves for its steps: start, saving and evaluation are in its budget too
        own = ("start-up", "checkpoints", "evaluation")
        room = max(0.0, budget - sum(parts[name] for name in own))
        if tokens > middle * 3600 * room:
            tokens = int(middle * 3600 * room)
            notes.append(
                f"the trainer ends so that the evaluation fits {budget:g} h (time_budget_hours), at "
                "about these tokens"
            )
        train = Range(min(train.low, room), min(train.high, room))
    hours = train.plus(sum(parts.values()))

    price = recipe.budget.price_per_gpu_hour
    price_source = "price of the recipe" if price is not None else prices_source()
    price = gpu.usd_hour if price is None else price
    cost = None if price is None else hours.times(price * hardware.count)
    if price is None:
        notes.append(
            f"no price for {gpu.name}: set budget.price_per_gpu_hour, or add it to gpus.yaml"
        )

    corpus = plain.corpus_tokens or tokens
    # each training's checkpoints, one more than are kept, and its model; the base model and what is
    # published; the shards, and their rows as the trainer reads them
    stage2_disk = training_disk(recipe.stage2, job) / 1e9
    disk = training_disk(training, job) / 1e9 + stage2_disk
    if recipe.sft.instructions:
        disk += training_disk(recipe.sft.training, job) / 1e9
    disk += (4 * shape.parameters + corpus * (BYTES_PER_TOKEN_ON_DISK + 4)) / 1e9
    problems = plain.problems
    if not host_has_memory(job, hardware):
        problems += (
            f"host memory: offloading takes {host_bytes(job) / 1e9:,.0f} GB of main memory, "
            f"the hosts {'have' if hardware.seen else 'usually have'} {hardware.host_memory_gb:,.0f}",
        )
    back = 2 * shape.parameters if recipe.publish.destination == "bring_back" else 0
    moved = (corpus * BYTES_PER_TOKEN_ON_DISK + back) / 1e9
    slow, fast = hardware.host.ssh_mbit_s
    peak = gpu.peak(job.fp8) * hardware.count
    more = recipe.stage2.max_steps * batch_of(recipe, recipe.stage2) * job.sequence
    stage2 = Range(more / everyone.high, more / everyone.low).times(1 / 3600)
    best = best_job(recipe, shape, hardware)
    gain = tokens_per_second(best, hardware) / tokens_per_second(job, hardware) - 1 if best else 0.0
    return replace(
        plain,
        tokens=tokens,
        flops=model_flops(shape, job.sequence, recipe.lora) * tokens,
        memory_gb=memory,
        available_gb=available,
        micro_batch=job.micro_batch,
        accumulation=job.accumulation,
        checkpointing=job.recomputation,
        fits_memory=memory["total"] <= available,
        problems=problems,
        tokens_per_s=everyone,
        rate_source=source,
        hours=hours,
        hours_parts={"training": (train.low + train.high) / 2, **parts},
        training_hours=train,
        fits_time=recipe.budget.hours is None or hours.high <= recipe.budget.hours,
        cost=cost,
        price_source=price_source if cost else None,
        fits_money=recipe.budget.money is None or cost is None or cost.high <= recipe.budget.money,
        peak_hours=tokens * model_flops(shape, job.sequence, recipe.lora) / peak / 3600,
        transfer_gb=moved,
        transfer_hours=Range(moved * 8000 / fast / 3600, moved * 8000 / slow / 3600),
        checkpoint_disk_gb=disk,
        stage2_disk_gb=stage2_disk,
        host_memory_gb=host_bytes(job) / 1e9 if job.offload else None,
        host_available_gb=hardware.host_memory_gb if job.offload else None,
        host_seen=hardware.seen,
        fits_disk=hardware.disk_free_gb is None or disk <= hardware.disk_free_gb,
        stage2_hours=stage2,
        stage2_passes=more / plain.corpus_tokens if plain.corpus_tokens else None,
        stage2_cost=None if price is None else stage2.times(price * hardware.count),
        best_micro_batch=None
        if best is None or (gain < WORTH_IT and memory["total"] <= available)
        else {
            "micro_batch": best.micro_batch,
            "accumulation": best.accumulation,
            "checkpointing": best.recomputation,
            "gain": gain,
        },
        notes=tuple(notes),
    )


# The job that a recipe means


def refused_by_trainer(recipe: Recipe, shape: Shape, hardware: Hardware, fp8: bool) -> str | None:
    """The trainer's own refusal, for hosts with the GPU packages; None where it trains the model."""
    attention = recipe.model.attn_implementation
    if attention == "auto":
        attention = "sdpa" if hardware.gpu is None else "flash_attention_2"
    return refusal(shape.configuration, recipe, fp8, attention)


def fuses(recipe: Recipe, shape: Shape) -> bool:
    """Whether the trainer runs the model in its fused blocks, on a host with the GPU packages."""
    targets = recipe.lora.target_modules if recipe.lora else []
    model = recipe.model
    why = cannot_fuse(shape.configuration, model.dtype, model.attn_implementation, targets)
    return why is None


def _size(shape: Shape) -> str:
    words = f"{shape.parameters / 1e9:.1f} B parameters"
    return words + (f", {shape.active_parameters / 1e9:.1f} B a token" if shape.experts else "")


def offloads(recipe: Recipe) -> bool:
    """Whether the recipe's DeepSpeed file keeps the optimizer in the hosts' memory."""
    file = CONFIGS / recipe.training.deepspeed
    return file.is_file() and "offload_optimizer" in read_json(file).get("zero_optimization", {})


def job_of(recipe: Recipe, shape: Shape, hardware: Hardware, micro: int) -> Job:
    """One step on one GPU; recomputation as the recipe says, or as the trainer decides by itself."""
    assert hardware.gpu is not None
    wanted, fused = recipe.training.gradient_checkpointing, fuses(recipe, shape)
    fastest: Attention = "cudnn" if fused else "flash"
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
        offload=offloads(recipe),
        attention=attention.get(recipe.model.attn_implementation, "sdpa"),
        kernels="fused" if fused else "liger" if shape.family.liger else "plain",
    )
    if isinstance(wanted, bool):
        return replace(job, checkpointing="full" if wanted else "none")
    if fused:
        return as_the_trainer_runs(job, 1e9 * hardware.gpu.memory_gb)
    return job if fits_memory(job, hardware) else replace(job, checkpointing="full")


def fits_memory(job: Job, hardware: Hardware) -> bool:
    """Whether a GPU holds the job."""
    assert hardware.gpu is not None
    return memory_gb(job)["total"] <= USABLE * hardware.gpu.memory_gb


def host_has_memory(job: Job, hardware: Hardware) -> bool:
    """Whether the hosts hold what the job offloads, beside a tenth for the rest."""
    return host_bytes(job) <= 0.9e9 * hardware.host_memory_gb


def best_job(recipe: Recipe, shape: Shape, hardware: Hardware) -> Job | None:
    """The fastest micro-batch that fits, at the same global batch; the trainer's own recomputation."""
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
    """GB a GPU by part, with the runtime's own and the total; a run's own peak where it was alike."""
    parts = {name: size / 1e9 for name, size in memory_parts(job).items() if size}
    alike = before is not None and (
        (before.gpus, before.micro_batch) == (job.ranks, job.micro_batch)
        and before.checkpointing in (None, job.recomputation)
    )
    if alike and before is not None and before.peak_memory_gb:
        parts["measured beyond these"] = before.peak_memory_gb - sum(parts.values())
    parts["runtime"] = RUNTIME_GB
    return {**parts, "total": sum(parts.values())}


def training_disk(training: Training, job: Job) -> float:
    """Bytes that a training leaves there: its checkpoints, one more than are kept, and its model."""
    return checkpoint_bytes(job) * (training.save_total_limit + 1) + 2 * job.trained


def _overheads(
    recipe: Recipe,
    job: Job,
    hardware: Hardware,
    rate: float,
    corpus_tokens: int,
    before: Measured | None,
) -> dict[str, float]:
    """Hours beside the training's steps: start-up, checkpoints, evaluation of model and base; with
    instructions, fine-tuning on them and its evaluation."""
    disk = 1e9 * hardware.host.disk_gb_s * hardware.hosts
    loading = 2 * job.shape.parameters / disk
    startup = STARTUP_SECONDS + loading
    saves = recipe.training.max_steps // recipe.training.save_steps + 1
    shares = recipe.corpus.validation_share, recipe.corpus.newest_share
    held_out = sum(min(corpus_tokens * s, recipe.corpus.validation_tokens) for s in shares)
    # model and base, each a forward (a third of a step) over windows that overlap by half
    evaluation = STARTUP_SECONDS + 2 * loading + 2 * 2 * held_out / 3 / rate
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
    """Seconds to answer the held-out instructions: a token after another, for 32 answers at a time.

    Each token reads all weights once; those of a model that no GPU holds alone are gathered for it.
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


# Rates


def _rate(
    recipe: Recipe, job: Job, hardware: Hardware, before: Measured | None
) -> tuple[Range, str]:
    """Tokens/s a GPU as a range, and where it comes from."""
    likely = tokens_per_second(job, hardware)
    if before is None:
        return measured_range(job, hardware, likely, measured_rows(), published_rows())
    # on another number of GPUs or micro-batch: by the cost model's ratio
    there = hardware.with_count(before.gpus)
    then = job_of(recipe, job.shape, there, before.micro_batch)
    then = replace(then, accumulation=before.accumulation)
    rate = before.tokens_per_s_per_gpu * likely / tokens_per_second(then, there)
    differences = differing(job, hardware, then, there)
    found = widened(rate, OF_LAST_RUN, differences)
    return found, _last(before) + range_words(found, rate, differences)


# What else would do


def alternatives(
    recipe: Recipe,
    tokens: int | None,
    hardware: Hardware,
    history: Path | None = None,
    keep: Iterable[Keep] = (),
) -> list[Alternative]:
    """Changed recipes with their own figures, best first.

    What fits comes first; of that, what keeps a twentieth of the tokens; of that, what gives least
    up: another micro-batch, FP8, more GPUs, offload, a smaller model, LoRA. Each is cut to
    the tokens that the budgets allow where it is too much. ``keep`` leaves out what changes the model,
    or full training to LoRA.
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
    """Words, dotted keys, and GPUs of what could be changed, the least loss first."""
    count, shape, gpu = hardware.count, shape_of(recipe), hardware.gpu
    assert gpu is not None
    if shape is None:
        return
    if refused_by_trainer(recipe, shape, hardware, fp8=False) is not None:
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
    yield from more_gpus
    if recipe.lora is None and best is None:  # where memory suffices it would only be slower
        offload = {**needed, **everywhere({"deepspeed": OFFLOAD_FILE})}
        offloaded = _tuned(recipe, offload, hardware)
        if offloaded is not None:
            yield "optimizer offloaded to the hosts", offloaded, count
    yield from _other_models(recipe, hardware, shape, needed, keep)
    adaptable = set(shape.family.linears) >= ADAPTABLE
    if recipe.lora is None and "method" not in keep and adaptable:
        rate = min(1e-3, 10 * recipe.training.learning_rate)  # LoRA learns at about ten times
        lora = {**needed, "lora": Lora().model_dump(), "training.learning_rate": rate}
        tuned = _tuned(recipe, lora, hardware)
        if tuned is not None:
            yield "LoRA on q, k, v, o", tuned, count


def _other_models(
    recipe: Recipe, hardware: Hardware, shape: Shape, needed: dict[str, Any], keep: set[Keep]
) -> Iterator[tuple[str, dict[str, Any], int]]:
    """The next two smaller Llamas in place of the model."""
    smaller = [name for name in LLAMAS if KNOWN[name].parameters < 0.9 * shape.parameters]
    for name in () if "model" in keep else reversed(smaller[-2:]):
        model = {**needed, "model.name_or_path": f"meta-llama/{name}", "model.config": None}
        tuned = _tuned(recipe, model, hardware)
        if tuned is not None:
            yield f"{name} in place of {_called(recipe, shape)}", tuned, hardware.count


def _called(recipe: Recipe, shape: Shape) -> str:
    name = recipe.model.name_or_path
    return (known_name(name) if name else None) or f"{shape.parameters / 1e9:.0f}B"


def everywhere(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Changes of the same settings in all three trainings."""
    return {f"{section}.{key}": value for section in SECTIONS for key, value in settings.items()}


def job_changes(recipe: Recipe, job: Job, hardware: Hardware) -> dict[str, Any]:
    """What makes ``recipe`` run as ``job`` on ``hardware``, each training's batch unchanged.

    The later trainings keep their own batches too, with micro-batches that are no larger.
    """
    automatic = everywhere({"gradient_checkpointing": "auto"})
    return {**placement(recipe, hardware, job.micro_batch), **automatic}


def _tuned(recipe: Recipe, changes: dict[str, Any], hardware: Hardware) -> dict[str, Any] | None:
    """The changes with the fastest micro-batch that fits; None where none does."""
    other = changed(recipe, changes)
    shape = shape_of(other)
    job = best_job(other, shape, hardware) if shape else None
    if job is None or not host_has_memory(job, hardware):
        return None
    return {**changes, **job_changes(other, job, hardware)}


def _enough_gpus(
    recipe: Recipe, hardware: Hardware, shape: Shape, precision: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any], int]]:
    """The fewest GPUs of the same kind that fit memory and hours, the tokens kept; where none fits
    the hours, the fewest that fit memory."""
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
    """The steps that hours, money and passes allow, as changes; None where not even one is allowed, or
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
