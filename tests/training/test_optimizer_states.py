"""Optimizer states in bf16 and 8 bits: rounding, the step, and whole trainings on CPU ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcpt.recipe import RecipeError, load_recipe
from fastcpt.training import rounded_adamw
from fastcpt.training.rounded_adamw import (
    BLOCK,
    CODES,
    SLICE,
    RoundedAdamW,
    adamw,
    dequantized,
    quantized,
    rounded,
)
from training.conftest import launch, train_arguments, write_recipe

SETTINGS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8}


def optimizer(weights: torch.Tensor, states: Any = "int8", **other: Any) -> RoundedAdamW:
    given = {**SETTINGS, "states": states, "seed": 0, "rank": 0, **other}
    return RoundedAdamW([{"params": [weights], "weight_decay": 0.1}], **given)


def test_the_step_is_adamws() -> None:
    torch.manual_seed(0)
    weights = torch.randn(100, requires_grad=True)
    theirs = torch.optim.AdamW([weights], **SETTINGS, weight_decay=0.1)
    ours, first, second = weights.detach().clone(), torch.zeros(100), torch.zeros(100)
    for step in range(1, 11):
        weights.grad = torch.randn(100)
        theirs.step()
        rates = torch.tensor([0.01 / (1 - 0.9**step), 1 - 0.001, 1 / (1 - 0.95**step)])
        ours, first, second = adamw(ours, weights.grad, first, second, rates, 0.9, 0.95, 1e-8)
    torch.testing.assert_close(ours, weights.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(second, theirs.state[weights]["exp_avg_sq"], rtol=1e-6, atol=0.0)


def test_rounding_takes_a_neighbour_and_keeps_the_mean() -> None:
    bits = torch.arange(65536, dtype=torch.int32)
    # between 1 and the next bf16 number, 1 + 1/128: a quarter of the way
    up = rounded(torch.full((65536,), 1 + 1 / 512), bits).float()
    assert sorted(set(up.tolist())) == [1.0, 1 + 1 / 128]
    assert float(up.double().mean()) == 1 + 1 / 512
    down = rounded(torch.full((65536,), -1 - 1 / 512), bits).float()
    assert float(down.double().mean()) == -1 - 1 / 512
    exact = torch.tensor([0.0, -3.5, 1.0, 2**-100]).repeat(16384)
    assert torch.equal(rounded(exact, bits).float(), exact)


@pytest.mark.parametrize("moment", CODES)
def test_eight_bits_hold_a_moment(moment: str) -> None:
    torch.manual_seed(0)
    values = torch.randn(8 * BLOCK) * torch.rand(8 * BLOCK) ** 4
    values[:BLOCK] = 0.0
    values = values if moment == "exp_avg" else values**2
    codes, scales = quantized(values, moment)
    stored = dequantized(codes, scales, moment)
    # what was stored once is stored again as it is
    again = quantized(stored, moment)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], scales)
    # the largest of a block is exact, zero is zero, other values lie between two codes
    assert torch.equal(stored.view(-1, BLOCK).abs().amax(1), values.view(-1, BLOCK).abs().amax(1))
    assert torch.equal(stored[:BLOCK], values[:BLOCK])
    widest = {"exp_avg": 1 - (126 / 127) ** 2, "exp_avg_sq": 1 - (254 / 255) ** 4}[moment]
    off = (stored - values).abs().view(-1, BLOCK) / scales.clamp(min=1e-30)[:, None]
    assert float(off.max()) <= widest / 2 + 1e-6
    if moment == "exp_avg_sq":
        assert bool((stored[BLOCK:] > 0).all())
    # at random it is right on average
    mean = torch.zeros_like(values)
    for _ in range(500):
        mean += dequantized(*quantized(values, moment, torch.rand_like(values)), moment) / 500
    off = (mean - values).abs().view(-1, BLOCK) / scales.clamp(min=1e-30)[:, None]
    assert float(off.max()) < 5 * widest / 2 / 500**0.5


@pytest.mark.parametrize("states", ["bfloat16", "int8"])
def test_steps_too_small_for_bf16_add_up(states: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounded_adamw, "SLICE", 4 * BLOCK)
    size = 10 * BLOCK + 7  # two slices and a part of one

    def moved(nearest: bool) -> torch.Tensor:
        weights = torch.ones(size, dtype=torch.bfloat16, requires_grad=True)
        found = optimizer(weights, states, lr=1 / 4096)  # 1/16 of the way to the next number below
        found.param_groups[0]["weight_decay"] = 0.0
        if nearest:
            half = torch.full((4 * BLOCK,), -0x7F7F8000, dtype=torch.int32)  # 0x8080 8000
            monkeypatch.setattr(found, "random_bits", lambda size, *_: half[:size])
        for _ in range(32):
            weights.grad = torch.full((size,), 0.01, dtype=torch.bfloat16)
            found.step()
        return weights.detach().float()

    assert bool((moved(nearest=True) == 1.0).all())
    free = moved(nearest=False)
    assert float(free.mean()) == pytest.approx(1 - 32 / 4096, rel=2e-4)
    assert bool((free < 1.0).float().mean() > 0.8)


@pytest.mark.parametrize(("states", "bytes_a_weight"), [("bfloat16", 4.0), ("int8", 2.03125)])
def test_bytes_a_weight(states: Any, bytes_a_weight: float) -> None:
    weights = torch.zeros(100 * BLOCK, dtype=torch.bfloat16)
    state = optimizer(weights.requires_grad_(), states).fresh_state(weights)
    held = sum(tensor.nbytes for name, tensor in state.items() if name != "step")
    assert held / len(weights) == bytes_a_weight


def test_the_rounding_is_repeatable_and_another_on_each_rank() -> None:
    def trained(rank: int, refused_at: int = -1) -> torch.Tensor:
        torch.manual_seed(0)
        weights = torch.randn(1000).bfloat16().requires_grad_()
        found = optimizer(weights, rank=rank)
        for step in range(5):
            weights.grad = torch.randn(1000).bfloat16()
            found.allowed = lambda step=step: step != refused_at
            before = weights.detach().clone(), *(x.clone() for x in found.state[weights].values())
            found.step()
            if step == refused_at:  # nothing has changed
                after = weights.detach(), *found.state[weights].values()
                assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
        return weights.detach()

    assert torch.equal(trained(0), trained(0))
    assert not torch.equal(trained(0), trained(1))
    assert not torch.equal(trained(0), trained(0, refused_at=3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiled on GPUs alone")
@pytest.mark.parametrize("states", ["bfloat16", "int8"])
def test_compiled_and_plain_steps_are_the_same(states: Any) -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(SLICE + 300, device="cuda"), []
    for _ in range(3):
        gradients.append(torch.randn_like(start).bfloat16())

    def trained() -> list[torch.Tensor]:
        weights = start.bfloat16().requires_grad_()
        found = optimizer(weights, states)
        for gradient in gradients:
            weights.grad = gradient
            found.step()
        state = found.state[weights]
        if states == "bfloat16":
            return [weights.detach(), state["exp_avg"], state["exp_avg_sq"]]
        moments = [dequantized(state[name], state[f"{name}_scale"], name) for name in CODES]
        return [weights.detach(), *(moment[: len(start)] for moment in moments)]

    fused = trained()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounded_adamw, "_compiled", rounded_adamw._updates)
        plain = trained()
    for one, other in zip(fused, plain, strict=True):
        # the last bit of a float32 sum may turn a rounding
        same = (one.float() - other.float()).abs() <= 1e-6 * other.float().abs()
        assert float(same.float().mean()) > 0.999
        torch.testing.assert_close(one.float().mean(), other.float().mean(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"training.deepspeed": "ds_config_zero3_offload.json"}, "cannot be offloaded"),
        ({"model.dtype": "float32"}, "is for weights in bfloat16, and model.dtype is float32"),
        (
            {"training.optimizer_states": "int4"},
            "optimizer_states: .*'float32', 'bfloat16' or 'int8'",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_recipe(
    overrides: dict[str, Any], words: str
) -> None:
    small = {"training.optimizer_states": "int8"}
    assert load_recipe("cpt_config_fast", small).stage2.optimizer_states == "int8"
    with pytest.raises(RecipeError, match=words):
        load_recipe("cpt_config_fast", {**small, **overrides})


def metrics(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in metrics(output)]


def train(recipe: Path, corpus: Path, model: Path, output: Path, ranks: int) -> str:
    arguments = train_arguments(recipe, corpus, output, "--model", model)
    process = launch("train_cpt.py", *arguments, ranks=ranks)
    said, _ = process.communicate(timeout=180)
    assert process.returncode == 0, said
    return said


@pytest.mark.parametrize(("states", "ranks", "stored"), [("int8", 2, 4.03), ("bfloat16", 1, 6.0)])
def test_a_training_learns_and_goes_on_with_the_same_curve(
    corpus: Path, model: Path, tmp_path: Path, states: str, ranks: int, stored: float
) -> None:
    recipe = write_recipe(
        tmp_path, model={"dtype": "bfloat16"}, training={"optimizer_states": states}
    )
    out = tmp_path / "out"
    said = train(recipe, corpus, model, out, ranks)
    assert f"optimizer states in {states}, {ranks} ranks" in said
    whole = losses(out)
    assert whole[0] == pytest.approx(5.545, abs=0.1)  # ln 256
    assert whole[-1] < 4.4
    assert json.loads((out / "training.json").read_text())["optimizer_states"] == states
    files = list((out / "checkpoints" / "step_6").glob("rank_*.pt"))
    weights = 27_000  # 256 x 32 words, two layers of 9,280, norms
    # a tensor has a record of its own in the file
    assert sum(file.stat().st_size for file in files) < weights * stored + 60_000
    again = {}
    for count in {ranks, 1}:
        other = tmp_path / f"again_{count}"
        shutil.copytree(out, other)
        (other / "training.json").unlink()
        shutil.rmtree(other / "final")
        shutil.rmtree(other / "checkpoints" / "step_12")
        changed = recipe
        if count != ranks:
            changed = write_recipe(
                tmp_path / "changed",
                model={"dtype": "bfloat16"},
                training={"optimizer_states": states, "gradient_accumulation_steps": 4},
                cluster={"gpus": 1},
            )
        assert "going on from checkpoints/step_6" in train(changed, corpus, model, other, count)
        again[count] = losses(other)
    assert again[ranks] == whole
    # other random bits on another number of ranks
    assert again[1] == pytest.approx(whole, rel=0.02)
