"""The cost model of a training step: operations, memory, seconds. Every formula has its source.

Symbols: ``h`` hidden, ``f`` intermediate, ``q``/``k`` widths of queries and keys, ``L`` layers, ``V``
vocabulary, ``S`` sequence, ``T`` tokens of a micro-batch, ``N`` parameters, ``R`` ranks.

Operations (counted as in Megatron and NVIDIA's tables): 2 per multiply-add; forward ``2 N_mm``, backward
twice that; attention's two forward products are ``4 L q S`` per token, half of it causal.

Seconds are the sum of what does not overlap on a GPU: matrix products by precision, attention, the memory
traffic between them, the optimizer, the host's work per micro-batch, and communication that computation
does not hide. Each part is a physical quantity divided by the chip's peak and an efficiency. The
efficiencies were fitted once, on the rows of ``measured.yaml``. For another model, sequence or chip a part
scales with its physical quantity.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from fastcpt import step_memory
from fastcpt.gpus import Gpu
from fastcpt.planning.hardware import Hardware
from fastcpt.recipe_sections import Lora, OptimizerStates
from fastcpt.shapes import Shape
from fastcpt.step_memory import (
    LOGITS_AT_ONCE,
    LOGITS_ON_FULL_GPU,
    STATE_BYTES,
    activation_checkpointing,
    fused_block_bytes,
)

# What the backward recomputes: nothing, the feed-forward products (only the trainer's fused blocks), the
# whole block.
Checkpointing = Literal["none", "mlp", "full"]
# The kernels between the matrix products: transformers' own, liger's, the trainer's fused blocks.
Kernels = Literal["plain", "liger", "fused"]
Attention = Literal["sdpa", "flash", "cudnn"]

LIVE_PARAMETERS = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters
SUB_GROUP = 1_000_000_000  # DeepSpeed's sub_group_size
UNSEEN = 0.55e9  # bytes that nvidia-smi reports but torch does not see
RUNTIME_GB = 1.5  # CUDA context and NCCL, outside torch's memory
USABLE = 0.97  # of a GPU's memory; the rest is lost to fragmentation
BYTES_BF16 = 2
# Bytes per trained weight that a step reads and writes: gradient, weight and moments, float32 copy
STEP_BYTES: dict[OptimizerStates, int] = {"float32": 30, "bfloat16": 14, "int8": 10}


@dataclass(frozen=True)
class Job:
    """One training's step on one GPU. ZeRO-3 partitions parameters over ``ranks`` GPUs."""

    shape: Shape
    sequence: int
    micro_batch: int
    accumulation: int
    ranks: int
    lora: Lora | None = None
    fp8: bool = False
    checkpointing: Checkpointing = "none"
    layers_recomputed: int | None = None  # how many layers are recomputed; None: all
    gathered: bool = False  # ZeRO-3's weights stay gathered between steps
    one_byte: bool = False  # frozen matrices are kept only in FP8, whole on each rank
    keep_fp8: bool = False  # and their transposed copies are kept too
    on_host: int = 0  # layers with their input in host memory; if any, the embedding is there too
    offload: bool = False  # gradients and optimizer on the host
    attention: Attention = "flash"
    attended: float | None = None  # sum(len^2) / sum(len) of packed documents; else the sequence
    kernels: Kernels = "fused"
    states: OptimizerStates = "float32"
    whole_logits: bool = False  # not chunked or fused

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_batch * self.sequence

    @property
    def trained(self) -> int:
        """Parameters with gradients."""
        return self.shape.lora_parameters(self.lora) if self.lora else self.shape.parameters

    @property
    def shared_weights(self) -> int:
        """Parameters that ZeRO-3 partitions over the ranks."""
        own = self.shape.num_hidden_layers * self.shape.block_parameters if self.one_byte else 0
        return self.shape.parameters - own

    @property
    def recomputed_share(self) -> float:
        """Share of the layers that are recomputed."""
        if self.checkpointing == "none":
            return 0.0
        layers = self.shape.num_hidden_layers
        return 1.0 if self.layers_recomputed is None else self.layers_recomputed / layers

    @property
    def recomputation(self) -> str:
        """``checkpointing`` in words, with the number of layers if not all are recomputed."""
        if self.layers_recomputed is None:
            return self.checkpointing
        return f"{self.checkpointing} of {self.layers_recomputed}/{self.shape.num_hidden_layers} layers"

    @property
    def method(self) -> str:
        return "lora" if self.lora else "full"

    @property
    def precision(self) -> str:
        return "fp8" if self.fp8 else "bf16"


