"""The fields of the trigger form: which keys of a recipe they override, with the recipe's limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastcpt.recipe import Recipe, RecipeError

# What the trigger form can override: the form's name of a value and its key in the recipe.
FORM = {
    "documents": "documents.path",
    "instructions": "sft.instructions",
    "tokenizer": "tokenizer.path",
    "target_tokens": "selection.target_tokens",
    "quality_threshold": "selection.quality_threshold",
    "max_seq_length": "corpus.max_seq_length",
    "num_shards": "corpus.num_shards",
    "max_steps": "training.max_steps",
    "gpus": "cluster.gpus",
    "perplexity_threshold": "gate.perplexity_threshold",
    "use_fp8": "training.use_fp8",
    "connection": "cluster.connection",
}


def form_schema(name: str) -> dict[str, Any]:
    """JSON schema of one of ``FORM``'s values: the recipe's own type, limits and description.

    ``null`` stands for "as the recipe says". The description tells numbers' limits in words.
    """
    *sections, field = FORM[name].split(".")
    model: Any = Recipe
    for section in sections:
        model = model.model_fields[section].annotation
    schema = model.model_json_schema()["properties"][field]
    typed = next((s for s in schema.get("anyOf", []) if s.get("type") != "null"), schema)
    limits = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "pattern"}
    words = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most"}
    told = [f"{word} {typed[key]:,.15g}" for key, word in words.items() if key in typed]
    return {
        "type": [typed["type"], "null"],
        "description": f"{schema.get('description', '')} {', '.join(told).capitalize()}.".removesuffix(
            " ."
        ),
        **{key: typed[key] for key in limits & typed.keys()},
    }


def form_overrides(values: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides of ``load_recipe`` for the trigger form's values; empty ones are left out.

    A tokenizer given in the form takes the place of training one.
    """
    overrides = {
        FORM[name]: value
        for name, value in values.items()
        if name in FORM and value not in (None, "")
    }
    if "tokenizer.path" in overrides:
        overrides["tokenizer.train_vocab_size"] = None
    return overrides


def given_overrides(values: Mapping[str, Any]) -> dict[str, Any]:
    """The form's ``overrides``, by dotted key.

    ``RecipeError`` where one would reach ``cluster.rent``: a form is data, and those are commands that
    run on this machine.
    """
    overrides: dict[str, Any] = values.get("overrides") or {}
    if refused := [key for key in overrides if key == "cluster" or key.startswith("cluster.rent")]:
        raise RecipeError(
            f"override: {', '.join(refused)}: commands of this machine come from a recipe's file alone"
        )
    return overrides
