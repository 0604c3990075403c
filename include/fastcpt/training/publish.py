"""Publishes a trained model as a folder: safetensors, tokenizer, model card.

Adapters are merged into the unquantized weights of their base model, even after FP8 training: each sum is
computed in float32 and rounded once to the recipe's type. The folder is complete or absent; publishing
again from the same inputs changes nothing.

A run with one adapter per legal area is published as one model, with the mean of its adapters merged. The
single adapters are in ``adapters/`` for peft, or for a server of several adapters on one base.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from fastcpt import __version__
from fastcpt.files import read_json, write_json
from fastcpt.progress import signs_of_life
from fastcpt.recipe import Recipe
from fastcpt.training.card import hub_name, model_card, read_facts
from fastcpt.training.checkpoints import put_in_place
from fastcpt.training.inference import model_identity
from fastcpt.training.made_from import publication_name
from fastcpt.training.model import load_model
from fastcpt.training.sft import Chat

SHARD = "5GB"
PUBLICATION = "publication.json"


class PublishError(ValueError):
    """The model cannot be published; the message says what to change."""


def publish(recipe: Recipe, model: Path, record: Path, output: Path) -> dict[str, Any]:
    """Write the folder ``output``; returns what its ``publication.json`` holds.

    ``model`` is a training's ``final`` folder, ``record`` the run's record, which may be incomplete.
    ``publication.json``: ``made_from`` (a digest of all inputs), ``version`` (of Fast CPT), ``base`` (its
    hub name or None), ``parameters`` and ``merged`` (whether there were adapters). Raises
    ``PublishError``, ``ModelError`` if the model cannot be loaded, ``InstructionError`` for its tokenizer.
    """
    if not model.is_dir():
        raise PublishError(f"--model {model}: no such folder")
    if not record.is_dir():
        raise PublishError(f"--record {record}: no such folder")
    facts = read_facts(record)
    made_from = publication_name(recipe, facts, model_identity(model))
    if (output / PUBLICATION).is_file() and read_json(output / PUBLICATION)[
        "made_from"
    ] == made_from:
        print(f"{output} is complete", flush=True)
        return dict(read_json(output / PUBLICATION))
    logging.disable_progress_bar()
    causal, merged = merge_lora(model, recipe.model.dtype)
    if facts["train_sft/training"]:
        chat = Chat(model)
        causal.generation_config.eos_token_id = sorted({chat.end_id, chat.tokenizer.eos_token_id})
    parameters = causal.num_parameters()
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with signs_of_life(f"writing {parameters:,} parameters"):
        causal.save_pretrained(str(partial), max_shard_size=SHARD)
    AutoTokenizer.from_pretrained(str(model)).save_pretrained(str(partial))
    areas = _copy_adapters(model, partial, hub_name(recipe))
    card = model_card(recipe, facts, parameters=parameters, areas=areas, version=__version__)
    (partial / "README.md").write_text(card, encoding="utf-8")
    result = {
        "made_from": made_from,
        "version": __version__,
        "base": hub_name(recipe),
        "parameters": parameters,
        "merged": merged,
    }
    write_json(partial / PUBLICATION, result)
    put_in_place(partial, output)
    print(f"published {output}", flush=True)
    return result


def merge_lora(model: Path, dtype: str) -> tuple[Any, bool]:
    """Load a model and merge its adapters, if any; the model, and whether there were adapters.

    ``PublishError`` if weights are not finite, ``ModelError`` if there is no model.
    """
    with signs_of_life(f"loading {model.name}"):
        causal, _ = load_model(model, "sdpa", dtype)
    merged = hasattr(causal, "merge_and_unload")
    if merged:
        with signs_of_life("merging the adapter into its base model"):
            # not safe_merge, which rounds the product before adding it
            causal = causal.merge_and_unload()
    _check_finite(causal)
    causal.config.use_cache = True  # training turns it off
    return causal, merged


def _copy_adapters(model: Path, output: Path, base: str | None) -> list[str]:
    """Copy each area's adapter for peft, with the base's hub name or none; the areas."""
    folders = sorted((model / "areas").glob("*/"))
    for folder in folders:
        target = output / "adapters" / folder.name
        target.mkdir(parents=True)
        shutil.copyfile(folder / "adapter_model.safetensors", target / "adapter_model.safetensors")
        settings = read_json(folder / "adapter_config.json")
        write_json(target / "adapter_config.json", {**settings, "base_model_name_or_path": base})
    return [folder.name for folder in folders]


def _check_finite(model: Any) -> None:
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise PublishError(
                f"{name} holds values that are not finite: the training broke the model; take an "
                "earlier checkpoint"
            )