# Operations


def attention_flops(shape: Shape, sequence: float) -> float:
    """Forward operations per token, causal half: ``2 L q S``. For packed documents ``S`` is
    ``sum(len^2) / sum(len)``."""
    return 2.0 * shape.num_hidden_layers * shape.queries * sequence


def model_flops(shape: Shape, sequence: float, lora: Lora | None = None) -> float:
    """Operations per training token without recomputation, as counted for MFU.

    Full: ``6 N_mm + 3 att``: 51.5 GFLOP for Llama 3 8B at 8192, as in NVIDIA's tables.
    LoRA: ``4 N_mm + 3 att + 6 N_lora``: frozen weights need no weight gradient.
    """
    attention = 3 * attention_flops(shape, sequence)
    if lora is None:
        return 6.0 * shape.matrix_parameters + attention
    return 4.0 * shape.matrix_parameters + attention + 6.0 * shape.lora_parameters(lora)


def recomputed_flops(job: Job) -> float:
    """Operations per token added by recomputation: the blocks' forward (``2 (N_mm - V h) + att``), or for
    ``mlp`` gate and up, in the layers that are recomputed."""
    shape = job.shape
    blocks = 2.0 * (shape.matrix_parameters - shape.head_parameters)
    added = {
        "none": 0.0,
        "mlp": 4.0 * shape.num_hidden_layers * shape.hidden_size * shape.intermediate_size,
        "full": blocks + attention_flops(shape, job.attended or job.sequence),
    }
    return added[job.checkpointing] * job.recomputed_share


# Memory


def activation_bytes(job: Job, checkpointing: Checkpointing) -> float:
    """Bytes per token that a block keeps for its backward.

    ``none``: two norms' inputs (2 h each), rotated queries, keys, values, attention's output, gate and up
    (2 f each) and the inputs of the linear layers, 2 B each; in FP8 each layer keeps its own input in 1 B.
    ``full``: the block's input, ``2 h``. The trainer's fused blocks also keep queries and keys before the
    rotation, and ``mlp`` drops their feed-forward half.
    """
    h, f = job.shape.hidden_size, job.shape.intermediate_size
    q, k = job.shape.queries, job.shape.keys
    if checkpointing == "full":
        return 2 * h
    if job.kernels == "fused":
        attention, mlp = fused_block_bytes(job.shape, job.lora, job.fp8)
        return attention + mlp if checkpointing == "none" else attention
    between = 2 * (h + q + 2 * k + q + h + job.shape.widened)
    if job.lora:
        # only adapted layers keep their input, after dropout in bf16, and dropout's mask
        adapted = sum(job.shape.matrix(name)[0] for name in job.lora.target_modules)
        return between + 3 * adapted
    if not job.fp8:
        return between + 2 * (2 * h + f)
    return between + 5 * h + q + f


