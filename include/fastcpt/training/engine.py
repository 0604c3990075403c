"""Builds DeepSpeed's engine: the model with activation checkpointing, the optimizer, ZeRO's settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import set_z3_leaf_modules
from transformers.integrations import HfDeepSpeedConfig

from fastcpt.files import read_json
from fastcpt.recipe import Recipe
from fastcpt.recipe_sections import Training
from fastcpt.shapes import Shape, shape_from_config
from fastcpt.step_memory import ActivationCheckpointing, activation_checkpointing
from fastcpt.training.exits import TrainingError
from fastcpt.training.guard import GuardedAdamW
from fastcpt.training.layers import Block, Packing, ReadLayer, can_fuse, with_fused_blocks
from fastcpt.training.layerwise import load_layerwise
from fastcpt.training.model import (
    HostEmbedding,
    Trainee,
    add_lora,
    base_of,
    is_adapter,
    load_config,
    load_model,
)
from fastcpt.training.rounded_adamw import RoundedAdamW

UPDATED_AT_ONCE = 300_000_000  # weights per optimizer group on a single rank


def build_engine(
    recipe: Recipe,
    training: Training,
    path: str,
    deepspeed_file: Path,
    accumulation: int,
    use_fp8: bool,
    device: torch.device,
) -> tuple[Any, dict[str, Any]]:
    """DeepSpeed's engine around the model, and what was chosen for it (for training.json)."""
    # one long function, as each choice depends on the earlier ones
    base = base_of(path)
    shape = shape_from_config(load_config(base).to_dict(), base)
    world, model = dist.get_world_size(), recipe.model
    targets = recipe.lora.target_modules if recipe.lora else []
    size = recipe.corpus.max_seq_length
    fused = can_fuse(shape.configuration, model.dtype, model.attn_implementation, size)
    block = shape.block_parameters + 2 * shape.hidden_size  # with its norms
    config = deepspeed_config(deepspeed_file, training, model.dtype, block, accumulation, world)
    offload = "offload_optimizer" in config["zero_optimization"]
    memory = _checkpointing(recipe, training, shape, device, use_fp8, offload)
    one_by_one = memory.one_byte and world == 1
    if memory.gathered:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 10**12
    if device.type == "cuda":
        _use_liger(shape.model_type)
    # while this object exists, from_pretrained loads only this rank's partition
    partitioned = HfDeepSpeedConfig(config) if world > 1 else None
    causal, attention, read = _load(recipe, training, path, device, one_by_one)
    packing = None
    if fused:
        # cuDNN's kernels are faster than flash-attn 2 on Hopper
        attention = "transformer_engine" if model.attn_implementation == "auto" else attention
        accumulate = world == 1 and not targets and not offload
        zero3 = config if world > 1 else None
        packing = _fuse(causal, size, attention, use_fp8, memory, zero3, device, accumulate, read)
    elif memory.kind != "none":
        # transformers recomputes whole layers, all of them or none
        memory = replace(memory, kind="full", layers=memory.total)
        causal.gradient_checkpointing_enable({"use_reentrant": False})
    causal.train()
    trainee = Trainee(causal, attention, packing)
    trainee.causal.lm_head.at_once = memory.logits_at_once
    engine, *_ = deepspeed.initialize(
        model=trainee, optimizer=_optimizer(trainee, training, world), config=config
    )
    del partitioned
    if training.optimizer_states != "float32":
        _update_weights_themselves(engine)
    chosen = {
        "base": base,
        "ranks": world,
        "micro_batch": training.per_device_train_batch_size,
        "accumulation": accumulation,
        "layers": "fused" if fused else "plain",
        "attention": attention,
        "precision": "fp8" if use_fp8 else model.dtype,
        "checkpointing": memory.kind,
        "layers_recomputed": memory.layers,
        "weights_kept_gathered": memory.gathered,
        "frozen_weights": "one byte" if memory.one_byte else None,
        "layers_on_host": memory.on_host,
        "optimizer_states": training.optimizer_states,
    }
    if dist.get_rank() == 0:
        trained = parameters(trainee, trained=True) if targets else shape.parameters
        print(
            f"model {base}: {shape.parameters:,} parameters, {trained:,} trained, {chosen['layers']} layers, "
            f"attention {attention}, {model.dtype}{', FP8' if use_fp8 else ''}"
            f"{', LoRA' if recipe.lora else ''}, {memory}, optimizer states in "
            f"{training.optimizer_states}, {world} ranks",
            flush=True,
        )
    return engine, chosen


def _checkpointing(
    recipe: Recipe,
    training: Training,
    shape: Shape,
    device: torch.device,
    use_fp8: bool,
    offload: bool,
) -> ActivationCheckpointing:
    """What to recompute: as the recipe says, or as little as fits; on CPUs nothing by default."""
    wanted, layers = training.gradient_checkpointing, shape.num_hidden_layers
    if device.type == "cpu":
        return ActivationCheckpointing(
            "full" if wanted is True else "none", layers * (wanted is True), layers
        )
    return activation_checkpointing(
        shape,
        training.per_device_train_batch_size * recipe.corpus.max_seq_length,
        dist.get_world_size(),
        torch.cuda.get_device_properties(device).total_memory,
        lora=recipe.lora,
        fp8=use_fp8,
        offload=offload,
        states=training.optimizer_states,
        wanted=wanted,
    )


