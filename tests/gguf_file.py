"""Writes small GGUF files according to ggml's ``docs/gguf.md``."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_cpp import CONTROL, LETTERS, USER_DEFINED

ALIGNMENT = 32
WITHOUT = {0x04, 0xF1, 0xFF}  # bytes that this vocabulary has no token for, as SmolLM2's has not
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["a b", "ab c", "Ġ t", "Ġt h", "Ġth e", "Ġ Ġ", "1 2", "Ã ©", "' s", "i n", "Ġ in", "e n"]
LETTERS_KEPT = [letter for byte, letter in sorted(LETTERS.items()) if byte not in WITHOUT]
TOKENS = [*SPECIAL, *LETTERS_KEPT, *(pair.replace(" ", "") for pair in MERGES), "<mark>"]
KINDS = [CONTROL] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL) - 1) + [USER_DEFINED]


def tokenizer_facts(pre: str = "smollm") -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": KINDS,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages }}",
    }


def shape_facts(
    layers: int = 1, width: int = 32, inner: int = 64, heads: int = 4, groups: int = 2
) -> dict[str, Any]:
    return {
        "general.architecture": "llama",
        "general.name": "tiny",
        "general.license": "apache-2.0",
        "llama.block_count": layers,
        "llama.context_length": 512,
        "llama.embedding_length": width,
        "llama.feed_forward_length": inner,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": groups,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 100_000.0,
    }


def shapes(layers: int = 1, width: int = 32, inner: int = 64, groups: int = 16) -> dict[str, Any]:
    """The tensors' shapes by name; ``groups`` is the width of the keys."""
    block = {
        "attn_norm": (width,),
        "ffn_norm": (width,),
        "attn_q": (width, width),
        "attn_k": (groups, width),
        "attn_v": (groups, width),
        "attn_output": (width, width),
        "ffn_gate": (inner, width),
        "ffn_up": (inner, width),
        "ffn_down": (width, inner),
    }
    named = {
        f"blk.{n}.{name}.weight": shape for n in range(layers) for name, shape in block.items()
    }
    ends = {"token_embd.weight": (len(TOKENS), width), "output_norm.weight": (width,)}
    return {**ends, **named}


def write_gguf(
    file: Path,
    facts: Mapping[str, Any],
    tensors: Mapping[str, npt.NDArray[np.float32]] | None = None,
    kind: int = 0,
) -> Path:
    """A file of float32 tensors (zeros where none are given), said to be of ggml type ``kind``."""
    if tensors is None:
        tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes().items()}
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(facts))
    head += b"".join(_text(key) + _value(value) for key, value in facts.items())
    data = b""
    for name, tensor in tensors.items():
        head += _text(name) + struct.pack("<I", tensor.ndim)
        head += struct.pack(f"<{tensor.ndim}Q", *reversed(tensor.shape))
        head += struct.pack("<IQ", kind, len(data))
        data += tensor.astype("<f4").tobytes()
        data += b"\0" * (-len(data) % ALIGNMENT)
    file.write_bytes(head + b"\0" * (-len(head) % ALIGNMENT) + data)
    return file


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    assert isinstance(value, Sequence)
    inner = 8 if isinstance(value[0], str) else 5
    items = (_text(item) if inner == 8 else struct.pack("<i", item) for item in value)
    return struct.pack("<IIQ", 9, inner, len(value)) + b"".join(items)