def memory_parts(job: Job) -> dict[str, float]:
    """Bytes per GPU, by part.

    States, divided by the ranks: 16 B per trained parameter (bf16 weight 2 and gradient 2, fp32 master 4
    and two moments 8), 2 B per frozen one; ZeRO paper (Rajbhandari 2020), section 3.1. Without the master
    8 (moments in bf16) or 6.03 (8 bits). Matrices in one byte are whole on each rank.
    """
    shape, ranks, tokens = job.shape, job.ranks, job.tokens
    layers, block = shape.num_hidden_layers, shape.block_parameters
    on_host = job.offload
    frozen = job.trained if job.lora else 0
    whole, less = activation_bytes(job, "none"), activation_bytes(job, job.checkpointing)
    kept = layers * tokens * (job.recomputed_share * less + (1 - job.recomputed_share) * whole)
    if job.kernels != "fused":
        # the current block needs all its activations, whatever the others keep
        kept += tokens * whole
    kept -= 2 * shape.hidden_size * tokens * job.on_host
    away = shape.head_parameters if job.on_host and not shape.tie_word_embeddings else 0
    parts = {
        "weights": BYTES_BF16 * (job.shared_weights - away + frozen) / ranks,
        # a single rank keeps its gradients on the GPU even if the optimizer is on the host
        "gradients": 0.0 if on_host and ranks > 1 else BYTES_BF16 * job.trained / ranks,
        "optimizer": 0.0 if on_host else STATE_BYTES[job.states] * job.trained / ranks,
        "activations": kept,
        "logits": _logit_bytes(job),
        "gather_buffers": 0.0,
    }
    if ranks > 1 and job.gathered:
        parts["gather_buffers"] = BYTES_BF16 * job.shared_weights
    elif ranks > 1:
        # DeepSpeed's own limit; fused blocks are gathered whole: the current one, the next one, and
        # the gradients of both
        live = 4 * block if job.kernels == "fused" else max(LIVE_PARAMETERS, 2 * block)
        live = 0 if job.one_byte else min(layers * block, live)
        parts["gather_buffers"] = BYTES_BF16 * (live + shape.head_parameters)
    if job.one_byte:
        # all layers, and the transposed copies of all layers or of the current one
        parts["frozen_weights"] = block * (layers + (layers if job.keep_fp8 else 1))
    elif job.fp8:
        # transformer-engine keeps unsharded FP8 copies for the backward of layers that are not
        # recomputed; a fused block keeps them in both layouts, as Hopper's products need
        copies = 2 if job.kernels == "fused" else 1
        recomputed = job.recomputed_share if job.checkpointing == "full" else 0.0
        parts["fp8_weights"] = copies * block * max(1.0, layers * (1 - recomputed))
    if job.kernels == "fused":
        _add_moments(job, parts)
    return parts


def _add_moments(job: Job, parts: dict[str, float]) -> None:
    """Add what other phases of a step need beyond the peak at the logits.

    A block's backward: the gradients of its feed-forward products, and if it is recomputed all its
    activations. The optimizer's step: flat copies of gradients, also in the optimizer's type, when
    activations are freed (as in DeepSpeed 0.19: stage 3 takes ``sub_group_size`` weights at once, stage 1
    one of the trainer's groups, which are smaller).
    """
    shape, tokens = job.shape, job.tokens
    backward = 8.0 * shape.intermediate_size * tokens
    if job.checkpointing == "full":
        backward += tokens * activation_bytes(job, "none")
    parts["block"] = max(0.0, backward - 4.0 * shape.vocab_size * min(tokens, LOGITS_AT_ONCE))
    if not job.offload:
        at_once = min(SUB_GROUP, job.trained / job.ranks)
        gone = ("activations", "logits", "gather_buffers", "block")
        flat = 6.0 if job.states == "float32" else 2.0
        step = flat * at_once - sum(parts[name] for name in gone)
        parts["optimizer_step"] = max(0.0, step)


def _logit_bytes(job: Job) -> float:
    shape = job.shape
    if job.whole_logits:
        return 6.0 * shape.vocab_size * job.tokens  # bf16, and fp32 for the loss
    # a chunk of logits and its logits gradient in bf16; the output layer's gradient
    at_once = LOGITS_ON_FULL_GPU if job.on_host else LOGITS_AT_ONCE
    chunk = 2.0 * BYTES_BF16 * shape.vocab_size * min(job.tokens, at_once)
    weight = 0 if job.lora else BYTES_BF16 * shape.head_parameters
    return chunk + weight + BYTES_BF16 * shape.hidden_size * job.tokens


def as_the_trainer_runs(
    job: Job,
    gpu_bytes: float,
    fill: float | None = None,
    wanted: Literal["auto"] | bool = "auto",
) -> Job:
    """The job with the trainer's activation checkpointing; ``wanted`` is ``gradient_checkpointing``."""
    found = activation_checkpointing(
        job.shape,
        job.tokens,
        job.ranks,
        gpu_bytes - UNSEEN,
        lora=job.lora,
        fp8=job.fp8,
        offload=job.offload,
        states=job.states,
        fill=fill,
        wanted=wanted,
    )
    job = replace(
        job,
        one_byte=found.one_byte,
        keep_fp8=found.one_byte and found.keep_fp8,
        on_host=found.on_host,
    )
    if found.kind == "none":
        return replace(job, checkpointing="none", layers_recomputed=None, gathered=found.gathered)
    every = found.kind == "full" and found.layers == found.total
    return replace(job, checkpointing=found.kind, layers_recomputed=None if every else found.layers)


