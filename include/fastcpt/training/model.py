"""Causal language models for training: loading, attention over packed rows, chunked loss.

**Attention.** With flash-attn installed a micro-batch is one long row whose documents are told
apart by their cumulative lengths (``cu_seqlens``): no mask, and no work across documents. Otherwise rows stay
apart and get a block-diagonal causal mask.

**Loss.** Logits of a whole row take more memory than anything else (6 bytes x vocabulary x
tokens). ``LossHead`` computes loss and gradients together, some thousand tokens at a time, inside the
output layer's own forward: under ZeRO-3 its weight is then gathered once a micro-batch.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from fastcpt.files import read_json
from fastcpt.recipe import Recipe
from fastcpt.recipe_sections import Lora
from fastcpt.step_memory import LOGITS_AT_ONCE
from fastcpt.training.data import IGNORE_INDEX, Batch
from fastcpt.training.layers import Packing, autocast

BASE = "base.json"  # in an adapter's folder: the model it is an adapter of


class ModelError(ValueError):
    """The model cannot be loaded or trained as asked; the message says what to change."""


def load_model(
    path: str | Path,
    attention: str = "auto",
    dtype: str = "bfloat16",
    device: torch.device | None = None,
) -> tuple[Any, str]:
    """A causal language model and the name of the attention it uses.

    ``path`` is a folder that transformers loads, a hub name, or the ``final`` folder of a LoRA
    training (its base is then loaded and the adapter put on it). Raises ``ModelError`` where
    there is no model, or the asked-for attention is not installed. Weights are read straight to
    ``device`` where one is given.
    """
    attention = choose_attention(attention)
    base = base_of(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            device_map=None if device is None else {"": device},
        )
    except (ValueError, OSError) as error:
        raise ModelError(f"model '{base}' cannot be loaded: {error}") from error
    model.config.use_cache = False
    if is_adapter(path):
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(path))
    return model, attention


def is_adapter(path: str | Path) -> bool:
    """Whether ``path`` is the ``final`` folder of a LoRA training."""
    return (Path(path) / BASE).is_file()


def base_of(path: str | Path) -> str:
    """The folder or hub name with the whole weights: of an adapter its base, else ``path`` itself.

    ``ModelError`` where it is a folder without a model.
    """
    base = str(read_json(Path(path) / BASE)["base"]) if is_adapter(path) else str(path)
    if base.startswith(("/", ".", "~")) and not (Path(base) / "config.json").is_file():
        raise ModelError(f"{base}: no model there (no config.json)")
    return base


def load_config(base: str) -> Any:
    """transformers' configuration of a model; ``ModelError`` where there is none."""
    try:
        return AutoConfig.from_pretrained(base)
    except (ValueError, OSError) as error:
        raise ModelError(f"model '{base}' cannot be loaded: {error}") from error


def initialise_model(recipe: Recipe, tokenizer: Path, target: Path) -> None:
    """Write a Llama of the recipe's ``model.config`` with random weights; whole or not at all.

    The vocabulary and its special tokens are the tokenizer's, the seed is ``training.seed``. The
    output layer is rounded up to 64 words: products over odd sizes take several times as long.
    """
    if recipe.model.config is None:
        raise ModelError("the recipe has a base model (model.name_or_path): nothing to initialise")
    words = AutoTokenizer.from_pretrained(str(tokenizer))
    given = {
        "vocab_size": -(-len(words) // 64) * 64,
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
            "there is no GPU; install requirements-cluster-flash.txt or set it to auto"
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
            autocast_adapter_dtype=False,  # the optimizer keeps them in float32
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


class HostEmbedding(nn.Module):  # type: ignore[misc]
    """A frozen embedding that stays in the host's memory; the rows of a micro-batch are sent.

    Its weight is no parameter: DeepSpeed would move it to the GPU.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.rows = embedding.weight.detach().cpu()

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """[T] on the CPU -> [T, H] there."""
        return nn.functional.embedding(words, self.rows)


class ChunkedLoss(torch.autograd.Function):  # type: ignore[misc]
    """Summed cross entropy of ``hidden [T, H] @ weight.T [H, V]`` against ``targets [T]``, with the
    logits of ``at_once`` tokens at a time.

    The gradient of a softmax cross entropy is ``softmax - one_hot``: known as soon as a chunk's
    logits are, so they are dropped at once and the forward leaves finished gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, at_once: int
    ) -> torch.Tensor:
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.empty_like(weight) if needs_weight else None
        loss_of = _compiled_loss() if hidden.is_cuda else _loss_and_gradient
        for begin in range(0, len(hidden), at_once):
            part = slice(begin, begin + at_once)
            part_loss, grad_logits = loss_of(hidden[part] @ weight.T, targets[part])
            loss += part_loss
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[part])
            if grad_weight is not None:  # added up inside the product
                beta = 1.0 if begin else 0.0
                torch.addmm(grad_weight, grad_logits.T, hidden[part], beta=beta, out=grad_weight)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden.mul_(grad),
            None if grad_weight is None else grad_weight.mul_(grad),
            None,
            None,
        )


