"""The shape of a recipe's model, from its own config, a ``config.json`` on this machine, or its name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fastcpt.gguf import base_folder
from fastcpt.recipe import Recipe
from fastcpt.shapes import Shape, shape_from_config
from fastcpt.yaml_files import read_yaml

MODELS = Path(__file__).with_name("models.yaml")


def _known() -> dict[str, Shape]:
    table: dict[str, Any] = read_yaml(MODELS)
    where = MODELS.name
    return {name: shape_from_config(config, f"{where}, {name}") for name, config in table.items()}


KNOWN = _known()
# Models suggested instead of a larger one, smaller ones first.
LLAMAS = tuple(name for name in KNOWN if name.startswith("Llama-"))
_LLAMA_SIZE = re.compile(r"llama[-_]?3(?:\.\d)?[-_](?:\w+-)?(\d+)b", re.IGNORECASE)
_TUNED = re.compile(r"-(instruct|it|pt|chat|base|hf)(?=-|$)", re.IGNORECASE)


def known_name(name: str) -> str | None:
    """The table's name for a hub name or folder such as ``meta-llama/Llama-3.3-70B-Instruct``."""
    last = name.rstrip("/").rsplit("/", 1)[-1]
    match = _LLAMA_SIZE.search(last)
    if match:
        return next((llama for llama in LLAMAS if llama.endswith(f"-{match[1]}B")), None)
    plain = _TUNED.sub("", last)
    same = (k for k in KNOWN if re.fullmatch(rf"{re.escape(k)}(-\d{{4}}|-v0\.\d)*", plain, re.I))
    return next(same, None)


def shape_of(recipe: Recipe) -> Shape | None:
    """The shape of a recipe's model: its own config, a ``config.json`` here, or a known name.

    The file is in a folder, or for a hub name in this machine's hub cache. None if there is none (for
    example a folder that only the cluster has); ``unknown_model`` has the message. Raises ``ValueError``
    for a config without a dimension or of an unknown family.
    """
    model = recipe.model
    if model.config is not None:
        vocabulary = recipe.tokenizer.train_vocab_size or 128_256
        return shape_from_config(
            {"model_type": "llama", "vocab_size": vocabulary, **model.config}, "model.config"
        )
    assert model.name_or_path is not None  # the recipe has one of the two
    file = config_file(base_folder(model.name_or_path))
    if file is not None:
        return shape_from_config(_content(file), str(file))
    known = known_name(model.name_or_path)
    return KNOWN[known] if known else None


def config_file(name: str) -> Path | None:
    """The ``config.json`` of a folder, or of a hub name that was downloaded to this machine."""
    file = Path(name).expanduser() / "config.json"
    if file.is_file():
        return file
    # slow to import, and not needed for a folder
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # a path, not a hub name
        return None
    return Path(cached) if isinstance(cached, str) else None


def _content(file: Path) -> dict[str, Any]:
    """The content of a ``config.json``; ``ValueError`` if it is not valid."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: no JSON ({error}); copy it from the model again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: no JSON object; copy it from the model again")
    return content


def unknown_model(name: str) -> str:
    """The message for a model that cannot be planned, with what to do."""
    help = f"put its config.json there on this machine too ({Path(name) / 'config.json'})"
    help += ", or plan a model of its shape (--model)"
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        help = f"have its config.json here: hf download {name} config.json"
    return (
        f"model: '{name}' is not known here, so neither are its memory, hours and cost: {help}. Known "
        f"without a file are {', '.join(KNOWN)}"
    )
