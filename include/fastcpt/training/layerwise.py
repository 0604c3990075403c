"""Loads a model's layers one at a time, so that all of its bfloat16 weights are never in memory at once.

Layers start as placeholders: parameters of the right shape, type and device that need no memory. peft adds
its adapters to them as to any layer. Each layer's weights are read when it becomes a fused block.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from fastcpt.training.layers import ReadLayer
from fastcpt.training.model import ModelError, base_of, choose_attention, is_adapter, load_config

LAYERS = "model.layers."


def load_layerwise(
    path: str | Path, attention: str, dtype: str, device: torch.device
) -> tuple[Any, str, ReadLayer]:
    """As ``model.load_model``, but with placeholder layers; also returns the function that reads one.

    All other weights are loaded on ``device``. ``ModelError`` if the weights are not in safetensors files.
    """
    attention, base = choose_attention(attention), base_of(path)
    files = weight_files(base)
    model = without_layers(load_config(base), attention, getattr(torch, dtype), device)
    ends = {name for name, _ in model.named_parameters() if not name.startswith(LAYERS)}
    read = read_tensors(files, ends, base, getattr(torch, dtype), device)
    with torch.no_grad():
        for name, weight in read.items():
            model.get_parameter(name).copy_(weight)
    names = {
        n: [name for name, _ in layer.named_parameters()]
        for n, layer in enumerate(model.model.layers)
    }

    def read_layer(n: int) -> Mapping[str, torch.Tensor]:
        prefix = f"{LAYERS}{n}."
        wanted = {prefix + name for name in names[n]}
        whole = read_tensors(files, wanted, base, getattr(torch, dtype), device)
        return {name.removeprefix(prefix): weight for name, weight in whole.items()}

    if is_adapter(path):
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(path))
    return model, attention, read_layer


def without_layers(config: Any, attention: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A model with uninitialised weights on ``device`` and placeholders in its layers."""
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    model.config.use_cache = False
    for name, parameter in list(model.named_parameters()):
        place, _, attribute = name.rpartition(".")
        if name.startswith(LAYERS):
            empty = torch.empty((), dtype=dtype, device=device).expand(parameter.shape)
        else:
            empty = torch.empty(parameter.shape, dtype=dtype, device=device)
        setattr(model.get_submodule(place), attribute, nn.Parameter(empty))
    model.tie_weights()
    return model.to(device)


def weight_files(base: str) -> dict[str, Path]:
    """The safetensors file of each weight of a model, given by folder or hub name."""
    folder = Path(base)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(base, allow_patterns=["*.safetensors"]))
        except (ValueError, OSError) as error:
            raise ModelError(f"model '{base}' cannot be loaded: {error}") from error
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            found.update(dict.fromkeys(stored.keys(), file))
    return found


def read_tensors(
    files: Mapping[str, Path],
    names: set[str],
    base: str,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Read weights by name; ``ModelError`` for one that no file has."""
    missing = sorted(names - files.keys())
    if missing:
        raise ModelError(
            f"model '{base}': no safetensors file has {missing[0]}, and FP8 training of adapters reads layer by "
            "layer; save the model once with transformers' save_pretrained, or set use_fp8 to false"
        )
    by_file: dict[Path, list[str]] = defaultdict(list)
    for name in sorted(names):
        by_file[files[name]].append(name)
    weights = {}
    for file, inside in by_file.items():
        with safe_open(file, framework="pt", device=str(device)) as stored:
            for name in inside:
                weights[name] = stored.get_tensor(name).to(dtype)
    return weights
