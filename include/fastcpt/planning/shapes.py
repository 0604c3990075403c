"""Shapes of Llama models, and the counts that follow from them.

Symbols as in the papers: ``h`` hidden size, ``L`` layers, ``V`` vocabulary, ``S`` sequence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcpt.recipe import Lora, Recipe


@dataclass(frozen=True)
class Shape:
    """A Llama's dimensions, by the names of transformers' ``LlamaConfig``."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool = False
    head_dim: int | None = None

    @property
    def queries(self) -> int:
        """Width of the queries, and of the attention's output."""
        return self.num_attention_heads * self._head_dim

    @property
    def keys(self) -> int:
        """Width of the keys, and of the values."""
        return self.num_key_value_heads * self._head_dim

    @property
    def _head_dim(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def matrix(self, name: str) -> tuple[int, int]:
        """Input and output width of one of a block's linear layers, by transformers' name."""
        h, f = self.hidden_size, self.intermediate_size
        return {
            "q_proj": (h, self.queries),
            "k_proj": (h, self.keys),
            "v_proj": (h, self.keys),
            "o_proj": (self.queries, h),
            "gate_proj": (h, f),
            "up_proj": (h, f),
            "down_proj": (f, h),
        }[name]

    @property
    def block_parameters(self) -> int:
        """Parameters of one block's matrices."""
        names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        return sum(rows * columns for rows, columns in map(self.matrix, names))

    @property
    def head_parameters(self) -> int:
        """Parameters of the output layer, ``V h``; the embedding has as many."""
        return self.vocab_size * self.hidden_size

    @property
    def matrix_parameters(self) -> int:
        """``N_mm``: what a token is multiplied with, so with the output layer, without look-up."""
        return self.num_hidden_layers * self.block_parameters + self.head_parameters

    @property
    def parameters(self) -> int:
        """All of them; a tied output layer counts once."""
        norms = (2 * self.num_hidden_layers + 1) * self.hidden_size
        embedding = 0 if self.tie_word_embeddings else self.head_parameters
        return self.matrix_parameters + embedding + norms

    def lora_parameters(self, lora: Lora) -> int:
        """``N_lora``: each target of width ``a -> b`` gets ``r (a + b)``."""
        targets = [self.matrix(name) for name in lora.target_modules]
        return self.num_hidden_layers * lora.r * sum(a + b for a, b in targets)


def _llama3(h: int, f: int, layers: int, heads: int, tied: bool = False) -> Shape:
    return Shape(h, f, layers, heads, 8, 128_256, tied)


# From the config.json of each model. Smaller ones first: what is suggested in place of a larger.
KNOWN = {
    "Llama-3.2-1B": Shape(2048, 8192, 16, 32, 8, 128_256, True),
    "Llama-3.2-3B": _llama3(3072, 8192, 28, 24, tied=True),
    "Llama-3.1-8B": _llama3(4096, 14_336, 32, 32),
    "Llama-3.1-70B": _llama3(8192, 28_672, 80, 64),
    "Llama-3.1-405B": _llama3(16_384, 53_248, 126, 128),
}
_SIZE = re.compile(r"llama[-_]?3(?:\.\d)?[-_](?:\w+-)?(\d+)b", re.IGNORECASE)


def known_name(name: str) -> str | None:
    """The table's name for a hub name or folder such as ``meta-llama/Llama-3.3-70B-Instruct``."""
    match = _SIZE.search(name.rstrip("/").rsplit("/", 1)[-1])
    wanted = f"-{match[1]}B" if match else ""
    return next((known for known in KNOWN if wanted and known.endswith(wanted)), None)


def shape_of(recipe: Recipe) -> Shape | None:
    """The shape of a recipe's model: its own config, a ``config.json`` here, or a known name.

    The file is that of a folder, or of a hub name in this machine's hub cache. None where none of
    them tells (a folder that only the cluster sees): ``unknown_model`` has the words. Raises
    ``ValueError`` for a config that lacks a dimension.
    """
    model = recipe.model
    if model.config is not None:
        vocabulary = recipe.tokenizer.train_vocab_size or 128_256
        return shape_from_config({"vocab_size": vocabulary, **model.config}, "model.config")
    assert model.name_or_path is not None  # the recipe has one of the two
    file = config_file(model.name_or_path)
    if file is not None:
        return shape_from_config(read_config(file), str(file))
    known = known_name(model.name_or_path)
    return KNOWN[known] if known else None


def config_file(name: str) -> Path | None:
    """The ``config.json`` of a folder, or of a hub name that was downloaded to this machine."""
    file = Path(name).expanduser() / "config.json"
    if file.is_file():
        return file
    # slow to import, and only for names that are no folder
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # no hub name: a path
        return None
    return Path(cached) if isinstance(cached, str) else None


def read_config(file: Path) -> dict[str, Any]:
    """The content of a ``config.json``; ``ValueError`` where it is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: no JSON ({error}); copy it from the model again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: no JSON object; copy it from the model again")
    return content


def unknown_model(name: str) -> str:
    """Why nothing can be planned for a model, and what helps."""
    help = f"put its config.json there on this machine too ({Path(name) / 'config.json'})"
    help += ", or plan a model of its shape (--model)"
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        help = f"have its config.json here: hf download {name} config.json"
    return (
        f"model: '{name}' is not known here, so neither are its memory, hours and cost: {help}. Known "
        f"without a file are {', '.join(KNOWN)}"
    )


def shape_from_config(config: Mapping[str, Any], where: str) -> Shape:
    """A shape from the keys of a ``config.json``; ``ValueError`` names a missing one."""
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for key in (*needed, "vocab_size"):
        if key not in config:
            raise ValueError(f"{where}: no '{key}', so the model's size is not known; add it")
    heads = config["num_attention_heads"]
    h, f, layers, heads = (config[key] for key in needed)
    return Shape(
        hidden_size=h,
        intermediate_size=f,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        vocab_size=config["vocab_size"],
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        head_dim=config.get("head_dim"),
    )