def _loss_and_gradient(
    logits: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss of ``logits [T, V]`` and its gradient with respect to them, in their type."""
    wide = logits.float()
    mask = targets != IGNORE_INDEX
    index = targets.clamp(min=0)[:, None]
    log_total = wide.logsumexp(dim=-1, keepdim=True)
    loss = ((log_total - wide.gather(1, index))[:, 0] * mask).sum()
    words = torch.arange(wide.shape[1], device=wide.device)
    gradient = ((wide - log_total).exp() - (words == index).float()) * mask[:, None]
    return loss, gradient.to(logits.dtype)


@functools.cache
def _compiled_loss() -> Any:
    """Two passes over the logits instead of ten."""
    return torch.compile(_loss_and_gradient, dynamic=False)


class LossHead(nn.Linear):  # type: ignore[misc]
    """An output layer that, given targets, answers with the summed loss instead of logits."""

    at_once = LOGITS_AT_ONCE

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        if targets is None:
            return super().forward(hidden)
        flat = hidden.reshape(-1, hidden.shape[-1])
        loss: torch.Tensor = ChunkedLoss.apply(flat, self.weight, targets.reshape(-1), self.at_once)
        return loss


class Trainee(nn.Module):  # type: ignore[misc]
    """What DeepSpeed trains: a batch in, the sum of its targets' negative log likelihoods out."""

    def __init__(self, model: Any, attention: str, packing: Packing | None) -> None:
        """``packing`` is what fused blocks share; None for transformers' own layers."""
        super().__init__()
        self.model = model
        self.attention, self.packing = attention, packing
        # the same parameter and name, another forward: saved models know nothing of it
        self.causal.lm_head.__class__ = LossHead

    @property
    def causal(self) -> Any:
        """The model inside of peft's wrapper."""
        model = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def forward(self, batch: Batch, device: torch.device) -> torch.Tensor:
        causal = self.causal
        if self.packing is None:
            inputs = packed_inputs(batch, self.attention, device)
            hidden = causal.model(**inputs, use_cache=False)[0]
        else:
            self.packing.set_batch(batch, device)
            words, embedding = batch.input_ids.reshape(-1), causal.model.embed_tokens
            if not isinstance(embedding, HostEmbedding):
                words = words.to(device, non_blocking=True)
            hidden = embedding(words).to(device, non_blocking=True)
            if not hidden.requires_grad:  # DeepSpeed's hooks wait for a gradient of the input
                hidden.requires_grad_()
            with autocast(self.packing.fp8):
                for block in causal.model.layers:
                    hidden = block(hidden)
            self.packing.weights_changed = False
            hidden = causal.model.norm(hidden)
        loss: torch.Tensor = causal.lm_head(hidden, batch.targets.to(device, non_blocking=True))
        return loss


def packed_inputs(batch: Batch, attention: str, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a transformers model that keep a batch's segments apart."""
    input_ids = batch.input_ids.to(device, non_blocking=True)
    positions = batch.position_ids.to(device, non_blocking=True)
    lengths = torch.tensor(batch.lengths, device=device)
    if attention == "flash_attention_2":
        # flash-attn's packed kernel takes one row, however long
        cu_seqlens = nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        longest = max(batch.lengths)
        return {
            "input_ids": input_ids.reshape(1, -1),
            "position_ids": positions.reshape(1, -1),
            "cu_seq_lens_q": cu_seqlens,
            "cu_seq_lens_k": cu_seqlens,
            "max_length_q": longest,
            "max_length_k": longest,
        }
    segments = torch.arange(len(lengths), device=device).repeat_interleave(
        lengths, output_size=input_ids.numel()
    )
    segments = segments.reshape(input_ids.shape)
    mask = (segments[:, :, None] == segments[:, None, :]).tril()[:, None]  # [B, 1, S, S]
    if attention == "eager":  # adds its mask to the scores
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    return {"input_ids": input_ids, "position_ids": positions, "attention_mask": mask}
