"""Fused blocks: the same function as transformers' layers, and the same weights back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from fastcpt.recipe_sections import Lora
from fastcpt.training.data import Row, make_batch
from fastcpt.training.layers import plain_weights, with_fused_blocks
from fastcpt.training.model import HostEmbedding, Trainee, add_lora

CPU = torch.device("cpu")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.fixture(autouse=True)
def fake_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformer-engine's layers in plain torch (the real ones: benchmarks/correctness.py)."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "fake"))


# what sets each family apart, beside another width of heads than hidden size over heads
OWN = {"llama": {}, "mistral": {"head_dim": 16}, "qwen2": {}, "qwen3": {"head_dim": 16}}


def model_of(kind: str, tied: bool, rope: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        tie_word_embeddings=tied,
        rope_parameters=rope,
        max_position_embeddings=128,
        attn_implementation="sdpa",
        **OWN[kind],
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def llama(tied: bool, rope: dict[str, Any]) -> Any:
    return model_of("llama", tied, rope)


def batch(size: int = 40) -> Any:
    drawn = np.random.default_rng(0)
    rows = [
        Row(drawn.integers(0, 96, sum(lengths)).astype(np.int32), np.array(lengths, np.int32))
        for lengths in ([7, 20, 10], [40])
    ]
    return make_batch(rows, size)


DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
SOME = ["q_proj", "v_proj", "up_proj"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("kind", "tied", "rope", "targets", "recompute"),
    [
        ("llama", True, DEFAULT, [], "none"),
        ("llama", False, LLAMA3, [], "full"),
        ("llama", False, LLAMA3, SOME, "none"),
        ("llama", True, DEFAULT, ALL, "mlp"),
        ("llama", False, LINEAR, ["down_proj"], "full"),
        ("mistral", False, LINEAR, [], "none"),
        ("mistral", False, DEFAULT, ALL, "full"),
        ("qwen2", True, DEFAULT, [], "full"),
        ("qwen2", False, LINEAR, ALL, "none"),
        ("qwen3", False, LLAMA3, [], "none"),
        ("qwen3", True, LINEAR, [], "full"),
        ("qwen3", False, DEFAULT, SOME, "mlp"),
    ],
)
def test_a_fused_model_has_the_loss_and_the_gradients_of_the_plain_one(
    kind: str, tied: bool, rope: dict[str, Any], targets: list[str], recompute: Any
) -> None:
    plain, adapted = model_of(kind, tied, rope), bool(targets)
    if adapted:
        plain = add_lora(plain, Lora(r=4, lora_dropout=0.0, target_modules=targets))
        for name, parameter in plain.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, 0.0, 0.1)
    fused = copy.deepcopy(plain)
    inside = fused.get_base_model() if adapted else fused
    packing = with_fused_blocks(inside, 40, "transformer_engine", False, False, None, CPU)
    for block in inside.model.layers:
        block.recompute(recompute)
    expected = Trainee(plain, "sdpa", None)(batch(), CPU)
    got = Trainee(fused, "transformer_engine", packing)(batch(), CPU)
    torch.testing.assert_close(got, expected)
    expected.backward()
    got.backward()
    gradients = {n: p.grad for n, p in fused.named_parameters() if p.grad is not None}
    named = plain_weights(gradients, inside.config)
    wanted = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    assert named.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (named[name] - gradient).norm() < 1e-4 * gradient.norm(), name


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_products_add_the_gradients_of_micro_batches_up_themselves(recompute: Any) -> None:
    plain = llama(True, LLAMA3)
    fused = copy.deepcopy(plain)
    packing = with_fused_blocks(
        fused, 40, "transformer_engine", False, False, None, CPU, accumulate=True
    )
    for block in fused.model.layers:
        block.recompute(recompute)
    trainees = Trainee(plain, "sdpa", None), Trainee(fused, "transformer_engine", packing)
    for _ in range(2):
        for trainee in trainees:
            trainee(batch(), CPU).backward()
    gradients = {n: getattr(p, "main_grad", p.grad) for n, p in fused.named_parameters()}
    assert fused.model.layers[0].mlp.fc1_weight.grad is None
    named = plain_weights(gradients, fused.config)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(named[name], parameter.grad, rtol=1e-4, atol=1e-5)


def adapted_model(kind: str = "llama") -> Any:
    plain = add_lora(model_of(kind, False, LLAMA3), Lora(r=4, lora_dropout=0.0))
    for name, parameter in plain.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.1)
    return plain


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    ("kind", "recompute", "on_host"),
    [
        ("llama", "none", False),
        ("llama", "mlp", False),
        ("llama", "full", False),
        ("qwen2", "none", False),
        ("qwen3", "full", True),
    ],
)
def test_frozen_weights_in_one_byte_give_the_loss_and_gradients_of_weights_quantized_each_time(
    kind: str, recompute: Any, on_host: bool, keep: bool
) -> None:
    models = adapted_model(kind), adapted_model(kind)
    losses, gradients = [], []
    for model, one_byte in zip(models, (False, True), strict=True):
        inside = model.get_base_model()
        packing = with_fused_blocks(
            inside, 40, "transformer_engine", True, keep, None, CPU, one_byte=one_byte
        )
        for block in inside.model.layers:
            block.recompute(recompute, on_host and one_byte)
        for _ in range(2):  # gradients add up over micro-batches
            loss = Trainee(model, "transformer_engine", packing)(batch(), CPU)
            loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert losses[0] == losses[1]
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    block = models[1].get_base_model().model.layers[0]
    if kind == "llama":
        # two norms, two small matrices for each of q, k, v, o: no matrix of 32 x 32 is a parameter
        assert sum(p.numel() for p in block.parameters()) == 2 * 32 + 256 + 192 + 192 + 256
    assert [weight.transposed for weight in block.one_byte] == [keep] * 4


def test_a_frozen_embedding_on_the_host_gives_the_same_loss_and_gradients() -> None:
    models = adapted_model(), adapted_model()
    losses = []
    for model, on_host in zip(models, (False, True), strict=True):
        inside = model.get_base_model()
        packing = with_fused_blocks(inside, 40, "transformer_engine", False, False, None, CPU)
        if on_host:
            inside.model.embed_tokens = HostEmbedding(inside.model.embed_tokens)
        trainee = Trainee(model, "transformer_engine", packing)
        inside.lm_head.at_once = 32 if on_host else 4096  # of 80 tokens
        losses.append(trainee(batch(), CPU))
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0])
    assert not any("embed" in name for name, _ in models[1].named_parameters())
    for name, parameter in models[0].named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(models[1].get_parameter(name).grad, parameter.grad)


@pytest.mark.parametrize("kind", OWN)
def test_weights_come_back_bit_for_bit(kind: str) -> None:
    plain = model_of(kind, False, LLAMA3)
    before = {name: weight.clone() for name, weight in plain.state_dict().items()}
    with_fused_blocks(plain, 40, "transformer_engine", False, False, None, CPU)
    assert "model.layers.0.self_attn.q_proj.weight" not in plain.state_dict()
    after = plain_weights(plain.state_dict(), plain.config)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("kind", OWN)
def test_other_documents_of_a_row_change_nothing(kind: str) -> None:
    model = model_of(kind, True, LLAMA3)
    packing = with_fused_blocks(model, 40, "transformer_engine", False, False, None, CPU)
    first, second, other = np.arange(7), np.arange(30, 50), np.arange(60, 67)

    def hidden(*pieces: Any) -> torch.Tensor:
        row = Row(
            np.concatenate(pieces).astype(np.int32),
            np.array([len(piece) for piece in pieces], np.int32),
        )
        made = make_batch([row], 40)
        packing.set_batch(made, CPU)
        states = model.model.embed_tokens(made.input_ids.reshape(-1))
        for block in model.model.layers:
            states = block(states)
        return states

    together = hidden(first, second)[7:27]
    torch.testing.assert_close(hidden(other, second)[7:27], together, rtol=0, atol=0)
    torch.testing.assert_close(hidden(second)[:20], together)
