"""Causal language models for training: loading, attention over packed rows, loss in pieces.

**Attention.** With flash-attn installed a micro-batch is one long row whose documents are told
apart by their cumulative lengths: no mask, and no work across documents. Otherwise rows stay
apart and get a block-diagonal causal mask.

**Loss.** Logits of a whole row take more memory than anything else (6 bytes x vocabulary x
tokens). ``LossHead`` computes loss and gradients together, ``CHUNK`` tokens at a time, inside the
output layer's own forward: under ZeRO-3 its weight is then gathered once a micro-batch.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fastcpt.files import read_json
from fastcpt.recipe import Lora, Recipe
from fastcpt.training.data import NO_LOSS, Batch

CHUNK = 1024  # tokens whose logits exist at one time


class ModelError(ValueError):
    """The model cannot be loaded or trained as asked; the message says what to change."""


def load_model(
    path: str | Path, attention: str = "auto", dtype: str = "bfloat16"
) -> tuple[Any, str]:
    """A causal language model and the name of the attention it uses.

    ``path`` is a folder that transformers loads, a hub name, or the ``final`` folder of a LoRA
    training (its base is then loaded and the adapter put on it). Raises ``ModelError`` where
    there is no model, or the asked-for attention is not installed.
    """
    attention = choose_attention(attention)
    base, adapted = base_of(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype=getattr(torch, dtype), attn_implementation=attention
        )
    except (ValueError, OSError) as error:
        raise ModelError(f"model '{base}' cannot be loaded: {error}") from error
    model.config.use_cache = False
    if adapted:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(path))
    return model, attention


def base_of(path: str | Path) -> tuple[str, bool]:
    """The folder or hub name with the whole weights, and whether ``path`` is an adapter on them."""
    reference = Path(path) / "base.json"
    adapted = reference.is_file()
    base = str(read_json(reference)["base"]) if adapted else str(path)
    if base.startswith(("/", ".", "~")) and not (Path(base) / "config.json").is_file():
        raise ModelError(f"{base}: no model there (no config.json)")
    return base, adapted


def initialise_model(recipe: Recipe, tokenizer: Path, target: Path) -> None:
    """Write a Llama of the recipe's ``model.config`` with random weights; whole or not at all.

    The vocabulary and its special tokens are the tokenizer's, the seed is ``training.seed``.
    """
    if recipe.model.config is None:
        raise ModelError("the recipe has a base model (model.name_or_path): nothing to initialise")
    words = AutoTokenizer.from_pretrained(str(tokenizer))
    given = {
        "vocab_size": len(words),
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    try:
        config = LlamaConfig(**{**given, **recipe.model.config})
    except (TypeError, ValueError) as error:
        raise ModelError(f"model.config: {error}") from error
    torch.manual_seed(recipe.training.seed)
    model = LlamaForCausalLM(config).to(getattr(torch, recipe.model.dtype))
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    words.save_pretrained(str(partial))
    partial.rename(target)


def choose_attention(wanted: str) -> str:
    """The fastest attention installed for ``auto``; ``ModelError`` where ``wanted`` is missing.

    Checked here because transformers would otherwise try to download a kernel.
    """
    flash = importlib.util.find_spec("flash_attn") is not None and torch.cuda.is_available()
    if wanted == "auto":
        return "flash_attention_2" if flash else "sdpa"
    if wanted == "flash_attention_2" and not flash:
        raise ModelError(
            "model.attn_implementation is flash_attention_2, but flash-attn is not installed or "
            "there is no GPU; install it (docs/cluster.md) or set it to auto"
        )
    return wanted


def add_lora(model: Any, lora: Lora) -> Any:
    """The model with fresh adapters; everything else is frozen. ``ModelError`` for bad targets."""
    from peft import LoraConfig, get_peft_model

    try:
        return get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=lora.r,
                lora_alpha=lora.lora_alpha,
                lora_dropout=lora.lora_dropout,
                target_modules=lora.target_modules,
            ),
        )
    except ValueError as error:
        raise ModelError(f"lora: {error}") from error


def require_fp8() -> None:
    """``ModelError`` unless this host can run transformer-engine's FP8 layers."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        raise ModelError("FP8 needs a Hopper or newer GPU; leave out --use_fp8 and use_fp8")
    if importlib.util.find_spec("transformer_engine") is None:
        raise ModelError(
            "FP8 needs transformer-engine, which is not installed; install "
            "requirements-cluster-gpu.txt or leave out --use_fp8 and use_fp8"
        )


