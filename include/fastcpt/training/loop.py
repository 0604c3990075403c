"""The steps of a training.

A step (``Loop.one_step``):

1. every rank takes its micro-batches of the step's samples (``data.Order``);
2. the loss is divided by the number of targets of the *whole* step, so that every token has the same
   weight and the curve does not depend on the number of ranks;
3. one small all-reduce sums the loss and shares rank 0's clock and any rank's SIGTERM;
4. ``Guard`` checks loss and gradient norm before weights and moments change.

The learning rate depends only on progress: the larger of the share of steps done and, with
``time_budget_hours``, the share of time used. A resumed training continues both.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from fastcpt.progress import Progress
from fastcpt.recipe_sections import Training
from fastcpt.step_memory import MODEL_BYTES, checkpoint_bytes_per_weight, training_disk_bytes
from fastcpt.training import checkpoints
from fastcpt.training.checkpoint_writer import CheckpointWriter
from fastcpt.training.data import Order, Reader
from fastcpt.training.engine import begin_step, parameters
from fastcpt.training.exits import Stopped, TrainingError
from fastcpt.training.guard import Guard
from fastcpt.training.metrics import MetricsLog, Work, hours_minutes_seconds, peak_memory_gb
from fastcpt.training.ranks import StopSignal, say_once
from fastcpt.training.schedule import Clock, Phase, learning_rate

LAUNCHER = 5.0  # seconds of the launcher's imports, before this process began
SAVING = 1e9  # bytes/s assumed for the first checkpoint; later ones are measured


class Loop:
    """The steps of one training, and their state for checkpoints."""

    def __init__(
        self,
        training: Training,
        phases: list[Phase],
        engine: Any,
        output: Path,
        accumulation: int,
        device: torch.device,
        stop: StopSignal,
        price: float | None = None,
        ends: float | None = None,
    ) -> None:
        """Resumes from the newest checkpoint. ``price``: USD per GPU hour; ``ends``: as in ``Clock``."""
        self.price, self.work = price, Work(engine.module, device)
        self.training, self.phases, self.engine = training, phases, engine
        self.folder = output / "checkpoints"
        self.writer, self.writing = CheckpointWriter(self.folder, training.save_total_limit), False
        self.accumulation, self.device, self.stop = accumulation, device, stop
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.guard, self.clock = Guard(training), Clock(training.time_budget_hours, ends)
        self.step = self.tokens = 0
        self.number = self.begun = 0  # the phase, and the step it began with
        self.areas: dict[str, Any] = {}  # results of the finished areas
        self.seconds = self.loss = self.norm = 0.0
        self.peak_gb = 0.0
        self.lines = Progress("train", "steps", training.max_steps, say_once)
        state = checkpoints.load_newest(engine, self.folder)
        if state:
            self._resume(state)
        self._take_phase()
        self.log = MetricsLog(output, self.step) if self.rank == 0 else None
        self._start_counting()

    def _resume(self, state: dict[str, Any]) -> None:
        self.step, self.tokens = state["step"], state["tokens"]
        self.seconds, self.loss = state["seconds"], state["loss"]
        self.peak_gb = state["peak_memory_gb"]
        self.clock.startups, self.clock.used = state["startup_seconds"], state["clock"]
        self.number, self.begun = state["phase"], state["phase_begun"]
        self.areas = state["areas"]
        self.guard.resume(state)
        self.lines.tell(f"going on from checkpoints/step_{self.step}")

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, apart from the weights; JSON."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "loss": self.loss,
            "peak_memory_gb": self.peak_gb,
            "startup_seconds": self.clock.startups + self.clock.startup,
            "clock": self.clock.used,
            "phase": self.number,
            "phase_begun": self.begun,
            "areas": self.areas,
            **self.guard.state(),
        }

    def result(self) -> dict[str, Any]:
        """The figures of a finished training, for training.json."""
        rate = self.tokens / max(self.seconds, 1e-9) / self.world
        return {
            "steps": self.step,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "startup_seconds": round(self.clock.startups + self.clock.startup, 3),
            "tokens_per_s_per_gpu": round(rate, 1),
            "loss": self.loss,
            "peak_memory_gb": round(self.peak_gb, 3),
            "skipped_steps": self.guard.skipped,
            **({"areas": self.areas} if self.areas else {}),
        }

    def _take_phase(self) -> None:
        self.phase = self.phases[self.number]
        rows, micro = self.phase.rows, self.training.per_device_train_batch_size
        order = Order(len(rows), self.training.seed)
        self.reader = Reader(rows, order, micro, self.accumulation, self.rank, self.world)

    def start_clock(self, evaluated_tokens: int) -> None:
        """Count the time until now as start-up, from now on as training.

        ``TrainingError`` if the time budget is too small for a single step.
        """
        age = LAUNCHER + time.time() - psutil.Process().create_time()
        started = torch.tensor([age if self.rank == 0 else 0.0], device=self.device)
        dist.all_reduce(started)
        self.clock.startup = started.item()
        trained = parameters(self.engine.module, trained=True)
        states = self.training.optimizer_states
        self.clock.saving = training_disk_bytes(trained, 0, states) / SAVING
        self.clock.evaluated_tokens = evaluated_tokens
        hours = self.clock.hours
        if hours and not self.step and self.clock.seconds_left(0.0, self.tokens) < 0:
            raise TrainingError(
                f"time_budget_hours ({hours:g}, {hours * 3600:.0f} s) leaves no time for training"
                f"{', or budget.money on this host' if self.clock.ends else ''}: "
                f"the start took {self.clock.startup:.0f} s, and the evaluation's as long again"
            )

    def _start_counting(self) -> None:
        """Start to count the seconds and the rate of steps."""
        self.first, self.seconds_before = self.step, self.seconds
        self.began = time.monotonic()
        self.logged = self.tokens, self.began, self.work.flop  # with the last line of metrics.jsonl

    def progress(self) -> float:
        """The share of the training that is done, 0..1, by steps or by the clock."""
        return max(self.step / self.training.max_steps, self.clock.used)

    def run(
        self,
        begin_area: Callable[[str], None] = lambda _: None,
        end_area: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Run all remaining steps, with checkpoints.

        ``begin_area`` is called before the first step of a phase, ``end_area`` after its last.
        Raises ``Stopped`` after SIGTERM and a checkpoint.
        """
        self._start_counting()
        while self.progress() < 1.0 or self.step == self.begun:
            if self.step == self.begun:
                begin_area(self.phase.area)
                if self.phase.area:
                    self.lines.tell(f"adapter {self.phase.area}: {len(self.phase.rows):,} rows")
            rate = self._learning_rate()
            stopping = self.one_step(rate)
            ended = self.progress() >= self.phase.end
            last = ended and self.phase is self.phases[-1]
            self._report(rate, ended or self.step % self.training.logging_steps == 0)
            if ended:
                self._end_phase(end_area, last)
            if self.writer.begun and not self.writing:
                self._complete(last)
            if stopping or ended or self.step % self.training.save_steps == 0:
                self._save(last, wait=stopping or ended)
            if stopping and not last:
                raise Stopped(f"stopped by SIGTERM; checkpoints/step_{self.step} is saved")

    def _learning_rate(self) -> float:
        phase = self.phase
        behind = (self.progress() - phase.begin) / (phase.end - phase.begin)
        return learning_rate(phase.training, self.step - self.begun, min(1.0, behind))

    def one_step(self, rate: float) -> bool:
        """One optimizer step at this learning rate; returns whether some rank was told to stop."""
        step = self.reader.step(self.step - self.begun)
        targets = max(1, step.targets)
        # a resumed step draws the same dropout
        torch.manual_seed(hash((self.training.seed, self.step, self.rank)))
        begin_step(self.engine)
        summed = torch.zeros((), device=self.device)
        for turn, batch in enumerate(step.batches):
            loss = self.engine(batch, self.device)
            summed += loss.detach()
            # undo DeepSpeed's mean over ranks and micro-batches
            self.engine.backward(loss * (self.world * self.accumulation / targets))
            if turn < self.accumulation - 1:
                self.engine.step()
        self.tokens += sum(int(lengths.sum()) for lengths in step.lengths)
        total, stopping = self._share(summed)
        self.loss = total / targets
        self._update(rate)
        self.step += 1
        self.work.add(step.lengths)
        self.peak_gb = max(self.peak_gb, peak_memory_gb(self.device))
        return stopping

    def _share(self, summed: torch.Tensor) -> tuple[float, bool]:
        """The loss summed over all ranks, and whether any of them was told to stop.

        All ranks get rank 0's seconds and clock, so that they end at the same step, and know
        whether a checkpoint is still being written.
        """
        flags = float(self.stop.came), float(self.writer.writing)
        shared = torch.tensor([0.0, 0.0, 0.0, *flags], dtype=torch.float64)
        shared[0] = summed.double()
        if self.rank == 0:
            spent = time.monotonic() - self.began
            seconds, a_step = self.seconds_before + spent, spent / (self.step + 1 - self.first)
            shared[1] = seconds
            shared[2] = self.clock.progress(seconds, self.tokens, a_step)
        shared = shared.to(self.device)
        dist.all_reduce(shared)
        total, self.seconds, used, stopping, writing = shared.tolist()
        self.writing = writing > 0
        self.clock.used = max(self.clock.used, used)
        return total, stopping > 0

    def _update(self, rate: float) -> None:
        """Run the optimizer's step, unless the guard refuses the loss or the gradient norm."""
        zero = self.engine.optimizer
        loss_refused = self.guard.refuses(self.loss, self.guard.losses)
        asked: list[bool] = []

        def allowed() -> bool:
            if not asked:  # the optimizer asks once per parameter group
                self.norm = float(zero._global_grad_norm)
                if self.norm < 0:  # how DeepSpeed says "not finite"
                    self.norm = math.nan
                asked.append(not (self.guard.refuses(self.norm, self.guard.norms) or loss_refused))
            return asked[0]

        zero.optimizer.allowed = allowed
        for group in zero.optimizer.param_groups:
            group["lr"] = rate
        self.engine.step()
        if not asked:  # DeepSpeed itself found the gradients not finite
            self.norm = math.nan
        if asked != [True]:
            self.guard.count(self.step + 1, self.loss, self.norm)
            self.lines.tell(
                f"step {self.step + 1} skipped: loss {self.loss:.4g}, "
                f"gradient norm {self.norm:.4g} out of bounds"
            )

    def _report(self, rate: float, due: bool) -> None:
        """On rank 0, print a line of progress and, if ``due``, write one to metrics.jsonl."""
        now = due or self.step == self.first + 1
        if self.rank != 0 or not (now or self.lines.due):
            return
        tokens, since, flop = self.logged
        here = time.monotonic()
        a_gpu = max(here - since, 1e-9) * self.world
        per_gpu = (self.tokens - tokens) / a_gpu
        left = (here - self.began) / (self.step - self.first)
        left *= self.training.max_steps - self.step
        if self.clock.hours:
            left = min(left, max(0.0, self.clock.seconds_left(self.seconds, self.tokens)))
        self.lines.tell(
            f"step {self.step}/{self.training.max_steps} loss {self.loss:.4f} "
            f"lr {rate:.3g} grad_norm {self.norm:.3g} "
            f"{per_gpu * self.world:,.0f} tokens/s {hours_minutes_seconds(left)} left"
        )
        if due and self.log:
            metrics = self._metrics(rate, per_gpu, left, (self.work.flop - flop) / a_gpu)
            self.log.write(self.step, metrics)
            self.logged = self.tokens, here, self.work.flop

    def _metrics(self, rate: float, per_gpu: float, left: float, flop: float) -> dict[str, Any]:
        """``per_gpu`` tokens/s, ``left`` seconds, ``flop`` FLOP/s per GPU."""
        known: dict[str, Any] = {}
        if self.work.peak:
            known["mfu"] = round(flop / self.work.peak, 4)
        if self.phase.area:
            known["area"] = self.phase.area
        if self.price is not None:
            known["cost"] = round(self.seconds / 3600 * self.world * self.price, 2)
        return {
            "step": self.step,
            "loss": self.loss,
            "learning_rate": rate,
            "grad_norm": self.norm,
            "tokens": self.tokens,
            "tokens_per_s_per_gpu": round(per_gpu, 1),
            "memory_gb": round(self.peak_gb, 3),
            "hours_left": round(left / 3600, 4),
            "skipped_steps": self.guard.skipped,
            **known,
        }

    def _end_phase(self, end_area: Callable[[str], None], last: bool) -> None:
        """Save an area's adapter and switch to the next area; the following checkpoint records it."""
        if self.phase.area:
            end_area(self.phase.area)
            self.areas[self.phase.area] = {"steps": self.step - self.begun, "loss": self.loss}
        self.reader.close()
        if not last:
            self.number, self.begun = self.number + 1, self.step
            self._take_phase()
            self.guard.forget()

    def _save(self, last: bool, wait: bool) -> None:
        """Begin a checkpoint; with ``wait`` it is complete when this returns."""
        if self.writer.begun:  # the last one took longer than ``save_steps``
            self._complete(last)
        self.writer.begin(self.engine, self.state())
        if wait and self.writer.begun:
            self._complete(last)

    def _complete(self, last: bool) -> None:
        written = self.writer.complete()
        model = MODEL_BYTES / checkpoint_bytes_per_weight(self.training.optimizer_states)
        self.clock.saving = max(self.clock.saving, written.seconds * (1 + model))
        if not last:
            self.lines.tell(
                f"saved checkpoints/step_{written.step} in {written.seconds:.1f} s, "
                f"{written.stopped:.1f} s of them without training"
            )