def _load(
    recipe: Recipe, training: Training, path: str, device: torch.device, one_by_one: bool
) -> tuple[Any, str, ReadLayer | None]:
    """The model with gradients on for what is trained, the name of its attention, and, if layers are
    read ``one_by_one``, the function that reads one."""
    torch.manual_seed(training.seed)
    place = device if device.type == "cuda" and dist.get_world_size() == 1 else None
    model, read = recipe.model, None
    if one_by_one:
        causal, attention, read = load_layerwise(
            path, model.attn_implementation, model.dtype, device
        )
    else:
        causal, attention = load_model(path, model.attn_implementation, model.dtype, place)
    if is_adapter(path):  # a second training of the adapters
        for name, parameter in causal.named_parameters():
            parameter.requires_grad_("lora_" in name)
    elif recipe.lora is not None:
        torch.manual_seed(training.seed)  # loading may have drawn random numbers
        causal = add_lora(causal, recipe.lora)
    return causal, attention, read


def _fuse(
    causal: Any,
    size: int,
    attention: str,
    use_fp8: bool,
    memory: ActivationCheckpointing,
    zero3: dict[str, Any] | None,
    device: torch.device,
    accumulate: bool,
    read: ReadLayer | None,
) -> Packing:
    """Replace the model's layers by fused blocks and set what each recomputes."""
    inside = causal.get_base_model() if hasattr(causal, "get_base_model") else causal
    keep, one_byte = memory.keep_fp8, memory.one_byte
    packing = with_fused_blocks(
        inside, size, attention, use_fp8, keep, zero3, device, accumulate, one_byte, read
    )
    for n, block in enumerate(inside.model.layers):
        block.recompute(memory.kind if n < memory.layers else "none", n < memory.on_host)
    if memory.on_host and not inside.config.tie_word_embeddings:
        inside.model.embed_tokens = HostEmbedding(inside.model.embed_tokens)
    set_z3_leaf_modules(causal, [Block])
    return packing


def deepspeed_config(
    file: Path, training: Training, dtype: str, block: int, accumulation: int, world: int
) -> dict[str, Any]:
    """The DeepSpeed file with its "auto" values filled in from the recipe.

    ``block`` is the number of weights of one layer: the next layer is fetched while one computes. Raises
    ``TrainingError`` if a fixed value of the file contradicts the recipe. A single rank runs stage 1: it
    has nothing to partition, and ZeRO-3's copies would only cost memory and time.
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
        if "offload_optimizer" not in zero:  # offloading needs these buffers
            zero |= {"overlap_comm": False, "contiguous_gradients": False}
    states = training.optimizer_states
    if states != "float32":
        if "offload_optimizer" in zero:
            raise TrainingError(
                f"{file}: optimizer_states {states} cannot be offloaded; take float32"
            )
        # have DeepSpeed hand the optimizer bf16 weights and gradients
        config["bf16"] |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    config["steps_per_print"] = 10**9
    config["zero_allow_untested_optimizer"] = True  # GuardedAdamW, RoundedAdamW
    return config


def _use_liger(model_type: str) -> None:
    """Use Liger's fused norms, rotary embeddings and activations if it is installed."""
    try:
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel
    except ImportError:
        return
    _apply_liger_kernel(model_type, cross_entropy=False, fused_linear_cross_entropy=False)


def _optimizer(trainee: Trainee, training: Training, world: int) -> GuardedAdamW | RoundedAdamW:
    """AdamW without weight decay on norms and biases.

    On a single rank, groups have at most about ``UPDATED_AT_ONCE`` weights: DeepSpeed's stage 1 copies
    the gradients of one group at a time into the optimizer's type.
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
    # DeepSpeed makes an empty first step; the loop sets the rate of all others
    settings: dict[str, Any] = {
        "lr": 0.0,
        "betas": (training.adam_beta1, training.adam_beta2),
        "eps": training.adam_epsilon,
    }
    states = training.optimizer_states
    if states == "float32":
        return GuardedAdamW(groups, **settings, fused=True)
    rank = dist.get_rank()
    return RoundedAdamW(groups, **settings, states=states, seed=training.seed, rank=rank)


def _update_weights_themselves(engine: Any) -> None:
    """Make the optimizer update the model's own bf16 weights instead of DeepSpeed's copies of them."""
    zero = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        for copy, weights in zip(
            zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True
        ):
            copy.data = weights.data
    else:
        for copy, (weights,) in zip(
            zero.single_partition_of_fp32_groups,
            zero.parallel_partitioned_bit16_groups,
            strict=True,
        ):
            copy.data = weights.data
        zero._link_all_hp_params()  # its views held the copies
    if engine.device.type == "cuda":
        torch.cuda.empty_cache()


def parameters(module: torch.nn.Module, trained: bool = False) -> int:
    """Number of weights over all ranks; with ``trained``, only those with gradients."""
    return sum(
        int(getattr(p, "ds_numel", p.numel()))
        for p in module.parameters()
        if p.requires_grad or not trained
    )


def begin_step(engine: Any) -> None:
    """Tell fused blocks that the weights changed, and zero the gradients that they accumulate themselves."""
    if engine.module.packing is not None:
        engine.module.packing.weights_changed = True
    for weight in engine.module.parameters():
        if hasattr(weight, "main_grad"):
            weight.grad = weight.main_grad.zero_()