def host_bytes(job: Job) -> float:
    """Main memory of all hosts that offloading needs: fp32 master, moments and gradients."""
    return 16.0 * job.trained if job.offload else 0.0


def checkpoint_bytes(job: Job) -> float:
    """Bytes of one checkpoint: the optimizer's weights and two moments of what is trained."""
    return step_memory.checkpoint_bytes_per_weight(job.states) * job.trained


# Seconds

# transformers' own layers (from the source of 5.17): forward, norms move 84 h bytes per token and block with
# their float32 copies and the two sums, rotation 18 (q + k), the activation 10 f; backward twice that. For
# Llama's shapes that is 13.8 times what a block keeps. Its float32 logits move 30 bytes per entry.
PASSES_PLAIN, LOGITS_PLAIN = 13.8, 30


@dataclass(frozen=True)
class Efficiency:
    """Shares of a chip's peaks and numbers of passes over memory, fitted on ``measured.yaml``.

    A fitted number also absorbs other effects: the passes include kernel launches, the shares a power
    limit. ``plan_run.py --check`` compares predictions with measurements.
    """

    bf16: float = 0.658
    fp8: float = 0.559
    flash: float = 0.424  # of the bf16 peak
    sdpa: float = 0.187
    cudnn: float = 0.614
    # how often the kept activations are read and written, forward and backward
    passes_liger: float = 8.97
    passes_fused: float = 5.69
    passes_fp8: float = 1.93  # in addition, if a fused block quantizes
    passes_lora: float = 45.2  # the same for each adapted layer's input
    passes_lora_fused: float = 8.77
    micro_batch_ms: float = 34.9  # per micro-batch of full training, for any model
    passes_fp8_weights: float = 9.49  # weights cast once per micro-batch, or once per step
    memory: float = 0.85  # of the bandwidth
    link: float = 0.282  # of the link's rate inside a host
    network: float = 0.7  # of the network's rate between hosts: assumed, not measured here
    hidden: float = 0.241  # largest share of the communication that computation hides
    hidden_fused: float = 0.656


EFFICIENCY = Efficiency()


def seconds_parts(
    job: Job, hardware: Hardware, efficiency: Efficiency = EFFICIENCY
) -> dict[str, float]:
    """Seconds per token of one GPU, by part."""
    gpu = hardware.gpu
    assert gpu is not None
    bandwidth = efficiency.memory * 1e12 * gpu.memory_tb_s
    fused = job.kernels == "fused"
    parts = {
        **_product_seconds(job, gpu, efficiency),
        "memory traffic": _moved_bytes(job, efficiency) / bandwidth,
        "optimizer": _optimizer_seconds(job, hardware, bandwidth),
    }
    if job.on_host:  # each input goes to the host and back
        sent = 2 * BYTES_BF16 * job.shape.hidden_size * job.on_host
        parts["host"] = sent / (1e9 * hardware.host.pcie_gb_s)
    if fused and not job.lora:
        parts["micro-batch"] = efficiency.micro_batch_ms / 1000 / job.tokens
    # a part is never hidden (the first and last block's), nor is anything beyond the computation's time
    traffic = communication_seconds(job, hardware, efficiency) / job.tokens
    hidden = efficiency.hidden_fused if fused else efficiency.hidden
    parts["communication"] = max((1 - hidden) * traffic, traffic - sum(parts.values()))
    return parts


