"""The fields of the trigger form: the recipe's keys that they override, with the recipe's limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastcpt.recipe import Recipe, RecipeError

# The form's fields in groups: name in the form -> key in the recipe.
GROUPS = {
    "What": {
        "documents": "documents.path",
        "base_model": "model.name_or_path",
        "instructions": "sft.instructions",
        "tokenizer": "tokenizer.path",
        "quality_threshold": "selection.quality_threshold",
    },
    "How long": {
        "max_steps": "training.max_steps",
        "learning_rate": "training.learning_rate",
        "target_tokens": "selection.target_tokens",
        "max_seq_length": "corpus.max_seq_length",
        "num_shards": "corpus.num_shards",
    },
    "Where": {
        "connection": "cluster.connection",
        "gpus": "cluster.gpus",
        "use_fp8": "training.use_fp8",
    },
    "Limits": {
        "budget_hours": "budget.hours",
        "budget_money": "budget.money",
        "perplexity_threshold": "gate.perplexity_threshold",
    },
}
FORM = {name: key for group in GROUPS.values() for name, key in group.items()}
# The form's values of a switch, which may also be left to the recipe.
SWITCH = {"on": True, "off": False}


def form_schema(name: str) -> dict[str, Any]:
    """JSON schema of a field of ``FORM``: the recipe's own type, limits and description.

    ``null`` means "as the recipe says". So a switch has three positions: with two, the form could show the
    opposite of the recipe's value. The description names the limits of numbers.
    """
    *sections, field = FORM[name].split(".")
    model: Any = Recipe
    for section in sections:
        model = model.model_fields[section].annotation
    schema = model.model_json_schema()["properties"][field]
    typed = next((s for s in schema.get("anyOf", []) if s.get("type") != "null"), schema)
    if typed["type"] == "boolean":
        return {
            "type": ["string", "null"],
            "enum": [None, *SWITCH],
            "values_display": {"None": "as the recipe says"},
            "description": schema.get("description", ""),
        }
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

    A tokenizer in the form replaces training one, a base model replaces random weights.
    """
    overrides = {
        FORM[name]: SWITCH.get(value, value)
        if isinstance(value, str) and _is_switch(name)
        else value
        for name, value in values.items()
        if name in FORM and value not in (None, "")
    }
    if "tokenizer.path" in overrides:
        overrides["tokenizer.train_vocab_size"] = None
    if "model.name_or_path" in overrides:
        overrides["model.config"] = None
    return overrides


def given_overrides(values: Mapping[str, Any]) -> dict[str, Any]:
    """The form's ``overrides``, by dotted key.

    ``RecipeError`` if one would set ``cluster.rent``, which has commands that run on this machine: a form
    is data.
    """
    overrides: dict[str, Any] = values.get("overrides") or {}
    if refused := [key for key in overrides if key == "cluster" or key.startswith("cluster.rent")]:
        raise RecipeError(
            f"override: {', '.join(refused)}: commands of this machine come from a recipe's file alone"
        )
    return overrides


def _is_switch(name: str) -> bool:
    return "enum" in form_schema(name)


def typed_values(texts: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Convert texts typed into fields of ``FORM``; the values, and the errors by field.

    Empty fields are left out. The recipe checks the limits.
    """
    values: dict[str, Any] = {}
    wrong: dict[str, str] = {}
    for name, text in texts.items():
        kind = form_schema(name)["type"][0]
        text = text.strip()
        if not text:
            continue
        try:
            values[name] = {"integer": int, "number": float}.get(kind, str)(text)
        except ValueError:
            wrong[name] = "a whole number is needed" if kind == "integer" else "a number is needed"
    return values, wrong


def problems_by_field(message: str) -> tuple[dict[str, str], list[str]]:
    """Split the lines of a ``RecipeError`` into those about a field of the form, by field, and others."""
    by_field: dict[str, str] = {}
    others = []
    for line in message.splitlines():
        own = (name for name, key in FORM.items() if line.startswith(f"override: {key}: "))
        if name := next(own, None):
            by_field[name] = line.removeprefix(f"override: {FORM[name]}: ")
        else:
            others.append(line)
    return by_field, others


def own_values(recipe: Recipe) -> dict[str, str]:
    """The recipe's own value for each field of the form, as text; empty if there is none."""
    found = {}
    for name, key in FORM.items():
        value: Any = recipe
        for part in key.split("."):
            value = getattr(value, part)
        words = {True: "on", False: "off"} if isinstance(value, bool) else {}
        found[name] = words.get(value, "" if value is None else f"{value}")
    return found
