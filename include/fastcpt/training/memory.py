"""What of a step stays on the GPU, and what is computed or fetched again."""

from __future__ import annotations

import math
from typing import Any

from fastcpt.families import head_width
from fastcpt.recipe import Training
from fastcpt.training.model import (
    CHUNK,
)


class StepMemory:
    """What stays on the GPU and what is computed or fetched again, from what fits.

    Bytes: 2 a weight, over the ranks; 14 a trained weight (gradient, float32 copy, two moments),
    over the ranks; offloaded, the 14 are the hosts'. For each token and layer the fused block keeps
    its inputs, q, k, v before and after rotation, the attention's output and the gate and up
    products; in FP8 a second, 1-byte form of what enters a product. ``gpu_bytes`` is None on CPUs,
    where all is kept. Plans hold the same rule (``fastcpt.planning.costs.as_the_trainer_runs``).
    """

    SHARE = 0.94  # of the GPU's memory; the rest is for fragments and kernels

    def __init__(
        self,
        shape: Any,
        training: Training,
        size: int,
        gpu_bytes: int | None,
        world: int,
        lora: bool,
        dropout: bool,
        fp8: bool,
        offload: bool = False,
    ) -> None:
        h, inner, self.layers = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers
        q = shape.num_attention_heads * head_width(shape)
        kv = shape.num_key_value_heads * head_width(shape)
        self.block = block_parameters(shape)
        vocabulary = shape.vocab_size * h
        self.recomputed = self.mlp_recomputed = 0
        self.keep_fp8 = self.gathered = False
        wanted = training.gradient_checkpointing
        if gpu_bytes is None or wanted is True:
            self.recomputed = self.layers if wanted is True else 0
            return
        tokens = training.per_device_train_batch_size * size
        weights = self.layers * self.block + vocabulary * (1 if shape.tie_word_embeddings else 2)
        entering = 1 if fp8 else 2
        attention = (
            2 * h + 2 * (q + 2 * kv) + 2 * (q + kv) + 2 * q + (entering * h if not lora else 2 * h)
        )
        if fp8 and not lora:
            attention += q
        if dropout:  # its masks, and attention's output once more
            attention += h + 3 * q
        mlp = 4 * inner + 2 * h + (0 if lora else entering * (inner + h))
        # offloaded, the optimizer is the hosts'; a single rank keeps its gradients all the same
        trained = 14 if not offload else 2 if world == 1 else 0
        states = 2 * weights / world + (0 if lora else trained * weights / world)
        head = min(tokens, CHUNK) * shape.vocab_size * 8 + 2 * vocabulary * (1 if lora else 2)
        fp8_weights = 2 * self.layers * self.block if fp8 else 0
        room = self.SHARE * gpu_bytes
        room -= states + head + 4 * 2 * self.block + tokens * 4 * inner * 2
        room -= self.layers * tokens * 2 * h  # the input of each block stays in any case
        kept = tokens * (attention + mlp - 2 * h)
        fp8_a_block = fp8_weights / self.layers
        if room >= self.layers * (kept + fp8_a_block) or wanted is False:
            room -= self.layers * (kept + fp8_a_block)
            self.keep_fp8 = fp8
        elif room >= self.layers * (kept - tokens * mlp + fp8_a_block):
            saved = self.layers * (kept + fp8_a_block) - room
            self.mlp_recomputed = min(self.layers, math.ceil(saved / (tokens * mlp)))
            room = 0.0
            self.keep_fp8 = fp8
        else:
            whole = max(0.0, room) // (kept + fp8_a_block)
            self.recomputed = self.layers - min(self.layers, int(whole))
            room = 0.0
        self.gathered = world > 1 and room >= 2 * weights

    @property
    def level(self) -> str:
        """What is recomputed, in the planner's words."""
        return "full" if self.recomputed else "mlp" if self.mlp_recomputed else "none"

    def __str__(self) -> str:
        if self.recomputed:
            return f"activations of {self.recomputed}/{self.layers} layers recomputed"
        mlp = f"{self.mlp_recomputed}/{self.layers} feed-forward layers recomputed"
        kept = mlp if self.mlp_recomputed else "activations kept"
        return kept + (", weights kept gathered" if self.gathered else "")


def block_parameters(shape: Any) -> int:
    h, inner = shape.hidden_size, shape.intermediate_size
    q = shape.num_attention_heads * head_width(shape)
    kv = shape.num_key_value_heads * head_width(shape)
    return int(h * (q + 2 * kv) + q * h + 3 * h * inner + 2 * h)
