"""The result of a plan: its figures, why it does not fit, and both as text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from fastcpt.planning.ranges import Range


class PlanRefused(ValueError):
    """The recipe does not fit; the message says why, and what would."""


class CannotRun(PlanRefused):
    """The recipe cannot run, or cannot be planned, with any hours and money."""


@dataclass(frozen=True)
class Alternative:
    """A changed recipe with its figures; ``changes`` are dotted keys of the recipe."""

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
    """The result of ``plan``. None means unknown; GB are 10^9 bytes; hours and USD are for all GPUs.

    ``fits_time`` and ``fits_money`` compare the *high* end with the recipe's budget, and are true without
    one. ``tokens_per_s`` is for all GPUs together.
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
    memory_setting: str | None = None  # with which it would fit
    tokens_per_s: Range | None = None
    rate_source: str = "unknown"
    hours: Range | None = None
    hours_parts: dict[str, float] = field(default_factory=dict)  # mean values
    training_hours: Range | None = None  # only stage 1's steps
    fits_time: bool = True
    cost: Range | None = None
    fits_money: bool = True
    price_source: str | None = None
    peak_hours: float | None = None
    transfer_gb: float | None = None
    transfer_hours: Range | None = None
    checkpoint_gb: float | None = None  # one checkpoint, if they are copied here
    bring_hours: Range | None = None
    reserve_hours: float | None = (
        None  # to save the last checkpoint, and bring it where that is asked
    )
    bring_every_minutes: float | None = None
    bring_source: str | None = None
    checkpoint_disk_gb: float | None = None
    stage2_disk_gb: float | None = (
        None  # the part of stage 2, which only runs if the gate is missed
    )
    fits_disk: bool = True
    host_memory_gb: float | None = None  # of all hosts, if the optimizer is offloaded
    host_available_gb: float | None = None
    host_seen: bool = False  # by check_cluster; else a typical host is assumed
    stage2_hours: Range | None = None
    stage2_cost: Range | None = None
    stage2_passes: float | None = None
    best_micro_batch: dict[str, Any] | None = None
    alternatives: tuple[Alternative, ...] = ()
    problems: tuple[str, ...] = ()  # why it cannot run or be planned at all
    notes: tuple[str, ...] = ()
    claim: dict[str, str] | None = None

    @property
    def passes(self) -> float | None:
        """How often the training reads its corpus."""
        return self.tokens / self.corpus_tokens if self.corpus_tokens else None

    @property
    def fits_passes(self) -> bool:
        """Whether the corpus is read no more often than ``budget.max_passes`` allows."""
        return self.passes is None or self.max_passes is None or self.passes <= self.max_passes

    @property
    def steps_in_passes(self) -> int | None:
        """The steps of ``max_passes`` over the corpus; None if the corpus is unknown."""
        if not self.corpus_tokens or not self.tokens or self.max_passes is None:
            return None
        return int(self.max_passes * self.corpus_tokens * self.steps // self.tokens)

    @property
    def fits_bringing(self) -> bool:
        """Whether a checkpoint has arrived before the next one is due."""
        if self.bring_hours is None or self.bring_every_minutes is None:
            return True
        return 60 * self.bring_hours.high <= self.bring_every_minutes

    @property
    def fits(self) -> bool:
        fits = self.fits_memory and self.fits_time and self.fits_money and self.fits_disk
        return fits and self.fits_passes and self.fits_bringing and not self.problems

    def to_json(self) -> dict[str, Any]:
        """Every field, ranges as {low, high}, with ``passes``, ``fits`` and ``message``."""
        content = asdict(self)
        content["alternatives"] = [asdict(alternative) for alternative in self.alternatives]
        passes = {"passes": self.passes, "fits_passes": self.fits_passes}
        passes["fits_bringing"] = self.fits_bringing
        return {**content, **passes, "fits": self.fits, "message": self.message()}

    def message(self, command: str = "the same command with") -> str:
        """Why it does not fit and what would, as lines; or one line if it fits.

        ``command``: the command with which the user can take one of the alternatives.
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
                f"memory: {self.memory_gb['total']:.0f} GB per GPU of {self.available_gb:.0f} "
                f"({parts}; micro-batch {self.micro_batch}, checkpointing {self.checkpointing})"
                + (f"; {self.memory_setting} would fit" if self.memory_setting else "")
            )
        if not self.fits_time and self.hours:
            peak = ""
            if self.peak_hours and self.budget_hours and self.peak_hours > self.budget_hours:
                times = self.peak_hours / self.budget_hours
                peak = (
                    f"; at the chips' very peak it would be {self.peak_hours:,.0f} h, "
                    f"{times:.1f} times the budget"
                )
            yield f"time: {self.hours.words()} h, budget {self.budget_hours:g} h{self._given()}{peak}"
        if not self.fits_money and self.cost:
            yield f"money: ${self.cost.words(0)}, budget ${self.budget_money:,.0f}"
        if not self.fits_disk:
            yield (
                f"disk: shards, checkpoints and models take {self.checkpoint_disk_gb:,.0f} GB there "
                f"({self.stage2_disk_gb:,.0f} of them stage 2's, where the gate is missed), more than is "
                "free; free some, or keep fewer checkpoints (save_total_limit of training and stage2)"
            )
        if not self.fits_bringing and self.bring_hours:
            minutes = self.bring_hours.times(60)
            yield (
                f"checkpoints: bringing one ({self.checkpoint_gb:,.1f} GB) takes {minutes.words()} min "
                f"({self.bring_source}), longer than checkpoints.bring_every_minutes "
                f"({self.bring_every_minutes:g}): set it to {math.ceil(minutes.high)} or more"
            )
        if not self.fits_passes and self.passes and self.max_passes and self.corpus_tokens:
            yield (
                f"passes: {self.passes:,.1f} over a corpus of {self.corpus_tokens:,} tokens, at most "
                f"{self.max_passes:g} (budget.max_passes): more tokens are needed, not more steps: "
                f"{math.ceil(self.tokens / self.max_passes):,} for these {self.steps:,} steps; the corpus "
                f"there is allows {self.steps_in_passes:,} (training.max_steps)"
            )

    def _given(self) -> str:
        """The tokens that the budget's hours allow, in words."""
        if not self.tokens_per_s or not self.budget_hours:
            return ""
        other = sum(self.hours_parts.values()) - self.hours_parts["training"]
        seconds = 3600 * (self.budget_hours - other)
        if seconds <= 0:
            return ""
        low, high = (
            seconds * rate / 1e9 for rate in (self.tokens_per_s.low, self.tokens_per_s.high)
        )
        return f", which give {low:.2f} to {high:.2f} B tokens"

    def text(self, command: str = "the same command with") -> str:
        """The whole plan as text; ``command`` as in ``message``."""
        lines = [f"{name:<16}{value}" for name, value in self._rows()]
        return "\n".join([f"plan of '{self.recipe}'", *lines, "", self.message(command)])

    def _rows(self) -> Iterator[tuple[str, str]]:
        """Name and value of each line; a line without a name continues the one above."""
        what = f"{self.model}, {self.method}, {self.precision}, sequences of {self.sequence}"
        yield "model", what
        yield "cluster", self.cluster
        yield "tokens", f"{self.tokens:,} in {self.steps:,} steps{self._passes_words()}"
        if self.flops is not None and self.peak_hours is not None:
            yield "operations", f"{self.flops:.2g} FLOP; {self.peak_hours:,.1f} h at the peak"
        yield from self._memory_rows()
        rate = f"{self.tokens_per_s.words(0)} tokens/s" if self.tokens_per_s else "unknown"
        yield "rate", f"{rate} ({self.rate_source})"
        yield from self._time_rows()
        yield from self._disk_rows()
        if self.claim:
            yield "published claim", f"{self.claim['hours']} h, {self.claim['cost']}"
        for note in self.notes:
            yield "note", note
        if self.fits_passes and self.steps_in_passes == self.steps:
            yield (
                "note",
                f"no more steps than these are within {self.max_passes:g} passes over the corpus "
                "(budget.max_passes): to train longer, more tokens are needed, not more steps",
            )

    def _passes_words(self) -> str:
        if not self.passes or not self.max_passes:
            return ""
        verdict = "" if self.fits_passes else ": DOES NOT FIT"
        return (
            f", {self.passes:,.1f} passes over {self.corpus_tokens:,} "
            f"(at most {self.max_passes:g}){verdict}"
        )

    def _memory_rows(self) -> Iterator[tuple[str, str]]:
        if self.memory_gb is not None:
            verdict = "fits" if self.fits_memory else "DOES NOT FIT"
            total = self.memory_gb["total"]
            yield "memory per GPU", f"{total:.1f} of {self.available_gb:.1f} GB: {verdict}"
            yield "", ", ".join(f"{k} {v:.1f}" for k, v in self.memory_gb.items() if k != "total")
            batch = f"{self.micro_batch} x {self.accumulation}"
            yield "micro-batch", f"{batch}, checkpointing {self.checkpointing}"
        if self.best_micro_batch:
            yield (
                "faster" if self.fits_memory else "that fits",
                "micro-batch {micro_batch} x {accumulation}, checkpointing "
                "{checkpointing}: {gain:+.0%} tokens/s".format(**self.best_micro_batch),
            )

    def _time_rows(self) -> Iterator[tuple[str, str]]:
        """Hours and money."""
        if self.hours:
            budget = _against(self.budget_hours, self.fits_time, " h")
            yield "time", f"{self.hours.words()} h{budget}"
        if self.cost:
            budget = _against(self.budget_money, self.fits_money, " USD")
            yield "cost", f"${self.cost.words(0)}{budget}"
            yield "", self.price_source or ""
        if self.stage2_hours:
            cost = f", ${self.stage2_cost.words(0)}" if self.stage2_cost else ""
            if self.stage2_passes:
                cost += f", {self.stage2_passes:,.1f} passes"
            yield "stage 2", f"{self.stage2_hours.words()} h more{cost}, where the gate is missed"

    def _disk_rows(self) -> Iterator[tuple[str, str]]:
        """Rows about transfers, disk and host memory."""
        if self.transfer_gb is not None and self.transfer_hours is not None:
            yield "transfer", f"{self.transfer_gb:,.1f} GB, {self.transfer_hours.words(2)} h"
        if self.checkpoint_gb is not None and self.bring_hours is not None:
            verdict = "fits" if self.fits_bringing else "DOES NOT FIT"
            yield (
                "checkpoints",
                f"{self.checkpoint_gb:,.1f} GB each, {self.bring_hours.times(60).words()} min to here "
                f"({self.bring_source}); every {self.bring_every_minutes:g} min: {verdict}. One "
                "transfer, the last, is in time and cost",
            )
        if self.checkpoint_disk_gb is not None:
            stage2 = (
                f", {self.stage2_disk_gb:,.0f} of them stage 2's" if self.stage2_disk_gb else ""
            )
            free = "" if self.fits_disk else ": NOT FREE"
            yield "disk there", f"{self.checkpoint_disk_gb:,.0f} GB{stage2}{free}"
        if self.host_memory_gb is not None:
            there = "the hosts'" if self.host_seen else "what such hosts usually have:"
            yield (
                "host memory",
                f"{self.host_memory_gb:,.0f} GB for the offloaded optimizer, of {there} "
                f"{self.host_available_gb:,.0f} GB",
            )


def _against(budget: float | None, fits: bool, unit: str) -> str:
    if budget is None:
        return ""
    return f"; budget {budget:g}{unit}: {'fits' if fits else 'DOES NOT FIT'}"


def _alternative_words(choice: Alternative) -> str:
    cost = f", ${choice.cost.words(0)}" if choice.cost else ""
    verdict = "" if choice.fits else " (does not fit either)"
    return (
        f"{choice.what}, on {choice.cluster}: {choice.tokens / 1e9:.3g} B tokens, {choice.hours.words()} h{cost}, "
        f"{choice.memory_gb:.0f} GB per GPU{verdict}"
    )
