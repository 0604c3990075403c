"""The model made from a GGUF file computes the same as the model written into it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from fastcpt.gguf import convert
from fastcpt.training.model import load_model
from gguf_file import TOKENS, shape_facts, tokenizer_facts, write_gguf
from training.tiny import llama

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def as_ggml(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The weights as llama.cpp's converter writes them: rows of a head's halves in turn."""
    written = {}
    for name, weight in model.state_dict().items():
        values = weight.float().numpy()
        if name == "lm_head.weight":
            continue
        if name == "model.embed_tokens.weight":
            theirs = "token_embd.weight"
        elif name == "model.norm.weight":
            theirs = "output_norm.weight"
        else:
            _, _, layer, part = name.removesuffix(".weight").split(".", 3)
            theirs = f"blk.{layer}.{NAMES[part]}.weight"
            heads = {"attn_q": 4, "attn_k": 2}.get(NAMES[part])
            if heads:
                size = len(values) // heads
                order = [
                    head * size + half * (size // 2) + n
                    for head in range(heads)
                    for n in range(size // 2)
                    for half in (0, 1)
                ]
                values = values[order]
        written[theirs] = values
    return written


def test_logits_are_those_of_the_model_in_the_file(tmp_path: Path) -> None:
    shape = {
        "vocab_size": len(TOKENS),
        "rope_theta": 100_000.0,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    original = llama(seed=3, **shape)
    for weight in original.parameters():
        weight.data = weight.data.bfloat16().float()  # what bfloat16 can say
    facts = {**shape_facts(layers=2), **tokenizer_facts()}
    file = write_gguf(tmp_path / "tiny.gguf", facts, as_ggml(original))
    made = convert(file, tmp_path)
    loaded, _ = load_model(made, "sdpa", dtype="float32")
    for name, weight in original.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    ids = torch.arange(5, 60)[None]
    torch.testing.assert_close(loaded(ids).logits, original(ids).logits)
    assert loaded.config.rms_norm_eps == 1e-5
    # the tokenizer as transformers loads it: a turn ends with its own token, a text with another
    tokenizer = AutoTokenizer.from_pretrained(made)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer("the", add_special_tokens=True)["input_ids"] == [
        TOKENS.index("t"),
        TOKENS.index("h"),
        TOKENS.index("e"),
    ]
    assert tokenizer.chat_template == "{{ messages }}"
