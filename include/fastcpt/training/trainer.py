"""The training loop, on DeepSpeed's engine.

One loop for continued pre-training and fine-tuning; they differ in their rows. What a step does:

1. every rank takes its micro-batches of the step's samples (``data.Order``);
2. the loss is divided by the number of targets of the *whole* step, so that every token counts
   the same wherever it lies, and the curve does not depend on the number of ranks;
3. one small all-reduce sums the loss and spreads rank 0's clock and anybody's SIGTERM;
4. ``Guard`` looks at loss and gradient norm, and only then are weights and moments touched.

The learning rate is a function of progress alone: the larger of steps done and, with
``time_budget_hours``, of the time used. A resumed training continues both.

Before the first step every GPU multiplies matrices and has to be right and as fast as the others,
and one step is done at the real shape, whose gradients are thrown away.
"""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import signal
import socket
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import psutil
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import set_z3_leaf_modules
from transformers import AutoConfig
from transformers.integrations import HfDeepSpeedConfig
from transformers.utils import logging

from fastcpt.families import head_width, read_config, refusal
from fastcpt.files import read_json, write_json
from fastcpt.recipe import Recipe
from fastcpt.recipe_sections import Training
from fastcpt.training import checkpoints
from fastcpt.training.checkpoints import save_final
from fastcpt.training.commands import PRICE
from fastcpt.training.data import Ints, Order, Reader, Rows, make_batch
from fastcpt.training.exits import Stopped
from fastcpt.training.layers import Block, can_fuse, with_fused_blocks
from fastcpt.training.model import (
    CHUNK,
    Trainee,
    add_lora,
    base_of,
    choose_attention,
    load_model,
    require_fp8,
)

WINDOW = 128  # steps that the guard remembers; it judges from half of them on
SILENCE = 25.0  # seconds without a progress line
MARGIN = 0.02  # of time_budget_hours left unused
LAUNCHER = 5.0  # seconds before this process began: the launcher's own imports
SAVING = 1e9  # bytes/s of a first checkpoint; the next are measured
UPDATED_AT_ONCE = 300_000_000  # weights
SLOW = 0.75  # of the fastest GPU's products: one below it is throttled or broken


class TrainingError(ValueError):
    """The training cannot be done as asked; the message says what to change."""


