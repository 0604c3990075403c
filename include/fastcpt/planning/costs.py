"""What a training step costs: operations, memory, seconds. Every formula with its source.

Symbols: ``h`` hidden, ``f`` intermediate, ``q``/``k`` widths of queries and keys, ``L`` layers, ``V``
vocabulary, ``S`` sequence, ``T`` tokens of a micro-batch, ``N`` parameters, ``R`` ranks.

Operations (Megatron and NVIDIA's tables count the same): 2 a multiply-add; forward ``2 N_mm``,
backward twice that; attention's two products forward are ``4 L q S`` a token, half of it causal.

Seconds are those of four things that do not overlap on a GPU (matrix products by precision,
attention, the reading and writing between them, the optimizer's own) and of what the
interconnect cannot hide. Each part is a physical quantity over a chip's peak times an efficiency,
and the efficiencies in ``Efficiency`` were fitted once, on the rows of ``measured.yaml``; so a
part scales to another model, sequence or chip by what it is made of.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from fastcpt.planning.hardware import Hardware
from fastcpt.planning.shapes import Shape
from fastcpt.recipe import Lora

Checkpointing = Literal["none", "selective", "full"]
# Who does the work between the matrix products: transformers as it is, liger's kernels in it,
# torch.compile over each layer, transformer-engine's whole layer.
Kernels = Literal["plain", "liger", "compile", "te"]

CHUNK = 1024  # tokens whose logits exist at once (fastcpt.training.model)
LIVE_PARAMETERS = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters
RUNTIME_GB = 1.5  # CUDA context and NCCL, outside of torch's memory
USABLE = 0.97  # of a GPU's memory; the rest goes to fragmentation
BYTES_BF16, BYTES_FP32 = 2, 4


@dataclass(frozen=True)
class Job:
    """One training's step on one GPU. ``ranks`` GPUs share parameters by ZeRO-3."""

    shape: Shape
    sequence: int
    micro_batch: int
    accumulation: int
    ranks: int
    lora: Lora | None = None
    fp8: bool = False
    checkpointing: Checkpointing = "none"
    offload: bool = False  # gradients and optimizer on the host
    sdpa: bool = False  # torch's attention in place of flash-attn
    kernels: Kernels = "liger"
    fp32_master: bool = True  # False: AdamW on bf16 alone, as some bare measurements do
    whole_logits: bool = False  # not chunked or fused

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_batch * self.sequence

    @property
    def trained(self) -> int:
        """Parameters that have gradients."""
        return self.shape.lora_parameters(self.lora) if self.lora else self.shape.parameters

    @property
    def method(self) -> str:
        return "lora" if self.lora else "full"

    @property
    def precision(self) -> str:
        return "fp8" if self.fp8 else "bf16"


# Operations


def attention_flops(shape: Shape, sequence: float) -> float:
    """Forward, a token, the causal half: ``2 L q S``. For packed documents ``S`` is
    ``sum(len^2) / sum(len)``."""
    return 2.0 * shape.num_hidden_layers * shape.queries * sequence


def model_flops(shape: Shape, sequence: float, lora: Lora | None = None) -> float:
    """Operations a training token needs, without recomputation (what MFU counts).

    Full: ``6 N_mm + 3 att``: 51.5 GFLOP for Llama 3 8B at 8192, as in NVIDIA's tables.
    LoRA: ``4 N_mm + 3 att + 6 N_lora``: frozen weights need no gradient of their own.
    """
    attention = 3 * attention_flops(shape, sequence)
    if lora is None:
        return 6.0 * shape.matrix_parameters + attention
    return 4.0 * shape.matrix_parameters + attention + 6.0 * shape.lora_parameters(lora)


def recomputed_flops(job: Job) -> float:
    """What checkpointing adds a token: all blocks forward again (``2 (N_mm - V h) + att``), or
    for ``selective`` every second matrix product of them."""
    blocks = 2.0 * (job.shape.matrix_parameters - job.shape.head_parameters)
    if job.checkpointing == "full":
        return blocks + attention_flops(job.shape, job.sequence)
    return blocks / 2 if job.checkpointing == "selective" else 0.0


# Memory


