"""What of a training step a GPU's memory keeps, and what is recomputed; the trainer's own rule.

No torch: a plan foresees by it what the trainer will do. Symbols as in ``fastcpt.shapes``; ``T`` tokens of
a micro-batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from fastcpt.recipe_sections import Lora, OptimizerStates
from fastcpt.shapes import Shape

LOGITS_AT_ONCE = 4096  # tokens whose logits exist at one time: 1 GB for 128,000 words
LOGITS_ON_FULL_GPU = 1024  # the same where layers' inputs have to wait on the host
FILL = 0.94  # of the memory that torch sees; the rest is for fragments and kernels
MODEL_BYTES = 2  # a weight in bfloat16
MOMENTS_BLOCK = 256  # 8-bit moments that share a float32 scale
# a trained weight, beside itself and its gradient in bf16: float32 copy and moments; moments
STATE_BYTES: dict[OptimizerStates, float] = {
    "float32": 12,
    "bfloat16": 4,
    "int8": 2 * (1 + 4 / MOMENTS_BLOCK),
}


@dataclass(frozen=True)
class ActivationCheckpointing:
    """``layers`` of the ``total`` drop activations that their backward computes again."""

    kind: Literal["none", "mlp", "full"]  # nothing, the feed-forward half, the whole layer
    layers: int
    total: int
    gathered: bool = False  # ZeRO-3's weights stay whole between steps
    keep_fp8: bool = False  # FP8 weights stay, in both layouts, for all micro-batches of a step
    one_byte: bool = False  # frozen matrices are kept in FP8 alone, whole on each rank
    on_host: int = 0  # layers whose input waits in the host's memory; the embedding then too

    @property
    def logits_at_once(self) -> int:
        """Tokens whose logits exist at one time."""
        return LOGITS_ON_FULL_GPU if self.on_host else LOGITS_AT_ONCE

    def __str__(self) -> str:
        mlp = f"{self.layers}/{self.total} feed-forward layers recomputed"
        whole = f"activations of {self.layers}/{self.total} layers recomputed"
        said = {"full": whole, "mlp": mlp, "none": "activations kept"}[self.kind]
        said += ", weights kept gathered" if self.gathered else ""
        said += ", frozen weights in one byte" if self.one_byte else ""
        return said + (f", inputs of {self.on_host} layers on the host" if self.on_host else "")


def activation_checkpointing(
    shape: Shape,
    tokens: int,
    ranks: int,
    usable_bytes: float,
    *,
    lora: Lora | None,
    fp8: bool,
    offload: bool,
    states: OptimizerStates = "float32",
    fill: float | None = None,
    wanted: Literal["auto"] | bool = "auto",
) -> ActivationCheckpointing:
    """The least recomputation with which ``T`` = ``tokens`` fit into ``fill`` of ``usable_bytes``.

    ``wanted``: True recomputes all layers, False nothing, whether it fits or not. Frozen weights are
    kept in one byte under LoRA in FP8, on several ranks only where that takes no more recomputation
    than to share them out in bfloat16.
    """
    room = (FILL if fill is None else fill) * usable_bytes
    shared = _with_shared_weights(shape, tokens, ranks, room, lora, fp8, offload, states)
    found = shared
    if lora and fp8:
        own = _with_one_byte(shape, tokens, ranks, room, lora)
        effort = {"none": 0, "mlp": 1, "full": 2}
        if ranks == 1 or (effort[own.kind], own.layers, own.on_host) <= (
            effort[shared.kind],
            shared.layers,
            0,
        ):
            found = own
    if wanted == "auto":
        return found
    if wanted:
        return replace(found, kind="full", layers=found.total, gathered=False, keep_fp8=False)
    kept = replace(found, kind="none", layers=0, on_host=0)
    return kept if found.one_byte else replace(kept, keep_fp8=fp8)


def _with_shared_weights(
    shape: Shape,
    tokens: int,
    ranks: int,
    room: float,
    lora: Lora | None,
    fp8: bool,
    offload: bool,
    states: OptimizerStates,
) -> ActivationCheckpointing:
    """Weights in bfloat16, shared out over the ranks.

    Nothing is recomputed where all fits; else the feed-forward halves of as many layers as it takes; else
    as many whole layers. With room to spare ZeRO-3's weights stay whole. Bytes: 2 a weight, over the
    ranks; 2 a trained weight's gradient and ``STATE_BYTES``, over the ranks; where the optimizer is
    offloaded, these are the hosts'.
    """
    layers, block, head = shape.num_hidden_layers, shape.block_parameters, shape.head_parameters
    attention, mlp = fused_block_bytes(shape, lora, fp8)
    # offloaded, the optimizer is the hosts'; a single rank keeps its gradients all the same
    on_gpu = 2 + STATE_BYTES[states] if not offload else 2 if ranks == 1 else 0
    trained = 0 if lora else on_gpu * shape.parameters / ranks
    room -= 2 * shape.parameters / ranks + trained
    room -= 8 * shape.vocab_size * min(tokens, LOGITS_AT_ONCE) + 2 * head * (1 if lora else 2)
    room -= 8 * block + 8 * tokens * shape.intermediate_size
    room -= layers * tokens * 2 * shape.hidden_size  # each block's input stays in any case
    fp8_weights = 2 * block if fp8 else 0
    kept = tokens * (attention + mlp - 2 * shape.hidden_size)
    spare = room - layers * (kept + fp8_weights)
    if spare >= 0:
        gathered = ranks > 1 and spare >= 2 * shape.parameters
        return ActivationCheckpointing("none", 0, layers, gathered, keep_fp8=fp8)
    if spare + layers * tokens * mlp >= 0:
        some = min(layers, math.ceil(-spare / (tokens * mlp)))
        return ActivationCheckpointing("mlp", some, layers, keep_fp8=fp8)
    whole = min(layers, int(max(0.0, room) // (kept + fp8_weights)))
    return ActivationCheckpointing("full", layers - whole, layers)


def _with_one_byte(
    shape: Shape, tokens: int, ranks: int, room: float, lora: Lora
) -> ActivationCheckpointing:
    """Frozen matrices in one byte, whole on each rank; their transposed copies, in one more, where nothing
    has to be recomputed for them.

    Bytes besides: 2 a weight of embedding, output layer and norms and 16 of the adapters (weight, gradient,
    float32 copy, two moments), over the ranks; of the output layer gathered, where they are several. Where not
    even one layer's activations find room, layers' inputs go to the host, as few as it takes, with the
    embedding.
    """
    layers, block, head = shape.num_hidden_layers, shape.block_parameters, shape.head_parameters
    attention, mlp = fused_block_bytes(shape, lora, fp8=True)
    rest = shape.parameters - layers * block
    entering = 2 * tokens * shape.hidden_size
    kept = tokens * (attention + mlp) - entering
    fixed = layers * block + (2 * rest + 16 * shape.lora_parameters(lora)) / ranks
    fixed += 2 * head if ranks > 1 else 0
    # the block at work: its transposed copies, the gradients of its feed-forward products
    fixed += block + 8 * tokens * shape.intermediate_size
    room -= fixed + 8 * shape.vocab_size * min(tokens, LOGITS_AT_ONCE) + layers * entering
    found = ActivationCheckpointing("none", 0, layers, one_byte=True)
    spare = room - layers * kept
    if spare >= 0:
        transposed = (layers - 1) * block
        left = spare - transposed if spare >= transposed else spare
        gathered = ranks > 1 and left >= 2 * rest
        return replace(found, keep_fp8=spare >= transposed, gathered=gathered)
    if spare + layers * tokens * mlp >= 0:
        return replace(found, kind="mlp", layers=min(layers, math.ceil(-spare / (tokens * mlp))))
    found = replace(found, kind="full", layers=layers - min(layers, int(max(0.0, room) // kept)))
    room -= kept  # of the one that is computed again
    if room >= 0:
        return found
    fewer = min(tokens, LOGITS_AT_ONCE) - min(tokens, LOGITS_ON_FULL_GPU)
    room += 8 * shape.vocab_size * fewer
    room += 0 if shape.tie_word_embeddings else 2 * head / ranks
    on_host = min(layers, max(1, math.ceil(-room / entering)))
    return replace(found, layers=layers, on_host=on_host)


def fused_block_bytes(shape: Shape, lora: Lora | None, fp8: bool) -> tuple[int, int]:
    """Bytes a token that a fused block keeps for its backward: of its attention, of its feed-forward half.

    Its inputs, q, k, v before and after rotation (and before the norms that some families have there),
    attention's output, gate and up; what enters a product whose weight is trained in that product's
    precision, with LoRA the adapters' inputs in its place.
    """
    h, f = shape.hidden_size, shape.intermediate_size
    q, k = shape.queries, shape.keys
    entering = 1 if fp8 else 2
    attention = 2 * h + 2 * (q + 2 * k) + 2 * (q + k) + 2 * q
    if shape.family.query_norms == "head":
        attention += 2 * (q + k)
    if not lora:
        return attention + entering * h + (q if fp8 else 0), 4 * f + 2 * h + entering * (f + h)
    # with dropout its mask, and the dropped copy of attention's output
    dropout = bool(lora.lora_dropout)
    attention += 2 * h + (h + 3 * q if dropout else 0)
    mlp = 4 * f + 2 * h
    if {"gate_proj", "up_proj"} & set(lora.target_modules):
        mlp += (3 if dropout else 2) * h
    if "down_proj" in lora.target_modules:
        mlp += (3 if dropout else 2) * f
    return attention, mlp


def checkpoint_bytes_per_weight(states: OptimizerStates) -> float:
    """Bytes of a checkpoint a trained weight: the weight as the optimizer has it, and its moments."""
    return STATE_BYTES[states] + (0 if states == "float32" else MODEL_BYTES)


def training_disk_bytes(trained: int, save_total_limit: int, states: OptimizerStates) -> int:
    """Disk that a training takes: its checkpoints, one more than are kept, and its model."""
    return math.ceil(
        trained * (checkpoint_bytes_per_weight(states) * (save_total_limit + 1) + MODEL_BYTES)
    )
