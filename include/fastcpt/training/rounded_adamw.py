"""AdamW with stochastic rounding instead of a float32 copy of the weights.

Weights are bf16, Adam's moments bf16 or 8 bits: with bf16 gradients 8 or 6.03 bytes per weight instead of
16. An update is often smaller than half the distance to the next bf16 value, so rounding to nearest would
lose it. Stochastic rounding goes up or down with a probability in proportion, so stored values are right on
average (arXiv 2502.20566). Moments are rounded in the same way, as their updates are equally small.

**8 bits.** Blocks of ``BLOCK`` moments share one float32 scale, their largest absolute value. A code's
value is its square (first moment) or fourth power (second moment), which gives fine steps for small
moments, where most are.

**Memory.** ``SLICE`` weights are updated at a time, on GPUs in one compiled pass, so no float32 temporary
of all weights exists. The random bits of a step depend on seed, step and rank alone, so a resumed training
draws the same ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch

from fastcpt.recipe_sections import OptimizerStates
from fastcpt.step_memory import MOMENTS_BLOCK as BLOCK

SLICE = 1 << 24  # weights
# of each 8-bit moment: type, largest code, and the power of the code that gives its value
CODES = {"exp_avg": (torch.int8, 127, 2), "exp_avg_sq": (torch.uint8, 255, 4)}


class RoundedAdamW(torch.optim.Optimizer):  # type: ignore[misc]
    """Updates bf16 weights; as in ``GuardedAdamW``, ``allowed`` can refuse a step before anything changes."""

    allowed: Callable[[], bool] = staticmethod(lambda: True)

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        states: OptimizerStates,
        seed: int,
        rank: int,
    ) -> None:
        """``groups`` have flat bf16 tensors by the time of a step; ``seed`` and ``rank`` seed the rounding."""
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.eight_bits, self.seed, self.rank = states == "int8", seed, rank
        self.drawn_for = -1  # the step that the generator is seeded for
        self.generator: torch.Generator | None = None

    def fresh_state(self, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        """Adam's state before the first step of ``weights`` [N], padded to whole blocks."""
        blocks = -(-len(weights) // BLOCK)
        state = {"step": torch.zeros((), dtype=torch.float32)}
        for moment, (kind, _, _) in CODES.items():
            stored = kind if self.eight_bits else torch.bfloat16
            state[moment] = torch.zeros(blocks * BLOCK, dtype=stored, device=weights.device)
            if self.eight_bits:
                state[f"{moment}_scale"] = torch.zeros(blocks, device=weights.device)
        return state

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: Any = None) -> None:
        """Update every flat tensor of the groups that has a gradient."""
        if not self.allowed():
            return
        for group in self.param_groups:
            for weights in group["params"]:
                if weights.grad is not None:
                    self._update(weights, group)

    def _update(self, weights: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[weights]
        if not state:
            state.update(self.fresh_state(weights))
        state["step"] += 1
        step, device = int(state["step"]), weights.device
        (beta1, beta2), rate = group["betas"], group["lr"]
        rates = torch.tensor(
            [rate / (1 - beta1**step), 1 - rate * group["weight_decay"], 1 / (1 - beta2**step)],
            dtype=torch.float32,
        ).to(device, non_blocking=True)
        names = [name for name in state if name != "step"]
        for begin in range(0, len(weights), SLICE):
            end = min(begin + SLICE, len(weights))
            part, padding = weights.detach()[begin:end], (begin - end) % BLOCK
            gradient, blocks = weights.grad[begin:end], -(-end // BLOCK)
            if padding:
                part = torch.nn.functional.pad(part, (0, padding))
                gradient = torch.nn.functional.pad(gradient, (0, padding))
            moments = [
                state[name][begin // BLOCK : blocks]
                if name.endswith("_scale")
                else state[name][begin : blocks * BLOCK]
                for name in names
            ]
            bits = self.random_bits(len(part), device, step)
            whole = device.type == "cuda" and len(part) == SLICE  # one shape to compile for
            update = _compiled(self.eight_bits) if whole else _updates(self.eight_bits)
            update(part, gradient, *moments, bits, rates, beta1, beta2, group["eps"])
            if padding:
                weights.detach()[begin:end] = part[: end - begin]

    def random_bits(self, size: int, device: torch.device, step: int) -> torch.Tensor:
        """[size] int32: 16 bits for each weight and 8 for each of its two moments."""
        if self.generator is None:
            self.generator = torch.Generator(device)
        if step != self.drawn_for:  # groups are always updated in the same order
            self.generator.manual_seed(hash((self.seed, step, self.rank)))
            self.drawn_for = step
        bits = torch.empty(size, dtype=torch.int32, device=device)
        return bits.random_(-(1 << 31), 1 << 31, generator=self.generator)


def adamw(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    rates: torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One step in float32; the new weights and moments (Loshchilov 2019, as torch computes it).

    ``rates``: learning rate over the first moment's bias correction, the factor of weight decay, and one
    over the second moment's bias correction.
    """
    first = beta1 * first + (1 - beta1) * gradient
    second = beta2 * second + (1 - beta2) * gradient * gradient
    change = rates[0] * first / ((second * rates[2]).sqrt() + eps)
    return weights * rates[1] - change, first, second


def rounded(values: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """float32 to bf16: rounds away from zero if ``bits`` (0..65535) plus the dropped 16 bits reach 65536."""
    return ((values.view(torch.int32) + bits) & -65536).view(torch.float32).to(torch.bfloat16)


def quantized(
    values: torch.Tensor, moment: str, chance: torch.Tensor | float = 0.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of ``values`` [blocks * BLOCK] and the scales [blocks] of their blocks.

    A value between two codes gets the upper one if its relative position exceeds ``chance``: 0.5 rounds to
    nearest, a uniform chance preserves the mean. A second moment above zero never becomes zero, as a step
    divides by its root.
    """
    kind, most, power = CODES[moment]
    blocks = values.view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1)
    share = (blocks.abs() / torch.where(scales > 0, scales, 1.0)[:, None]).view(-1)
    root = share.sqrt() if power == 2 else share.sqrt().sqrt()
    below = (root * most).floor().clamp(max=most - 1)
    low, high = below**power, (below + 1) ** power
    codes = below + ((share * most**power - low) / (high - low) > chance)
    if kind == torch.uint8:
        codes = torch.where(values > 0, codes.clamp(min=1), 0.0)
    return (codes * values.sign()).to(kind), scales


def dequantized(codes: torch.Tensor, scales: torch.Tensor, moment: str) -> torch.Tensor:
    """float32 values of codes [blocks * BLOCK] with their blocks' scales [blocks]."""
    _, most, power = CODES[moment]
    share = codes.float() / most
    size = share * share.abs() if power == 2 else share**power
    return (size.view(-1, BLOCK) * scales[:, None]).view(-1)


def _update_bfloat16(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    bits: torch.Tensor,
    rates: torch.Tensor,
    *settings: float,
) -> None:
    """Update one slice in place, with moments in bf16."""
    new = adamw(weights.float(), gradient.float(), first.float(), second.float(), rates, *settings)
    weights.copy_(rounded(new[0], bits & 0xFFFF))
    # 8 random bits as the upper half of 16, centred
    first.copy_(rounded(new[1], (bits >> 8 & 0xFF00) | 0x80))
    second.copy_(rounded(new[2], (bits >> 16 & 0xFF00) | 0x80))


def _update_int8(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    first: torch.Tensor,
    first_scale: torch.Tensor,
    second: torch.Tensor,
    second_scale: torch.Tensor,
    bits: torch.Tensor,
    rates: torch.Tensor,
    *settings: float,
) -> None:
    """Update one slice in place, with moments in 8 bits."""
    new = adamw(
        weights.float(),
        gradient.float(),
        dequantized(first, first_scale, "exp_avg"),
        dequantized(second, second_scale, "exp_avg_sq"),
        rates,
        *settings,
    )
    weights.copy_(rounded(new[0], bits & 0xFFFF))
    stored = (first, first_scale), (second, second_scale)
    for (codes, scales), moment, values, shift in zip(
        stored, CODES, new[1:], (16, 24), strict=True
    ):
        chance = ((bits >> shift & 0xFF).float() + 0.5) / 256
        made = quantized(values, moment, chance)
        codes.copy_(made[0])
        scales.copy_(made[1])


def _updates(eight_bits: bool) -> Callable[..., None]:
    return _update_int8 if eight_bits else _update_bfloat16


@functools.cache
def _compiled(eight_bits: bool) -> Any:
    """Compiled: one pass over a slice, without temporaries of its size."""
    return torch.compile(_updates(eight_bits), dynamic=False)