def start_ranks() -> torch.device:
    """Join the process group the launcher prepared; returns this rank's device."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce: a compiler and minutes, for nothing
        deepspeed.ops.__compatible_ops__.pop("deepspeed_shm_comm", None)
        deepspeed.init_distributed("gloo", verbose=False)
        return torch.device("cpu")
    accelerator.set_device(local_rank)
    # the step's large buffers and the activations use the same memory in turn
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    deepspeed.init_distributed(verbose=False)
    return torch.device(accelerator.device_name(local_rank))


def once_a_host(work: Callable[[], Any]) -> Any:
    """``work``'s result on every rank; it runs on the first rank of each host alone.

    Its result must be JSON. A ``ValueError`` there is raised everywhere, so that all ranks end.
    """
    answer: list[Any] = [None]
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        try:
            answer = [{"result": work()}]
        except ValueError as error:
            answer = [{"error": str(error)}]
    hosts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, [socket.gethostname(), answer[0]])
    for _, got in hosts:
        if got and "error" in got:
            raise TrainingError(got["error"])
    here = socket.gethostname()
    return next(got["result"] for host, got in hosts if got and host == here)


def learning_rate(training: Training, step: int, progress: float) -> float:
    """The rate of a step (from 0) when ``progress`` (0..1) of the training is behind it.

    Linear warm-up over ``warmup_steps``, then the schedule's curve down to 0 at the end:
    warmup_stable_decay is flat until the last fifth, which it goes down linearly.
    """
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    begin = training.warmup_steps / training.max_steps
    left = max(0.0, 1.0 - max(0.0, progress - begin) / (1.0 - begin))
    factor = {
        "constant": 1.0,
        "linear": left,
        "cosine": 0.5 * (1.0 - math.cos(math.pi * left)),
        "warmup_stable_decay": min(1.0, (1.0 - progress) / 0.2),
    }[training.lr_scheduler_type]
    return training.learning_rate * max(0.0, factor)


class Guard:
    """Skips a step whose loss or gradient norm is not finite or far above the recent ones.

    Far above: more than mean + ``skip_sigmas`` standard deviations of the last 128 steps
    (OLMo-core's rule, with 6), once 64 are known. Finite values are remembered even where they
    were skipped: what stays becomes the new normal.
    """

    def __init__(self, training: Training) -> None:
        self.sigmas, self.most = training.skip_sigmas, training.max_skipped_steps
        self.skipped = 0
        self.skipped_at: list[int] = []  # of the last 128 steps
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.norms: deque[float] = deque(maxlen=WINDOW)

    def refuses(self, value: float, recent: deque[float]) -> bool:
        """Whether ``value`` is out of bounds; it is remembered where it is finite."""
        if not math.isfinite(value):
            return True
        out = False
        if len(recent) >= WINDOW // 2:
            mean = sum(recent) / len(recent)
            deviation = math.sqrt(sum((x - mean) ** 2 for x in recent) / len(recent))
            # a curve without noise has no deviation worth the name
            out = value > mean + self.sigmas * max(deviation, 1e-3 * abs(mean))
        recent.append(value)
        return out

    def forget(self) -> None:
        """Begin anew with what is normal; the skipped steps stay counted."""
        self.losses.clear()
        self.norms.clear()

    def count(self, step: int, loss: float, norm: float) -> None:
        """Count one skipped step; ``TrainingError`` where too many are close together."""
        self.skipped += 1
        self.skipped_at = [n for n in self.skipped_at if n > step - WINDOW] + [step]
        if len(self.skipped_at) > self.most:
            raise TrainingError(
                f"{len(self.skipped_at)} of the last {WINDOW} steps had a loss or gradient norm out "
                f"of bounds, more than max_skipped_steps ({self.most}); the last was step {step} "
                f"(loss {loss:.4g}, gradient norm {norm:.4g}). Lower learning_rate, lengthen warmup_steps, or look "
                "at the data of these steps"
            )


class GuardedAdamW(torch.optim.AdamW):  # type: ignore[misc]
    """AdamW that asks before it touches anything.

    ZeRO-3 knows the gradient norm only inside its own step, after which it calls this one.
    """

    allowed: Callable[[], bool] = staticmethod(lambda: True)

    def step(self, closure: Any = None) -> Any:
        return super().step(closure) if self.allowed() else None


def deepspeed_config(
    file: Path, training: Training, dtype: str, block: int, accumulation: int, world: int
) -> dict[str, Any]:
    """The DeepSpeed file with its "auto" values filled in from the recipe.

    ``block`` is the number of weights of one layer: the next one is fetched while one computes. A
    value the file fixes has to agree with the recipe: ``TrainingError`` otherwise. On a single
    rank there is nothing to partition, and ZeRO-3's copies would only cost: stage 1 is used, and
    gradients stay where they are.
    """
    try:
        config: dict[str, Any] = read_json(file)
    except (OSError, ValueError) as error:
        raise TrainingError(f"--deepspeed {file}: {error}") from error
    zero = config.setdefault("zero_optimization", {})
    if zero.get("stage") != 3:
        raise TrainingError(f"{file}: zero_optimization.stage must be 3")
    ours: list[tuple[dict[str, Any], str, Any, bool]] = [
        (config, "train_micro_batch_size_per_gpu", training.per_device_train_batch_size, True),
        (config, "gradient_accumulation_steps", accumulation, True),
        (config, "gradient_clipping", training.max_grad_norm, True),
        (config.setdefault("bf16", {}), "enabled", dtype == "bfloat16", True),
        (zero, "reduce_bucket_size", min(block, 50_000_000), False),
        (zero, "stage3_prefetch_bucket_size", block, False),
        (zero, "stage3_max_live_parameters", 4 * block + 10**9, False),
        (zero, "stage3_param_persistence_threshold", 100_000, False),
    ]
    for section, key, value, must_agree in ours:
        given = section.get(key, "auto")
        if given == "auto":
            section[key] = value
        elif must_agree and given != value:
            raise TrainingError(
                f"{file}: {key} is {given}, the recipe asks for {value}; write auto"
            )
    if world == 1:
        zero["stage"] = 1
        if "offload_optimizer" not in zero:  # which goes through their buffers
            zero |= {"overlap_comm": False, "contiguous_gradients": False}
    config["steps_per_print"] = 10**9
    config["zero_allow_untested_optimizer"] = True  # GuardedAdamW
    return config


def train(
    recipe: Recipe,
    training: Training,
    rows: Callable[[], Rows | dict[str, Rows]],
    *,
    model: str,
    tokenizer: Path,
    output: Path,
    deepspeed_file: Path,
    use_fp8: bool = False,
    evaluated_tokens: int = 0,
) -> dict[str, Any]:
    """Train ``model`` on ``rows`` and write everything under ``output``; the content of training.json.

    Called by every rank. ``rows`` is called when the process group exists; where it answers with the
    rows of several areas, each gets an adapter of its own, one after another. A training that was
    stopped goes on from its newest checkpoint; a complete one is returned at once. Of a time budget
    enough is left to evaluate ``evaluated_tokens``. Raises ``ValueError`` kinds for what a retry
    cannot heal, ``Stopped`` after SIGTERM and a checkpoint.
    """
    done = output / "training.json"
    if done.is_file():
        result: dict[str, Any] = read_json(done)
        return result
    stop = _StopSignal()
    use_fp8 = use_fp8 or training.use_fp8
    preflight(recipe, model, use_fp8)
    # deepspeed's calls of older torch names; bars that would break the progress lines
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.disable_progress_bar()
    device = start_ranks()
    _check_gpus(device)
    check_shared(output)
    world = dist.get_world_size()
    accumulation = _accumulation(recipe, training, world)
    data = rows()
    phases = phases_of(training, data)
    several = isinstance(data, dict)
    engine, chosen = _engine(
        recipe, training, model, deepspeed_file, accumulation, use_fp8, device, fresh=several
    )
    fresh = checkpoints.trained_weights(engine) if several else {}
    if dist.get_rank() == 0:
        _check_disk(engine.module, training, output)
    known = os.environ.get(PRICE)  # the plan's, by the kind of GPU
    price = float(known) if known else recipe.budget.price_per_gpu_hour
    loop = _Loop(training, phases, engine, output, accumulation, device, stop, price)
    loop.try_one_step()
    loop.start_clock(evaluated_tokens)
    before, final, base = Path(model), output / "final", chosen["base"]
    if several:
        assert recipe.lora
        adapters = {phase.area: output / "areas" / phase.area for phase in phases}

        def begin(area: str) -> None:
            own = before / "areas" / area
            known = checkpoints.adapter_weights(engine, own) if own.is_dir() else fresh
            checkpoints.begin_again(engine, known)

        loop.run(begin, lambda area: save_final(engine, adapters[area], tokenizer, base))
        checkpoints.save_mean(adapters, recipe.lora.areas, final)
    else:
        loop.run()
        save_final(engine, final, tokenizer, base, before)
    result = {**loop.result(), **chosen}
    if dist.get_rank() == 0:
        shutil.rmtree(output / "rows", ignore_errors=True)
        write_json(done, result)
        print(f"done: {json.dumps(result)}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    return result


def preflight(recipe: Recipe, path: str, use_fp8: bool) -> None:
    """``ValueError`` kinds where this host does not train the model as the recipe wants it; asked
    before ranks meet or anything is loaded."""
    base, _ = base_of(path)
    config = read_config(_config(base).to_dict(), base)
    attention = choose_attention(recipe.model.attn_implementation)
    why = refusal(config, recipe, use_fp8, attention)
    if why is not None:
        raise TrainingError(f"--model {base}: {why}")
    if use_fp8:
        require_fp8()


def _config(base: str) -> Any:
    try:
        return AutoConfig.from_pretrained(base)
    except (ValueError, OSError) as error:
        raise TrainingError(f"--model {base}: {error}") from error


class Phase(NamedTuple):
    """What is trained one after another: everything, or the adapter of a legal area each."""

    area: str  # empty: everything
    rows: Rows
    training: Training  # max_steps and warmup_steps are the phase's own
    begin: float  # of the whole training, 0..1
    end: float


def phases_of(training: Training, data: Rows | dict[str, Rows]) -> list[Phase]:
    """One phase, or one for each area: they share the steps as they share the rows."""
    if not isinstance(data, dict):
        if not len(data):
            raise TrainingError("there are no rows to train on")
        return [Phase("", data, training, 0.0, 1.0)]
    steps, rows = training.max_steps, sum(map(len, data.values()))
    edges = [round(steps * part / rows) for part in accumulate(map(len, data.values()), initial=0)]
    phases = []
    for (area, own), (begin, end) in zip(data.items(), pairwise(edges), strict=True):
        if begin == end:
            raise TrainingError(
                f"max_steps ({steps}) leave none for lora.areas.{area}, which has {len(own)} of "
                f"{rows} rows: raise max_steps or leave it out"
            )
        share = {
            "max_steps": end - begin,
            "warmup_steps": training.warmup_steps * (end - begin) // steps,
        }
        phases.append(
            Phase(area, own, training.model_copy(update=share), begin / steps, end / steps)
        )
    return phases


def _accumulation(recipe: Recipe, training: Training, world: int) -> int:
    """Micro-batches a step so that the global batch is the recipe's on any number of ranks."""
    micro = training.per_device_train_batch_size
    batch = micro * training.gradient_accumulation_steps * recipe.cluster.gpus
    if batch % (micro * world):
        raise TrainingError(
            f"a step has {batch} sequences (recipe, {recipe.cluster.gpus} GPUs): they cannot be "
            f"split evenly over {world} ranks with {micro} at a time; change "
            "per_device_train_batch_size or the number of GPUs"
        )
    return batch // (micro * world)


def _engine(
    recipe: Recipe,
    training: Training,
    path: str,
    deepspeed_file: Path,
    accumulation: int,
    use_fp8: bool,
    device: torch.device,
    fresh: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """DeepSpeed's engine around the model, and what was chosen for it.

    ``fresh`` makes new adapters, also where ``path`` has some.
    """
    base, adapted = base_of(path)
    if fresh:
        path, adapted = base, False
    shape = _config(base)
    dtype, world, size = recipe.model.dtype, dist.get_world_size(), recipe.corpus.max_seq_length
    targets = recipe.lora.target_modules if recipe.lora else []
    wanted = recipe.model.attn_implementation
    fused = can_fuse(shape, dtype, wanted, targets)
    dropout = recipe.lora is not None and recipe.lora.lora_dropout > 0.0
    room = None if device.type == "cpu" else torch.cuda.get_device_properties(device).total_memory
    block = _weights_of_block(shape)
    config = deepspeed_config(deepspeed_file, training, dtype, block, accumulation, world)
    offload = "offload_optimizer" in config["zero_optimization"]
    memory = _Memory(shape, training, size, room, world, bool(targets), dropout, use_fp8, offload)
    if memory.gathered:  # weights stay whole between steps
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 10**12
    if device.type == "cuda":
        _use_liger(shape.model_type)
    # while it lives, from_pretrained loads only a part
    partitioned = HfDeepSpeedConfig(config) if world > 1 else None
    torch.manual_seed(training.seed)
    place = device if device.type == "cuda" and world == 1 else None
    causal, attention = load_model(path, wanted, dtype, place)
    if fused and wanted == "auto":  # cuDNN's kernels: faster than flash-attn 2 on Hopper
        attention = "transformer_engine"
    if adapted:  # a second training of the adapters
        for name, parameter in causal.named_parameters():
            parameter.requires_grad_("lora_" in name)
    elif recipe.lora is not None:
        torch.manual_seed(training.seed)  # loading drew from it, more or less
        causal = add_lora(causal, recipe.lora)
    packing = None
    if fused:
        inside = causal.get_base_model() if hasattr(causal, "get_base_model") else causal
        packing = with_fused_blocks(
            inside,
            size,
            attention,
            use_fp8,
            memory.keep_fp8,
            config if world > 1 else None,
            device,
            add_up=world == 1 and not targets and not offload,
        )
        for n, block in enumerate(inside.model.layers):
            block.recompute(
                "all" if n < memory.recomputed else "mlp" if n < memory.mlp_recomputed else "none"
            )
        set_z3_leaf_modules(causal, [Block])
    elif memory.recomputed or memory.mlp_recomputed:
        # transformers' layers are recomputed whole, all of them or none
        memory.recomputed, memory.mlp_recomputed = memory.layers, 0
        causal.gradient_checkpointing_enable({"use_reentrant": False})
    causal.train()
    trainee = Trainee(causal, attention, packing)
    engine, *_ = deepspeed.initialize(
        model=trainee, optimizer=_optimizer(trainee, training, world), config=config
    )
    del partitioned
    if dist.get_rank() == 0:
        print(
            f"model {base}: {_parameters(trainee):,} parameters, "
            f"{'fused' if fused else 'plain'} layers, attention {attention}, {dtype}"
            f"{', FP8' if use_fp8 else ''}{', LoRA' if recipe.lora else ''}, {memory}, "
            f"{world} ranks",
            flush=True,
        )
    return engine, {
        "base": base,
        "ranks": world,
        "micro_batch": training.per_device_train_batch_size,
        "accumulation": accumulation,
        "layers": "fused" if fused else "plain",
        "attention": attention,
        "precision": "fp8" if use_fp8 else dtype,
        "checkpointing": memory.level,
        "layers_recomputed": memory.recomputed or memory.mlp_recomputed,
        "weights_kept_gathered": memory.gathered,
    }


class Gpu(NamedTuple):
    """One rank's GPU: ``flops`` of a product of bf16 matrices, and whether its result was right."""

    host: str
    name: str
    memory: int  # bytes
    right: bool
    flops: float


def _check_gpus(device: torch.device) -> None:
    """``TrainingError`` where a rank computes wrong, or the ranks' GPUs differ."""
    if device.type == "cpu":
        name, memory, side = "CPU", 0, 256
    else:
        facts = torch.cuda.get_device_properties(device)
        name, memory, side = facts.name, facts.total_memory, 8192
    drawn = torch.Generator(device).manual_seed(0)
    left, right = torch.randn(2, side, side, generator=drawn, device=device)
    narrow = left.bfloat16(), right.bfloat16()
    times = []
    for _ in range(5):
        product = narrow[0] @ narrow[1]
        product[0, 0].item()  # waits
        begin = time.monotonic()
        for _ in range(4):
            torch.mm(*narrow, out=product)
        product[0, 0].item()
        times.append(time.monotonic() - begin)
    wide = narrow[0].float() @ narrow[1].float()
    off = float((product.float() - wide).norm() / wide.norm())  # bf16 rounds to 8 bits
    own = Gpu(socket.gethostname(), name, memory, off < 0.01, 4 * 2 * side**3 / min(times))
    del left, right, narrow, product, wide
    gpus: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gpus, own)
    wrong = what_is_wrong(gpus)
    if wrong:
        raise TrainingError(wrong)


def what_is_wrong(gpus: list[Gpu]) -> str | None:
    """Why these GPUs (one a rank) cannot train together; None where they can."""
    for rank, gpu in enumerate(gpus):
        if not gpu.right:
            return f"rank {rank}, {gpu.name} on {gpu.host}, computes wrong: take it out of service"
    if len({(gpu.name, gpu.memory) for gpu in gpus}) > 1:
        seen = ", ".join(f"{gpu.name} of {gpu.memory / 1e9:.0f} GB on {gpu.host}" for gpu in gpus)
        return f"the GPUs are not the same: {seen}; leave the odd one out"
    fastest = max(gpu.flops for gpu in gpus)
    for rank, gpu in enumerate(gpus):
        if gpu.memory and gpu.flops < SLOW * fastest:  # cores of a CPU are shared
            return (
                f"rank {rank}, {gpu.name} on {gpu.host}, reaches {gpu.flops / 1e12:.0f} TFLOP/s, "
                f"the fastest {fastest / 1e12:.0f}: it is too hot, broken or in use; leave it out"
            )
    return None


def check_shared(output: Path) -> None:
    """``TrainingError`` unless all ranks see what the first one writes: checkpoints are one folder."""
    name: list[Any] = [f".seen_by_all_{uuid.uuid4().hex}"]
    dist.broadcast_object_list(name)
    marker = output / name[0]
    if dist.get_rank() == 0:
        output.mkdir(parents=True, exist_ok=True)
        marker.touch()
    dist.barrier()
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, (marker.exists(), socket.gethostname()))
    if dist.get_rank() == 0:
        marker.unlink()
    blind = sorted({host for sees, host in seen if not sees})
    if blind:
        raise TrainingError(
            f"{output} is not the same folder on {', '.join(blind)}: put cluster.root on a file "
            "system that all hosts share"
        )