def _product_seconds(job: Job, gpu: Gpu, e: Efficiency) -> dict[str, float]:
    """Seconds per token of matrix products and attention: operations over the chip's effective peak."""
    shape, bf16 = job.shape, gpu.peak(fp8=False)
    head = shape.head_parameters * (4 if job.lora else 6)
    adapters = 6 * shape.lora_parameters(job.lora) if job.lora else 0
    blocks = (4 if job.lora else 6) * (shape.matrix_parameters - shape.head_parameters)
    forward = attention_flops(shape, job.attended or job.sequence)
    again = recomputed_flops(job)
    if job.checkpointing == "full":
        again -= forward * job.recomputed_share
        forward *= 1 + job.recomputed_share / 3
    in_blocks = blocks + again
    return {
        "matrix products": (head + adapters) / (bf16 * e.bf16)
        + in_blocks / (gpu.peak(job.fp8) * (e.fp8 if job.fp8 else e.bf16)),
        "attention": 3.0 * forward / (bf16 * getattr(e, job.attention)),
    }


def _moved_bytes(job: Job, e: Efficiency) -> float:
    """Bytes per token that are read and written between the products."""
    shape, fused = job.shape, job.kernels == "fused"
    # recomputation moves its bytes again: a third of forward and backward, or half that
    share = {"none": 0, "mlp": 1 / 6, "full": 1 / 3}[job.checkpointing]
    more = 1 + job.recomputed_share * share
    passes = PASSES_PLAIN if job.kernels == "plain" else getattr(e, f"passes_{job.kernels}")
    if fused and job.fp8:
        passes += e.passes_fp8
    # counted as liger's layers keep them, so that the passes of all kernels compare
    kept = activation_bytes(replace(job, lora=None, fp8=False, kernels="liger"), "none")
    moved = shape.num_hidden_layers * passes * kept * more
    if job.lora:
        adapted = sum(shape.matrix(name)[0] for name in job.lora.target_modules)
        times = e.passes_lora_fused if fused else e.passes_lora
        moved += shape.num_hidden_layers * times * BYTES_BF16 * adapted * more
    if job.whole_logits:
        moved += (LOGITS_PLAIN if job.kernels == "plain" else 6) * shape.vocab_size
    if job.one_byte:
        # transposed copies that are not kept are written and read once per micro-batch
        copies = 0 if job.keep_fp8 else shape.block_parameters * shape.num_hidden_layers
        moved += 2 * copies / job.tokens
    elif job.fp8:
        # the trainer quantizes weights once per step if it keeps them
        once = job.tokens * (job.accumulation if fused and job.checkpointing != "full" else 1)
        weights = BYTES_BF16 * shape.block_parameters * shape.num_hidden_layers
        moved += e.passes_fp8_weights * weights / once
    return moved


def _optimizer_seconds(job: Job, hardware: Hardware, bandwidth: float) -> float:
    """The optimizer's seconds per token; with offloading, over PCIe and on the hosts' CPUs."""
    step_tokens = job.tokens * job.accumulation
    if job.offload:
        transfer = 4 * job.trained / job.ranks / (1e9 * hardware.host.pcie_gb_s)
        cpu = 28 * job.trained / hardware.hosts / (1e9 * hardware.host.cpu_memory_gb_s)
        return (transfer + cpu) / step_tokens
    touched = STEP_BYTES[job.states] * job.trained / job.ranks
    return touched / bandwidth / step_tokens


def communication_seconds(
    job: Job, hardware: Hardware, efficiency: Efficiency = EFFICIENCY
) -> float:
    """Seconds of ZeRO-3's traffic per micro-batch: weights gathered forward and backward, gradients
    reduced once, each ``2 N (R - 1) / R`` bytes through a GPU's link (ZeRO paper, section 7). Weights that
    stay gathered are gathered once per step. Between hosts NCCL's rings distribute the bytes over the
    network cards of a host's GPUs, which together form the link."""
    gpu = hardware.gpu
    assert gpu is not None
    share = (job.ranks - 1) / job.ranks
    gathers = 1 / job.accumulation if job.gathered else 2
    moved = BYTES_BF16 * share * (gathers * job.shared_weights + job.trained)
    link = efficiency.link * gpu.link_gb_s
    if hardware.hosts > 1:
        link = min(link, efficiency.network * gpu.network_gb_s * hardware.per_host)
    return moved / (1e9 * link)


def tokens_per_second(job: Job, hardware: Hardware, efficiency: Efficiency = EFFICIENCY) -> float:
    """Tokens per second per GPU."""
    return 1.0 / sum(seconds_parts(job, hardware, efficiency).values())
