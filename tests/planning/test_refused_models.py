"""Models that the trainer does not support cannot be planned either, with the same message."""

import pytest

from fastcpt.planning.jobs import changed
from fastcpt.planning.plan import plan, require_fit
from fastcpt.planning.result import CannotRun

SMALL = {
    "model.name_or_path": "meta-llama/Llama-3.2-1B",
    "budget.hours": None,
    "budget.money": None,
}


def test_fp8_that_the_trainer_cannot_do_is_a_problem(hybrid):
    found = plan(changed(hybrid, {**SMALL, "model.attn_implementation": "sdpa"}), cluster="8xH100")
    assert not found.fits
    assert (
        "precision: FP8 is made for models of Llama, Mistral, Qwen 2, Qwen 3 in bfloat16 and "
        "attn_implementation auto or flash_attention_2, but model.attn_implementation is sdpa: set use_fp8 "
        "to false"
    ) in found.message()
    assert found.alternatives[0].what == "bf16"
    assert found.alternatives[0].fits


def test_a_family_without_fused_blocks_is_planned_in_bf16_and_refused_in_fp8(hybrid):
    olmo = changed(hybrid, {"model.name_or_path": "allenai/OLMo-2-1124-7B", "budget": {}})
    found = plan(olmo, cluster="8xH100")
    assert (found.fits, found.precision) == (False, "bfloat16")
    assert "but this is OLMo 2 (norms on queries and keys): set use_fp8 to false" in found.message()
    with pytest.raises(CannotRun):
        require_fit(found)
    bf16 = found.alternatives[0]
    assert bf16.what.startswith("bf16")
    taken = plan(changed(olmo, bf16.changes), cluster="8xH100")
    assert taken.fits
    assert (taken.memory_gb, taken.hours) == (found.memory_gb, found.hours)
    # transformers' layers, which keep more than fused blocks, on Llama's measurements
    assert "wider for" in taken.rate_source
    assert "liger kernels, OLMo 2's layers" in taken.rate_source
    llama = changed(hybrid, {"model.name_or_path": "meta-llama/Llama-3.1-8B", "budget": {}})
    llama = plan(changed(llama, {"training.use_fp8": False}), cluster="8xH100")
    assert taken.tokens_per_s.high < llama.tokens_per_s.high


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "openai/gpt-oss-20b",
            "20.9 B parameters, 4.2 B a token; the trainer does not take it: it is a",
        ),
        ("mistralai/Mixtral-8x7B-v0.1", "46.7 B parameters, 12.9 B a token; the trainer does not"),
        (
            "google/gemma-3-4b-it",
            "3.9 B parameters; the trainer does not take it: it reads more than",
        ),
        ("google/gemma-2-9b", "caps its logits (final_logit_softcapping), the trainer's loss does"),
    ],
)
def test_what_the_trainer_does_not_take_cannot_be_planned_either(hybrid, name, words):
    found = plan(changed(hybrid, {"model.name_or_path": name}), cluster="8xH100")
    assert words in found.message()
    assert (found.hours, found.memory_gb, found.fits) == (None, None, False)
    # what is left is another model
    for choice in found.alternatives:
        assert choice.what.startswith("Llama-3")


def test_the_operations_of_experts_are_those_a_token_goes_to(hybrid):
    found = plan(changed(hybrid, {"model.name_or_path": "mistralai/Mixtral-8x7B-v0.1"}))
    # 6 x (12.88 B - the look-up's 32,000 x 4096), and attention, of 12,000 x 128 x 3072 tokens
    attention = 3 * 2 * 32 * 4096 * 3072
    a_token = 6 * (12.8798e9 - 32_000 * 4096) + attention
    assert found.flops == pytest.approx(a_token * found.tokens, rel=1e-3)


def test_sliding_windows_need_flash_attention(hybrid):
    recipe = changed(hybrid, {"model.name_or_path": "google/gemma-3-1b-it", "budget": {}})
    recipe = changed(recipe, {"training.use_fp8": False})
    assert plan(recipe, cluster="8xH100").fits
    plain = plan(changed(recipe, {"model.attn_implementation": "sdpa"}), cluster="8xH100")
    assert "sliding window of 512 tokens is shorter than rows of 3072" in plain.message()


def test_adapters_on_layers_that_a_family_has_not_are_refused(hybrid):
    phi = {"model.name_or_path": "microsoft/phi-4", "lora": {}, "training.use_fp8": False}
    found = plan(changed(hybrid, phi), cluster="8xH100")
    assert "Phi 3 has no layers k_proj, q_proj, v_proj (lora.target_modules)" in found.message()