def _check_disk(trainee: torch.nn.Module, training: Training, output: Path) -> None:
    """``TrainingError`` unless the checkpoints (12 bytes a trained weight) and the model fit."""
    sizes = [
        (int(getattr(p, "ds_numel", p.numel())), p.requires_grad) for p in trainee.parameters()
    ]
    trained = sum(size for size, trains in sizes if trains)
    checkpoint, final = 12 * trained, 2 * trained
    needed = (training.save_total_limit + 1) * checkpoint + final
    output.mkdir(parents=True, exist_ok=True)
    there = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    free = shutil.disk_usage(output).free
    if free + there < needed:
        raise TrainingError(
            f"{output}: {free / 1e9:.1f} GB are free, {training.save_total_limit} checkpoints, the "
            f"next one and the model need {needed / 1e9:.1f} GB; make room, or lower "
            "save_total_limit"
        )


def _use_liger(model_type: str) -> None:
    """Liger's fused norms, rotary embeddings and activations, where it is installed."""
    try:
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel
    except ImportError:
        return
    _apply_liger_kernel(model_type, cross_entropy=False, fused_linear_cross_entropy=False)


def _weights_of_block(shape: Any) -> int:
    h, inner = shape.hidden_size, shape.intermediate_size
    q = shape.num_attention_heads * head_width(shape)
    kv = shape.num_key_value_heads * head_width(shape)
    return int(h * (q + 2 * kv) + q * h + 3 * h * inner + 2 * h)


