"""Causal language models for training: loading, attention over packed rows, chunked loss.

**Attention.** With flash-attn a micro-batch is one long row whose segments are given by ``cu_seqlens``:
no mask, and no work across segments. Otherwise rows stay separate and get a block-diagonal causal mask.

**Loss.** The logits of a whole row would need more memory than anything else (6 bytes x vocabulary x
tokens). ``LossHead`` computes loss and gradients together, some thousand tokens at a time, inside the
output layer's forward; so ZeRO-3 gathers its weight once per micro-batch.
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

from fastcpt.files import BASE_MODELS, read_json
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

    ``path`` is a folder that transformers can load, a hub name, or the ``final`` folder of a LoRA training
    (its base is loaded, then the adapter). Weights are loaded directly to ``device`` if it is given.
    Raises ``ModelError`` if there is no model or the wanted attention is not installed.
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
    """The folder or hub name of the full weights: an adapter's base, else ``path`` itself.

    An adapter that was trained on a host with another root finds its base model under this one's.
    ``ModelError`` if there is no model in the folder.
    """
    base = str(read_json(Path(path) / BASE)["base"]) if is_adapter(path) else str(path)
    if not base.startswith(("/", ".", "~")):
        return base
    under_roots = (parent / BASE_MODELS / Path(base).name for parent in Path(path).parents)
    for folder in (Path(base), *under_roots):
        if (folder / "config.json").is_file():
            return str(folder)
    raise ModelError(f"{base}: no model there (no config.json)")


def load_config(base: str) -> Any:
    """transformers' configuration of a model; ``ModelError`` if there is none."""
    try:
        return AutoConfig.from_pretrained(base)
    except (ValueError, OSError) as error:
        raise ModelError(f"model '{base}' cannot be loaded: {error}") from error


def initialise_model(recipe: Recipe, tokenizer: Path, target: Path) -> None:
    """Write a Llama of the recipe's ``model.config`` with random weights, atomically.

    Vocabulary and special tokens come from the tokenizer, the seed is ``training.seed``. The vocabulary
    size is rounded up to a multiple of 64, as products over odd sizes are several times slower.
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
    """The fastest installed attention for ``auto``; ``ModelError`` if ``wanted`` is not installed.

    Checked here because transformers would try to download a kernel.
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
    """A frozen embedding in host memory; only a micro-batch's rows go to the GPU.

    Its weight is not a parameter, as DeepSpeed would move it to the GPU.
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

    The logits gradient, ``softmax - one_hot``, is known as soon as a chunk's logits are. So the forward
    computes the gradients of hidden and weight too, and drops each chunk's logits.
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
            if grad_weight is not None:  # accumulated by the product itself
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
    """Summed loss of ``logits [T, V]`` and the logits gradient, in the logits' type."""
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
    """Compiled: two passes over the logits instead of ten."""
    return torch.compile(_loss_and_gradient, dynamic=False)


class LossHead(nn.Linear):  # type: ignore[misc]
    """An output layer that returns the summed loss instead of logits if it gets targets."""

    at_once = LOGITS_AT_ONCE

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        if targets is None:
            return super().forward(hidden)
        flat = hidden.reshape(-1, hidden.shape[-1])
        loss: torch.Tensor = ChunkedLoss.apply(flat, self.weight, targets.reshape(-1), self.at_once)
        return loss


class Trainee(nn.Module):  # type: ignore[misc]
    """The module that DeepSpeed trains: from a batch to the summed negative log likelihood of its targets."""

    def __init__(self, model: Any, attention: str, packing: Packing | None) -> None:
        """``packing`` is what fused blocks share; None for transformers' own layers."""
        super().__init__()
        self.model = model
        self.attention, self.packing = attention, packing
        # same parameter and name, only another forward: saved models are unaffected
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
            if not hidden.requires_grad:  # DeepSpeed's hooks need a gradient of the input
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