def with_fp8_layers(model: Any) -> None:
    """Replace the blocks' linear layers by transformer-engine's, in place; the output layer stays.

    The parameters themselves move over, so that partitioned ones (ZeRO-3) stay so. Layers whose
    sides are no multiples of 16 stay as they are, as FP8 matrix products need that.
    """
    import transformer_engine.pytorch as te

    for block in model.model.layers:
        for module in list(block.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear and not (
                    child.in_features % 16 or child.out_features % 16
                ):
                    layer = te.Linear(
                        child.in_features,
                        child.out_features,
                        bias=child.bias is not None,
                        params_dtype=child.weight.dtype,
                        device="meta",
                    )
                    layer.weight = child.weight
                    if child.bias is not None:
                        layer.bias = child.bias
                    setattr(module, name, layer)


class ChunkedLoss(torch.autograd.Function):  # type: ignore[misc]
    """Summed cross entropy of ``hidden [T, H] @ weight.T [H, V]`` against ``targets [T]``.

    The gradient of a softmax cross entropy is ``softmax - one_hot``: known as soon as a chunk's
    logits are, so they are dropped at once and the forward leaves finished gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        for begin in range(0, len(hidden), CHUNK):
            part = slice(begin, begin + CHUNK)
            logits = (hidden[part] @ weight.T).float()
            asked = targets[part] != NO_LOSS
            index = targets[part].clamp(min=0)[:, None]
            log_total = logits.logsumexp(dim=-1, keepdim=True)
            loss += ((log_total - logits.gather(1, index))[:, 0] * asked).sum()
            if not needs_hidden and not needs_weight:
                continue
            slope = logits.sub_(log_total).exp_()
            slope.scatter_add_(1, index, -torch.ones_like(index, dtype=slope.dtype))
            slope_low = (slope * asked[:, None]).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = slope_low @ weight
            if grad_weight is not None:
                grad_weight += slope_low.T @ hidden[part]
        kept = grad_weight.to(weight.dtype) if grad_weight is not None else None
        ctx.save_for_backward(grad_hidden, kept)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else (grad_hidden * grad).to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad).to(grad_weight.dtype),
            None,
        )


class LossHead(nn.Linear):  # type: ignore[misc]
    """An output layer that, given targets, answers with the summed loss instead of logits."""

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        if targets is None:
            return super().forward(hidden)
        flat = hidden.reshape(-1, hidden.shape[-1])
        loss: torch.Tensor = ChunkedLoss.apply(flat, self.weight, targets.reshape(-1))
        return loss


class Trainee(nn.Module):  # type: ignore[misc]
    """What DeepSpeed trains: a batch in, the sum of its targets' negative log likelihoods out."""

    def __init__(self, model: Any, attention: str, fp8: bool) -> None:
        super().__init__()
        self.model = model
        self.attention, self.fp8 = attention, fp8
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        # the same parameter and name, another forward: saved models know nothing of it
        causal.lm_head.__class__ = LossHead

    def forward(self, batch: Batch, device: torch.device) -> torch.Tensor:
        model = self.model
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        inputs = packed_inputs(batch, self.attention, device)
        with _fp8_autocast(self.fp8):
            hidden = causal.model(**inputs, use_cache=False)[0]
        loss: torch.Tensor = causal.lm_head(hidden, batch.targets.to(device, non_blocking=True))
        return loss


def _fp8_autocast(enabled: bool) -> Any:
    if not enabled:
        from contextlib import nullcontext

        return nullcontext()
    import transformer_engine.pytorch as te

    return te.fp8_autocast(enabled=True)


def packed_inputs(batch: Batch, attention: str, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a transformers model that keep a batch's pieces apart."""
    input_ids = batch.input_ids.to(device, non_blocking=True)
    positions = batch.position_ids.to(device, non_blocking=True)
    lengths = torch.tensor(batch.lengths, device=device)
    if attention == "flash_attention_2":
        # flash-attn's packed kernel takes one row, however long
        ends = nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        longest = max(batch.lengths)
        return {
            "input_ids": input_ids.reshape(1, -1),
            "position_ids": positions.reshape(1, -1),
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": longest,
            "max_length_k": longest,
        }
    pieces = torch.arange(len(lengths), device=device).repeat_interleave(
        lengths, output_size=input_ids.numel()
    )
    pieces = pieces.reshape(input_ids.shape)
    mask = (pieces[:, :, None] == pieces[:, None, :]).tril()[:, None]  # [B, 1, S, S]
    if attention == "eager":  # adds its mask to the scores
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    return {"input_ids": input_ids, "position_ids": positions, "attention_mask": mask}