class _Memory:
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
        self.block = _weights_of_block(shape)
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


def _optimizer(trainee: Trainee, training: Training, world: int) -> GuardedAdamW:
    """AdamW; norms and biases are not decayed.

    A single rank's groups are cut to ``UPDATED_AT_ONCE`` weights: DeepSpeed's stage 1 makes the
    float32 gradients of one group at a time.
    """
    vectors: list[torch.nn.Parameter] = []
    matrices: list[list[torch.nn.Parameter]] = []
    room = 0
    for parameter in trainee.parameters():
        if not parameter.requires_grad:
            continue
        if len(getattr(parameter, "ds_shape", parameter.shape)) < 2:
            vectors.append(parameter)
            continue
        if not matrices or (world == 1 and parameter.numel() > room):
            matrices.append([])
            room = UPDATED_AT_ONCE
        matrices[-1].append(parameter)
        room -= parameter.numel()
    groups = [{"params": group, "weight_decay": training.weight_decay} for group in matrices]
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    return GuardedAdamW(
        groups,
        lr=0.0,  # DeepSpeed makes an empty first step; the loop sets the rate of every other
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        fused=True,
    )


def _parameters(trainee: Trainee) -> int:
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in trainee.parameters())


class _Work:
    """FLOP of the model's own mathematics, for the share of the GPU's peak (MFU) it reaches.

    Per token 6 for each weight of a matrix product (4 where it is frozen: no gradient of its own)
    and for each document 6 x layers x heads x width x length squared: attention, its causal half.
    """

    # dense bf16 FLOP/s (NVIDIA's datasheets), by a word of the GPU's name
    PEAKS = (
        *(("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H200 NVL", 835e12)),
        *(("H100", 989e12), ("H200", 989e12), ("B200", 2250e12), ("A100", 312e12)),
    )

    def __init__(self, trainee: Trainee, device: torch.device) -> None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak = next((peak for word, peak in self.PEAKS if word in name), None)
        shape = trainee.causal.config
        self.per_token = 0.0
        for words, parameter in trainee.named_parameters():
            sides = getattr(parameter, "ds_shape", parameter.shape)
            if len(sides) == 2 and ("embed" not in words or shape.tie_word_embeddings):
                self.per_token += (6 if parameter.requires_grad else 4) * math.prod(sides)
        width = shape.num_attention_heads * head_width(shape)
        self.attention = 6 * shape.num_hidden_layers * width
        self.flop = 0.0

    def add(self, pieces: list[Ints]) -> None:
        """Count rows of pieces of these lengths."""
        for of_row in pieces:
            lengths = of_row.astype(float)
            self.flop += self.per_token * lengths.sum() + self.attention * (lengths**2).sum()