def activation_bytes(job: Job, checkpointing: Checkpointing) -> float:
    """Bytes a block keeps a token for its backward.

    ``none``: two norms' inputs (2 h each), rotated queries, keys, values, attention's output,
    gate and up (2 f each) and the inputs of the linear layers, 2 B each; in FP8 these inputs are
    1 B, kept by every layer for itself unless fused. ``full``: the block's input, ``2 h``.
    ``selective``: that, and every second matrix product's output.
    """
    h, f = job.shape.hidden_size, job.shape.intermediate_size
    q, k = job.shape.queries, job.shape.keys
    if checkpointing == "full":
        return 2 * h
    if checkpointing == "selective":
        return 2 * (h + q + k + f)
    between = 2 * (h + q + 2 * k + q + h + 2 * f)
    if job.lora:
        # only adapted layers need their input: after dropout in bf16, and dropout's mask
        adapted = sum(job.shape.matrix(name)[0] for name in job.lora.target_modules)
        return between + 3 * adapted
    if not job.fp8:
        return between + 2 * (2 * h + f)
    fused = job.kernels in ("compile", "te")
    return between + ((2 * h if fused else 5 * h) + q + f)


def memory_parts(job: Job) -> dict[str, float]:
    """Bytes a GPU, by part.

    States: 16 B a trained parameter over the ranks (bf16 weight 2 and gradient 2, fp32 master 4
    and two moments 8), 2 B a frozen one; ZeRO paper (Rajbhandari 2020), section 3.1.
    """
    shape, ranks, tokens = job.shape, job.ranks, job.tokens
    layers, block = shape.num_hidden_layers, shape.block_parameters
    on_host = job.offload
    frozen = job.trained if job.lora else 0
    kept = layers * tokens * activation_bytes(job, job.checkpointing)
    # the block at work holds everything it needs, whatever is kept of the others
    kept += tokens * activation_bytes(job, "none")
    parts = {
        "weights": BYTES_BF16 * (shape.parameters + frozen) / ranks,
        "gradients": 0.0 if on_host else BYTES_BF16 * job.trained / ranks,
        "optimizer": 0.0 if on_host else (12 if job.fp32_master else 4) * job.trained / ranks,
        "activations": kept,
        "logits": _logit_bytes(job),
        "gather_buffers": 0.0,
    }
    if ranks > 1:
        live = min(layers * block, max(LIVE_PARAMETERS, 2 * block))
        parts["gather_buffers"] = BYTES_BF16 * (live + shape.head_parameters)
    if job.fp8 and job.kernels != "compile":
        # transformer-engine keeps the FP8 copy, unsharded, for the backward of what is not recomputed
        parts["fp8_weights"] = block * (1 if job.checkpointing == "full" else layers)
    return parts


def _logit_bytes(job: Job) -> float:
    shape = job.shape
    if job.whole_logits:
        return 6.0 * shape.vocab_size * job.tokens  # bf16 and the fp32 of the loss
    # a chunk in bf16 and fp32 with its gradient; the output layer's gradient in fp32 and bf16
    chunk = 10.0 * shape.vocab_size * min(job.tokens, CHUNK)
    weight = 0 if job.lora else (BYTES_FP32 + BYTES_BF16) * shape.head_parameters
    return chunk + weight + BYTES_BF16 * shape.hidden_size * job.tokens


def host_bytes(job: Job) -> float:
    """Main memory of all hosts that offloading takes: fp32 master, moments and gradients."""
    return 16.0 * job.trained if job.offload else 0.0


def checkpoint_bytes(job: Job) -> float:
    """Disk of one checkpoint: bf16 weights, fp32 master and moments of what is trained."""
    return 14.0 * job.trained


# Seconds


@dataclass(frozen=True)
class Efficiency:
    """Shares of a chip's peaks and numbers of passes over memory, fitted on ``measured.yaml``.

    Fitted, so each also stands for what it is not named after: kernel launches are in the passes,
    a power limit is in the shares. ``plan_run.py --check`` shows what they predict.
    """

    bf16: float = 0.655
    fp8: float = 0.51
    flash: float = 0.5  # of the bf16 peak
    sdpa: float = 0.185
    # times the kept activations are read and written, forward and backward
    passes_plain: float = 15.9
    passes_liger: float = 9.0
    passes_te: float = 9.0
    passes_compile: float = 0.8
    passes_lora: float = 45.0  # the same of each adapted layer's input
    passes_fp8_weights: float = 6.0  # weights cast once a micro-batch
    memory: float = 0.85  # of the bandwidth
    link: float = 0.28  # of the link's rate inside a host
    network: float = 0.7  # of the network's between hosts: an assumption, nothing here measured it
    hidden: float = 0.244  # share of the traffic that computing hides at best


