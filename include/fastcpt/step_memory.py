"""What of a training step a GPU's memory keeps, and what is recomputed; the trainer's own rule.

No torch: a plan foresees by it what the trainer will do. Symbols as in ``fastcpt.shapes``; ``T`` tokens of
a micro-batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fastcpt.recipe_sections import Lora
from fastcpt.shapes import Shape

LOGITS_AT_ONCE = 4096  # tokens whose logits exist at one time: 1 GB for 128,000 words
FILL = 0.94  # of the memory that torch sees; the rest is for fragments and kernels
CHECKPOINT_BYTES = 12  # a trained weight: float32 and Adam's two moments
MODEL_BYTES = 2  # a weight in bfloat16


@dataclass(frozen=True)
class ActivationCheckpointing:
    """``layers`` of the ``total`` drop activations that their backward computes again."""

    kind: Literal["none", "mlp", "full"]  # nothing, the feed-forward half, the whole layer
    layers: int
    total: int
    gathered: bool = False  # ZeRO-3's weights stay whole between steps
    keep_fp8: bool = False  # FP8 weights stay for all micro-batches of a step

    def __str__(self) -> str:
        if self.kind == "full":
            return f"activations of {self.layers}/{self.total} layers recomputed"
        mlp = f"{self.layers}/{self.total} feed-forward layers recomputed"
        kept = mlp if self.kind == "mlp" else "activations kept"
        return kept + (", weights kept gathered" if self.gathered else "")


def activation_checkpointing(
    shape: Shape,
    tokens: int,
    ranks: int,
    usable_bytes: float,
    *,
    lora: Lora | None,
    fp8: bool,
    offload: bool,
    fill: float | None = None,
    never: bool = False,
) -> ActivationCheckpointing:
    """The least recomputation with which ``T`` = ``tokens`` fit into ``fill`` of ``usable_bytes``.

    Nothing is recomputed where all fits; else the feed-forward halves of as many layers as it takes; else
    as many whole layers. With room to spare ZeRO-3's weights stay whole. ``never`` recomputes nothing,
    whether it fits or not. Bytes: 2 a weight, over the ranks; 14 a trained weight (gradient, float32 copy,
    two moments), over the ranks; where the optimizer is offloaded, the 14 are the hosts'.
    """
    layers, block, head = shape.num_hidden_layers, shape.block_parameters, shape.head_parameters
    attention, mlp = fused_block_bytes(shape, lora, fp8)
    # offloaded, the optimizer is the hosts'; a single rank keeps its gradients all the same
    on_gpu = 14 if not offload else 2 if ranks == 1 else 0
    trained = 0 if lora else on_gpu * shape.parameters / ranks
    room = (FILL if fill is None else fill) * usable_bytes
    room -= 2 * shape.parameters / ranks + trained
    room -= 8 * shape.vocab_size * min(tokens, LOGITS_AT_ONCE) + 2 * head * (1 if lora else 2)
    room -= 8 * block + 8 * tokens * shape.intermediate_size
    room -= layers * tokens * 2 * shape.hidden_size  # each block's input stays in any case
    fp8_weights = 2 * block if fp8 else 0
    kept = tokens * (attention + mlp - 2 * shape.hidden_size)
    spare = room - layers * (kept + fp8_weights)
    if spare >= 0 or never:
        gathered = ranks > 1 and spare >= 2 * shape.parameters
        return ActivationCheckpointing("none", 0, layers, gathered, keep_fp8=fp8)
    if spare + layers * tokens * mlp >= 0:
        some = min(layers, math.ceil(-spare / (tokens * mlp)))
        return ActivationCheckpointing("mlp", some, layers, keep_fp8=fp8)
    whole = min(layers, int(max(0.0, room) // (kept + fp8_weights)))
    return ActivationCheckpointing("full", layers - whole, layers)


def fused_block_bytes(shape: Shape, lora: Lora | None, fp8: bool) -> tuple[int, int]:
    """Bytes a token that a fused block keeps for its backward: of its attention, of its feed-forward half.

    Its inputs, q, k, v before and after rotation, attention's output, gate and up; what enters a product
    whose weight is trained in that product's precision, with LoRA the adapters' inputs in its place.
    """
    h, f = shape.hidden_size, shape.intermediate_size
    q, k = shape.queries, shape.keys
    entering = 1 if fp8 else 2
    attention = 2 * h + 2 * (q + 2 * k) + 2 * (q + k) + 2 * q
    if lora:
        # with dropout its mask, and the dropped copy of attention's output
        attention += 2 * h + (h + 3 * q if lora.lora_dropout else 0)
        return attention, 4 * f + 2 * h
    return attention + entering * h + (q if fp8 else 0), 4 * f + 2 * h + entering * (f + h)


def training_disk_bytes(trained: int, save_total_limit: int) -> int:
    """Disk that a training takes: its checkpoints, one more than are kept, and its model."""
    return trained * (CHECKPOINT_BYTES * (save_total_limit + 1) + MODEL_BYTES)