class _StopSignal:
    """Set by SIGTERM; looked at after every step."""

    def __init__(self) -> None:
        self.came = False
        signal.signal(signal.SIGTERM, self._set)

    def _set(self, *_: Any) -> None:
        self.came = True


class _Loop:
    """The steps of one training, and what has to survive a restart."""

    def __init__(
        self,
        training: Training,
        phases: list[Phase],
        engine: Any,
        output: Path,
        accumulation: int,
        device: torch.device,
        stop: _StopSignal,
        price: float | None = None,
    ) -> None:
        self.price, self.work = price, _Work(engine.module, device)
        self.training, self.phases, self.engine = training, phases, engine
        self.folder = output / "checkpoints"
        self.accumulation, self.device, self.stop = accumulation, device, stop
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.guard = Guard(training)
        self.step = self.tokens = 0
        self.number = self.begun = 0  # the phase, and the step it began with
        self.areas: dict[str, Any] = {}  # what became of those that are done
        self.seconds = self.loss = self.norm = 0.0
        self.peak_gb = 0.0
        self.clock = 0.0  # share of the time budget that is used
        self.startup = self.startups = 0.0  # seconds of this start, of all before
        self.evaluated_tokens, self.saving = 0, 0.0
        state = checkpoints.load_newest(engine, self.folder)
        if state:
            self.step, self.tokens = state["step"], state["tokens"]
            self.seconds, self.loss = state["seconds"], state["loss"]
            self.peak_gb = state["peak_memory_gb"]
            self.startups = state["startup_seconds"]
            self.clock = state["clock"]
            self.number, self.begun = state["phase"], state["phase_begun"]
            self.areas = state["areas"]
            self.guard.skipped = state["skipped_steps"]
            self.guard.skipped_at = state["skipped_at"]
            self.guard.losses.extend(state["losses"])
            self.guard.norms.extend(state["norms"])
            self._say(f"going on from checkpoints/step_{self.step}")
        self.first = self.step
        self._take_phase()
        self.log = _Log(output, self.step) if self.rank == 0 else None

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "loss": self.loss,
            "peak_memory_gb": self.peak_gb,
            "startup_seconds": self.startups + self.startup,
            "clock": self.clock,
            "phase": self.number,
            "phase_begun": self.begun,
            "areas": self.areas,
            "skipped_steps": self.guard.skipped,
            "skipped_at": self.guard.skipped_at,
            "losses": list(self.guard.losses),
            "norms": list(self.guard.norms),
        }

    def result(self) -> dict[str, Any]:
        rate = self.tokens / max(self.seconds, 1e-9) / self.world
        return {
            "steps": self.step,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "startup_seconds": round(self.startups + self.startup, 3),
            "tokens_per_s_per_gpu": round(rate, 1),
            "loss": self.loss,
            "peak_memory_gb": round(self.peak_gb, 3),
            "skipped_steps": self.guard.skipped,
            **({"areas": self.areas} if self.areas else {}),
        }

    def _take_phase(self) -> None:
        self.phase = self.phases[self.number]
        self.data = self.phase.rows
        micro = self.training.per_device_train_batch_size
        order = Order(len(self.data), self.training.seed)
        self.reader = Reader(self.data, order, micro, self.accumulation, self.rank, self.world)

    def try_one_step(self) -> None:
        """The last micro-batches of a step and all that follows them, except that nothing changes.

        ``TrainingError`` where the memory does not suffice.
        """
        micro, size = self.training.per_device_train_batch_size, self.data.size
        batch = make_batch([self.data[n % len(self.data)] for n in range(micro)], size)
        self.engine.optimizer.optimizer.allowed = lambda: False
        # two: the second one's activations stand beside the first one's gradients
        self.engine.micro_steps = max(0, self.accumulation - 2)
        try:
            self._clear_sums()
            if self.engine.module.packing is not None:
                self.engine.module.packing.fresh = True
            while self.engine.micro_steps < self.accumulation:
                self.engine.backward(self.engine(batch, self.device))
                self.engine.step()
        except torch.OutOfMemoryError as error:
            total = torch.cuda.get_device_properties(self.device).total_memory
            raise TrainingError(
                f"a step of {micro} x {size} tokens does not fit the GPU's {total / 1e9:.0f} GB: "
                "lower per_device_train_batch_size (raise gradient_accumulation_steps with it), "
                "set gradient_checkpointing to true, or use more GPUs"
            ) from error
        self.engine.micro_steps = 0
        self._say(f"a step fits: {_memory_gb(self.device):.1f} GB")

    def _clear_sums(self) -> None:
        """Begin a step's gradients where the products add them up themselves."""
        for weight in self.engine.module.parameters():
            if hasattr(weight, "main_grad"):
                weight.grad = weight.main_grad.zero_()

    def start_clock(self, evaluated_tokens: int) -> None:
        """From here on time is counted as steps; before it, it was the start.

        ``TrainingError`` where the time budget does not reach for a single step.
        """
        age = LAUNCHER + time.time() - psutil.Process().create_time()
        started = torch.tensor([age if self.rank == 0 else 0.0], device=self.device)
        dist.all_reduce(started)
        self.startup = started.item()
        trained = sum(
            int(getattr(p, "ds_numel", p.numel()))
            for p in self.engine.module.parameters()
            if p.requires_grad
        )
        self.saving = 14 * trained / SAVING  # the last checkpoint and the model
        self.evaluated_tokens = evaluated_tokens
        hours = self.training.time_budget_hours
        if hours and not self.step and self._seconds_left(0.0) < 0:
            raise TrainingError(
                f"time_budget_hours ({hours:g}, {hours * 3600:.0f} s) leaves no time for training: "
                f"the start took {self.startup:.0f} s, and the evaluation's as long again"
            )

    def _seconds_left(self, seconds: float) -> float:
        """What the time budget leaves for steps after ``seconds`` of them; negative: too much.

        Kept back are the time to save, and to evaluate: a start like this one, and a token read as
        slowly as one is trained (a forward alone is faster, but need not be as optimised).
        """
        assert self.training.time_budget_hours
        budget = (1.0 - MARGIN) * 3600 * self.training.time_budget_hours
        evaluation = self.startup + self.evaluated_tokens * seconds / max(self.tokens, 1)
        used = self.startups + self.startup + seconds
        return budget - used - self.saving - evaluation

    def _clock(self, seconds: float, a_step: float) -> float:
        """Progress by time, 0..1: 1 where no further step fits the budget; 0 without one."""
        if not self.training.time_budget_hours:
            return 0.0
        whole = seconds + self._seconds_left(seconds) - a_step
        return min(1.0, seconds / whole) if whole > 0 else 1.0

    def progress(self) -> float:
        """How much of the training is behind it, 0..1, by steps or by the clock."""
        return max(self.step / self.training.max_steps, self.clock)

    def run(
        self,
        begin_area: Callable[[str], None] = lambda _: None,
        end_area: Callable[[str], None] = lambda _: None,
    ) -> None:
        """All steps that are left, with their checkpoints.

        ``begin_area`` is called before the first step of a phase, ``end_area`` after its last.
        """
        training = self.training
        first, begin, said = self.first, time.monotonic(), time.monotonic()
        before = self.seconds
        logged_tokens, logged_at, logged_flop = self.tokens, begin, self.work.flop
        while self.progress() < 1.0 or self.step == self.begun:
            phase = self.phase
            if self.step == self.begun:
                begin_area(phase.area)
                if phase.area:
                    self._say(f"adapter {phase.area}: {len(phase.rows):,} rows")
            behind = (self.progress() - phase.begin) / (phase.end - phase.begin)
            rate = learning_rate(phase.training, self.step - self.begun, min(1.0, behind))
            stopping = self._one_step(rate, begin, before)
            ended = self.progress() >= phase.end
            last = ended and phase is self.phases[-1]
            now = time.monotonic()
            due = self.step % training.logging_steps == 0 or ended
            if self.rank == 0 and (due or now - said > SILENCE or self.step == first + 1):
                per_gpu = (self.tokens - logged_tokens) / max(now - logged_at, 1e-9) / self.world
                a_step = (now - begin) / (self.step - first)
                left = a_step * (training.max_steps - self.step)
                if training.time_budget_hours:
                    left = min(left, max(0.0, self._seconds_left(self.seconds)))
                print(
                    f"step {self.step}/{training.max_steps} loss {self.loss:.4f} "
                    f"lr {rate:.3g} grad_norm {self.norm:.3g} "
                    f"{per_gpu * self.world:,.0f} tokens/s {_duration(left)} left",
                    flush=True,
                )
                said = now
                if due and self.log:
                    flop = (self.work.flop - logged_flop) / max(now - logged_at, 1e-9) / self.world
                    self.log.write(self.step, self._metrics(rate, per_gpu, left, flop))
                    logged_tokens, logged_at, logged_flop = self.tokens, now, self.work.flop
            if ended:
                self._end_phase(end_area, last)
            if stopping or ended or self.step % training.save_steps == 0:
                self._save(last)
                said = time.monotonic()
            if stopping and not last:
                raise Stopped(f"stopped by SIGTERM; checkpoints/step_{self.step} is saved")

    def _end_phase(self, end_area: Callable[[str], None], last: bool) -> None:
        """Save an area's adapter and turn to the next; the checkpoint after it remembers that."""
        if self.phase.area:
            end_area(self.phase.area)
            self.areas[self.phase.area] = {"steps": self.step - self.begun, "loss": self.loss}
        self.reader.close()
        if not last:
            self.number, self.begun = self.number + 1, self.step
            self._take_phase()
            self.guard.forget()

    def _metrics(self, rate: float, per_gpu: float, left: float, flop: float) -> dict[str, Any]:
        """``per_gpu`` tokens/s, ``left`` seconds, ``flop`` FLOP/s of a GPU."""
        known: dict[str, Any] = {}
        if self.work.peak:
            known["mfu"] = round(flop / self.work.peak, 4)
        if self.phase.area:
            known["area"] = self.phase.area
        if self.price is not None:
            known["cost"] = round(self.seconds / 3600 * self.world * self.price, 2)
        return {
            "step": self.step,
            "loss": self.loss,
            "learning_rate": rate,
            "grad_norm": self.norm,
            "tokens": self.tokens,
            "tokens_per_s_per_gpu": round(per_gpu, 1),
            "memory_gb": round(self.peak_gb, 3),
            "hours_left": round(left / 3600, 4),
            "skipped_steps": self.guard.skipped,
            **known,
        }

    def _one_step(self, rate: float, begin: float, before: float) -> bool:
        """One optimizer step; returns whether some rank was told to stop."""
        step = self.reader.step(self.step - self.begun)
        targets = max(1, step.targets)
        # dropout of a step is the same after a resume
        torch.manual_seed(hash((self.training.seed, self.step, self.rank)))
        total = torch.zeros((), device=self.device)
        packing = self.engine.module.packing
        if packing is not None:
            packing.fresh = True
        self._clear_sums()
        for turn in range(self.accumulation):
            loss = self.engine(step.batches[turn], self.device)
            total += loss.detach()
            # DeepSpeed takes the mean over ranks and micro-batches: undone here
            self.engine.backward(loss * (self.world * self.accumulation / targets))
            if turn < self.accumulation - 1:
                self.engine.step()
        self.tokens += sum(int(lengths.sum()) for lengths in step.lengths)
        shared = torch.tensor([0.0, 0.0, 0.0, float(self.stop.came)], dtype=torch.float64)
        shared[0] = total.double()
        if self.rank == 0:
            spent = time.monotonic() - begin
            shared[1] = before + spent
            shared[2] = self._clock(before + spent, spent / (self.step + 1 - self.first))
        shared = shared.to(self.device)
        dist.all_reduce(shared)
        nll, self.seconds, clock, stopping = shared.tolist()
        self.clock = max(self.clock, clock)
        self.loss = nll / targets
        self._update(rate)
        self.step += 1
        self.work.add(step.lengths)
        self.peak_gb = max(self.peak_gb, _memory_gb(self.device))
        return bool(stopping > 0)

    def _update(self, rate: float) -> None:
        """Let the optimizer step, unless the guard objects to the loss or the gradient norm."""
        zero = self.engine.optimizer
        loss_refused = self.guard.refuses(self.loss, self.guard.losses)
        asked: list[bool] = []

        def allowed() -> bool:
            if not asked:  # the optimizer asks once a group of parameters
                self.norm = float(zero._global_grad_norm)
                if self.norm < 0:  # how DeepSpeed says "not finite"
                    self.norm = math.nan
                asked.append(not (self.guard.refuses(self.norm, self.guard.norms) or loss_refused))
            return asked[0]

        zero.optimizer.allowed = allowed
        for group in zero.optimizer.param_groups:
            group["lr"] = rate
        self.engine.step()
        if not asked:  # DeepSpeed itself found the gradients not finite
            self.norm = math.nan
        if asked != [True]:
            self.guard.count(self.step + 1, self.loss, self.norm)
            self._say(
                f"step {self.step + 1} skipped: loss {self.loss:.4g}, "
                f"gradient norm {self.norm:.4g} out of bounds"
            )

    def _save(self, last: bool) -> None:
        begin = time.monotonic()
        checkpoints.save_checkpoint(
            self.engine, self.folder, self.state(), self.training.save_total_limit
        )
        self.saving = max(self.saving, 14 / 12 * (time.monotonic() - begin))
        if not last:
            self._say(f"saved checkpoints/step_{self.step} in {time.monotonic() - begin:.1f} s")

    def _say(self, line: str) -> None:
        if self.rank == 0:
            print(line, flush=True)


class _Log:
    """metrics.jsonl and TensorBoard; a step that is there already is not written again."""

    def __init__(self, output: Path, step: int) -> None:
        self.file = output / "metrics.jsonl"
        self.last = 0
        output.mkdir(parents=True, exist_ok=True)
        if self.file.is_file():
            content = self.file.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):  # killed while it wrote a line
                os.truncate(self.file, len(whole))
            if whole:
                self.last = json.loads(whole.splitlines()[-1])["step"]
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            if name not in ("step", "area"):
                self.board.add_scalar(name, value, step)
        self.board.flush()
        if step <= self.last:
            return
        # JSON has no NaN
        finite = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in metrics.items()
        }
        with self.file.open("a") as out:
            out.write(json.dumps(finite) + "\n")


def _memory_gb(device: torch.device) -> float:
    """The most memory (10^9 bytes) this rank has used: of the GPU, or of the process on a CPU."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return float(torch.cuda.max_memory_allocated(device)) / 1e9


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