EFFICIENCY = Efficiency()


def seconds_parts(
    job: Job, hardware: Hardware, efficiency: Efficiency = EFFICIENCY
) -> dict[str, float]:
    """Seconds of a GPU for one token, by part."""
    gpu = hardware.gpu
    assert gpu is not None
    e, shape = efficiency, job.shape
    bandwidth = e.memory * 1e12 * gpu.memory_tb_s
    bf16 = gpu.peak(fp8=False)

    head = shape.head_parameters * (4 if job.lora else 6)
    adapters = 6 * shape.lora_parameters(job.lora) if job.lora else 0
    blocks = (4 if job.lora else 6) * (shape.matrix_parameters - shape.head_parameters)
    attention = 3.0 * attention_flops(shape, job.sequence)
    again = recomputed_flops(job)
    if job.checkpointing == "full":
        attention += attention_flops(shape, job.sequence)
        again -= attention_flops(shape, job.sequence)
    in_blocks = blocks + again
    parts = {
        "matrix products": (head + adapters) / (bf16 * e.bf16)
        + in_blocks / (gpu.peak(job.fp8) * (e.fp8 if job.fp8 else e.bf16)),
        "attention": attention / (bf16 * (e.sdpa if job.sdpa else e.flash)),
    }

    passes = getattr(e, f"passes_{job.kernels}")
    if job.checkpointing != "none":
        passes *= 4 / 3 if job.checkpointing == "full" else 7 / 6
    kept = activation_bytes(replace(job, lora=None, fp8=False), "none")
    moved = shape.num_hidden_layers * passes * kept
    if job.lora:
        adapted = sum(shape.matrix(name)[0] for name in job.lora.target_modules)
        again_lora = 4 / 3 if job.checkpointing == "full" else 1
        moved += shape.num_hidden_layers * e.passes_lora * BYTES_BF16 * adapted * again_lora
    if job.whole_logits:
        moved += 6 * shape.vocab_size
    if job.fp8:
        moved += (
            e.passes_fp8_weights
            * BYTES_BF16
            * shape.block_parameters
            * shape.num_hidden_layers
            / job.tokens
        )
    parts["memory traffic"] = moved / bandwidth

    step_tokens = job.tokens * job.accumulation
    if job.offload:
        transfer = 4 * job.trained / job.ranks / (1e9 * hardware.host.pcie_gb_s)
        cpu = 28 * job.trained / hardware.hosts / (1e9 * hardware.host.cpu_memory_gb_s)
        parts["optimizer"] = (transfer + cpu) / step_tokens
    else:
        # gradients, master, moments and weights read and written once a step
        touched = (30 if job.fp32_master else 14) * job.trained / job.ranks
        parts["optimizer"] = touched / bandwidth / step_tokens

    # part of the traffic always shows (the first block's, the last one's), and all that computing
    # is too short to hide
    traffic = communication_seconds(job, hardware, e) / job.tokens
    parts["communication"] = max((1 - e.hidden) * traffic, traffic - sum(parts.values()))
    return parts


def communication_seconds(
    job: Job, hardware: Hardware, efficiency: Efficiency = EFFICIENCY
) -> float:
    """ZeRO-3's traffic of a micro-batch: weights gathered forward and backward, gradients reduced
    once, each ``2 N (R - 1) / R`` bytes through a GPU's link (ZeRO paper, section 7). Between hosts
    the network's share of a GPU is the link."""
    gpu = hardware.gpu
    assert gpu is not None
    share = (job.ranks - 1) / job.ranks
    moved = BYTES_BF16 * share * (2 * job.shape.parameters + job.trained)
    link = efficiency.link * gpu.link_gb_s
    if hardware.hosts > 1:
        link = min(link, efficiency.network * gpu.network_gb_s)
    return moved / (1e9 * link)


def tokens_per_second(job: Job, hardware: Hardware, efficiency: Efficiency = EFFICIENCY) -> float:
    """Tokens a second of one GPU."""
    return 1.0 / sum(seconds_parts(job, hardware, efficiency).values())
