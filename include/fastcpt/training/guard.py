"""Skips bad steps, so that they do not change the weights."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastcpt.recipe_sections import Training
from fastcpt.training.exits import TrainingError

WINDOW = 128  # steps that the guard remembers; it starts to judge after half of them


class Guard:
    """Skips a step if its loss or gradient norm is not finite or far above the recent ones.

    Far above: more than mean + ``skip_sigmas`` standard deviations of the last 128 steps (OLMo-core's
    rule, with 6), once 64 are known. Finite values of skipped steps are remembered too, so a lasting
    change becomes the new normal.
    """

    def __init__(self, training: Training) -> None:
        self.sigmas, self.most = training.skip_sigmas, training.max_skipped_steps
        self.skipped = 0
        self.skipped_at: list[int] = []  # of the last 128 steps
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.norms: deque[float] = deque(maxlen=WINDOW)

    def refuses(self, value: float, recent: deque[float]) -> bool:
        """Whether ``value`` is out of bounds; a finite value is remembered."""
        if not math.isfinite(value):
            return True
        out = False
        if len(recent) >= WINDOW // 2:
            mean = sum(recent) / len(recent)
            deviation = math.sqrt(sum((x - mean) ** 2 for x in recent) / len(recent))
            # a curve without noise has almost no deviation: use at least 0.1 % of the mean
            out = value > mean + self.sigmas * max(deviation, 1e-3 * abs(mean))
        recent.append(value)
        return out

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {
            "skipped_steps": self.skipped,
            "skipped_at": self.skipped_at,
            "losses": list(self.losses),
            "norms": list(self.norms),
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        self.skipped, self.skipped_at = state["skipped_steps"], state["skipped_at"]
        self.losses.extend(state["losses"])
        self.norms.extend(state["norms"])

    def forget(self) -> None:
        """Forget the recent losses and norms; skipped steps stay counted."""
        self.losses.clear()
        self.norms.clear()

    def count(self, step: int, loss: float, norm: float) -> None:
        """Count one skipped step; ``TrainingError`` if too many are close together."""
        self.skipped += 1
        self.skipped_at = [n for n in self.skipped_at if n > step - WINDOW] + [step]
        if len(self.skipped_at) > self.most:
            raise TrainingError(
                f"{len(self.skipped_at)} of the last {WINDOW} steps had a loss or gradient norm out "
                f"of bounds, more than max_skipped_steps ({self.most}); the last was step {step} "
                f"(loss {loss:.4g}, gradient norm {norm:.4g}). Lower learning_rate, lengthen warmup_steps, or look "
                "at the data of these steps"
            )


class GuardedAdamW(torch.optim.AdamW):  # type: ignore[misc]
    """AdamW with a hook, ``allowed``, that can refuse a step.

    ZeRO-3 knows the gradient norm only inside its own step, which then calls this one: the last moment to
    decide before weights or moments change.
    """

    allowed: Callable[[], bool] = staticmethod(lambda: True)

    def fresh_state(self, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        """Adam's state as its first step would create it."""
        return {
            "step": torch.zeros((), dtype=torch.float32, device=weights.device),
            "exp_avg": torch.zeros_like(weights),
            "exp_avg_sq": torch.zeros_like(weights),
        }

    def step(self, closure: Any = None) -> Any:
        return super().step(closure) if self.allowed() else None
