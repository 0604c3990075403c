"""The trainer's rule for activation checkpointing: what a step keeps in GPU memory and what it recomputes.

No torch, as a plan uses it to predict what the trainer will do. Symbols as in ``fastcpt.shapes``; ``T`` is
the number of tokens of a micro-batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from fastcpt.recipe_sections import Lora, OptimizerStates
from fastcpt.shapes import Shape

LOGITS_AT_ONCE = (
    4096  # tokens whose logits exist at the same time: 1 GB for a vocabulary of 128,000
)
LOGITS_ON_FULL_GPU = 1024  # the same if layers' inputs are offloaded to the host
FILL = 0.94  # usable share of the memory that torch sees; the rest is for fragmentation and kernels
MODEL_BYTES = 2  # per weight in bfloat16
MOMENTS_BLOCK = 256  # 8-bit moments that share a float32 scale
# Bytes per trained weight apart from the bf16 weight and gradient: moments, and with float32 a weight copy
STATE_BYTES: dict[OptimizerStates, float] = {
    "float32": 12,
    "bfloat16": 4,
    "int8": 2 * (1 + 4 / MOMENTS_BLOCK),
}


@dataclass(frozen=True)
class ActivationCheckpointing:
    """``layers`` of ``total`` drop activations, which their backward recomputes."""

    kind: Literal[
        "none", "mlp", "full"
    ]  # recompute nothing, the feed-forward half, the whole layer
    layers: int
    total: int
    gathered: bool = False  # ZeRO-3's weights stay gathered between steps
    keep_fp8: bool = False  # FP8 weights are kept, in both layouts, for all micro-batches of a step
    one_byte: bool = False  # frozen matrices are kept only in FP8, whole on each rank
    on_host: int = 0  # layers with their input in host memory; if any, the embedding is there too

    @property
    def logits_at_once(self) -> int:
        """Tokens whose logits exist at the same time."""
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

    ``wanted``: True recomputes all layers, False none, whether it fits or not. With LoRA in FP8, frozen
    weights are kept in one byte; on several ranks only if that needs no more recomputation than
    partitioning them in bfloat16.
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
    """For weights in bfloat16, partitioned over the ranks.

    If not everything fits, recompute the feed-forward halves of as many layers as necessary; if that is
    not enough, whole layers. If there is room to spare, ZeRO-3's weights stay gathered. Bytes, divided by
    the ranks: 2 per weight, and per trained weight 2 for the gradient and ``STATE_BYTES``; with an
    offloaded optimizer the latter are in host memory.
    """
    layers, block, head = shape.num_hidden_layers, shape.block_parameters, shape.head_parameters
    attention, mlp = fused_block_bytes(shape, lora, fp8)
    # with an offloaded optimizer, a single rank still keeps its gradients
    on_gpu = 2 + STATE_BYTES[states] if not offload else 2 if ranks == 1 else 0
    trained = 0 if lora else on_gpu * shape.parameters / ranks
    room -= 2 * shape.parameters / ranks + trained
    room -= 8 * shape.vocab_size * min(tokens, LOGITS_AT_ONCE) + 2 * head * (1 if lora else 2)
    room -= 8 * block + 8 * tokens * shape.intermediate_size
    room -= layers * tokens * 2 * shape.hidden_size  # each block's input is always kept
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
    """For frozen matrices in one byte, whole on each rank; with their transposed copies, in one more byte,
    if that needs no recomputation.

    Other bytes, divided by the ranks: 2 per weight of embedding, output layer and norms, and 16 per weight
    of the adapters (weight, gradient, float32 copy, two moments); on several ranks also the gathered output
    layer. If not even one layer's activations fit, the inputs of as few layers as possible go to host
    memory, and the embedding.
    """
    layers, block, head = shape.num_hidden_layers, shape.block_parameters, shape.head_parameters
    attention, mlp = fused_block_bytes(shape, lora, fp8=True)
    rest = shape.parameters - layers * block
    entering = 2 * tokens * shape.hidden_size
    kept = tokens * (attention + mlp) - entering
    fixed = layers * block + (2 * rest + 16 * shape.lora_parameters(lora)) / ranks
    fixed += 2 * head if ranks > 1 else 0
    # the current block's transposed copies and the gradients of its feed-forward products
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
    room -= kept  # of the layer that is being recomputed
    if room >= 0:
        return found
    fewer = min(tokens, LOGITS_AT_ONCE) - min(tokens, LOGITS_ON_FULL_GPU)
    room += 8 * shape.vocab_size * fewer
    room += 0 if shape.tie_word_embeddings else 2 * head / ranks
    on_host = min(layers, max(1, math.ceil(-room / entering)))
    return replace(found, layers=layers, on_host=on_host)


def fused_block_bytes(shape: Shape, lora: Lora | None, fp8: bool) -> tuple[int, int]:
    """Bytes per token that a fused block keeps for its backward: in attention, and in the feed-forward half.

    These are its inputs, q, k, v before and after the rotary embedding (and before query norms, if any),
    attention's output, gate and up; also the inputs of products with trained weights, in the product's
    precision, or with LoRA the adapters' inputs.
    """
    h, f = shape.hidden_size, shape.intermediate_size
    q, k = shape.queries, shape.keys
    entering = 1 if fp8 else 2
    attention = 2 * h + 2 * (q + 2 * k) + 2 * (q + k) + 2 * q
    if shape.family.query_norms == "head":
        attention += 2 * (q + k)
    if not lora:
        return attention + entering * h + (q if fp8 else 0), 4 * f + 2 * h + entering * (f + h)
    # with dropout also its mask, and attention's output after dropout
    dropout = bool(lora.lora_dropout)
    attention += 2 * h + (h + 3 * q if dropout else 0)
    mlp = 4 * f + 2 * h
    if {"gate_proj", "up_proj"} & set(lora.target_modules):
        mlp += (3 if dropout else 2) * h
    if "down_proj" in lora.target_modules:
        mlp += (3 if dropout else 2) * f
    return attention, mlp


def checkpoint_bytes_per_weight(states: OptimizerStates) -> float:
    """Bytes in a checkpoint per trained weight: the optimizer's weight and its moments."""
    return STATE_BYTES[states] + (0 if states == "float32" else MODEL_BYTES)


def training_disk_bytes(trained: int, save_total_limit: int, states: OptimizerStates) -> int:
    """Disk space that a training needs: the kept checkpoints, one more, and the model."""
    return math.ceil(
        trained * (checkpoint_bytes_per_weight(states) * (save_total_limit + 1) + MODEL_BYTES)
    )
