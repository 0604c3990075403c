"""A model's dimensions and parameter counts, without torch, for the plan and the trainer.

Symbols as in the papers: ``h`` hidden size, ``L`` layers, ``V`` vocabulary, ``S`` sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fastcpt.families import FAMILIES, NEEDED, Family, read_config
from fastcpt.recipe_sections import Lora


@dataclass(frozen=True)
class Shape:
    """A model's dimensions under the names of transformers' configurations; Llama's by default."""

    hidden_size: int
    intermediate_size: int  # of one expert, if there are experts
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool = False
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    model_type: str = "llama"
    vectors: int | None = None  # norms, biases and the like; None: two norms per layer and the last
    experts: int = 0  # feed-forward networks per layer; 0: one, for all tokens
    experts_a_token: int = 0
    config: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    @property
    def configuration(self) -> Mapping[str, Any]:
        """The configuration for ``fastcpt.families``; made from the dimensions if there is none."""
        if self.config is not None:
            return self.config
        named = ("model_type", *NEEDED, "num_key_value_heads", "head_dim", "vocab_size")
        return read_config({name: getattr(self, name) for name in named}, "a shape")

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

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
            "qkv_proj": (h, self.queries + 2 * self.keys),
            "o_proj": (self.queries, h),
            "gate_proj": (h, f),
            "up_proj": (h, f),
            "gate_up_proj": (h, 2 * f),
            "down_proj": (f, h),
        }[name]

    @property
    def widened(self) -> int:
        """Width of a feed-forward network's first product: up, and the gate if there is one."""
        return (2 if self.family.gated else 1) * self.intermediate_size

    def _block(self, networks: int) -> int:
        """Parameters of a block's matrices with this many feed-forward networks."""
        h = self.hidden_size
        attention = 2 * h * self.queries + 2 * h * self.keys
        network = h * (self.widened + self.intermediate_size)
        return attention + networks * network + h * self.experts  # the last term is the router

    @property
    def block_parameters(self) -> int:
        """Parameters of one block's matrices."""
        return self._block(self.experts or 1)

    @property
    def head_parameters(self) -> int:
        """Parameters of the output layer, ``V h``; the embedding has as many."""
        return self.vocab_size * self.hidden_size

    @property
    def matrix_parameters(self) -> int:
        """``N_mm``: the weights that a token is multiplied with: with the output layer, without the
        embedding, and only the experts that it is routed to."""
        block = self._block(self.experts_a_token or 1)
        return self.num_hidden_layers * block + self.head_parameters

    @property
    def parameters(self) -> int:
        """All parameters; a tied output layer counts once."""
        vectors = self.vectors
        if vectors is None:
            vectors = (2 * self.num_hidden_layers + 1) * self.hidden_size
        ends = self.head_parameters * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * self.block_parameters + ends + vectors

    @property
    def active_parameters(self) -> int:
        """Parameters used for one token: all, except the experts that it is not routed to."""
        idle = self.block_parameters - self._block(self.experts_a_token or 1)
        return self.parameters - self.num_hidden_layers * idle

    def lora_parameters(self, lora: Lora) -> int:
        """``N_lora``: each target of width ``a -> b`` gets ``r (a + b)``."""
        targets = [self.matrix(name) for name in lora.target_modules]
        return self.num_hidden_layers * lora.r * sum(a + b for a, b in targets)


def _vectors(family: Family, config: Mapping[str, Any], shape: Shape) -> int:
    """Parameters outside matrices: norms, biases and family-specific ones."""
    h, q, k = shape.hidden_size, shape.queries, shape.keys
    width = q // shape.num_attention_heads
    layer = family.norms * h + {"none": 0, "head": 2 * width, "all": q + k}[family.query_norms]
    if config["attention_bias"]:
        layer += q + 2 * k + (h if family.output_bias else 0)
    if config["mlp_bias"]:
        layer += (shape.experts or 1) * (shape.widened + h)
        layer += shape.experts + (shape.num_attention_heads if shape.experts else 0)  # gpt-oss's
    return shape.num_hidden_layers * (layer + family.other) + h


def shape_from_config(config: Mapping[str, Any], where: str) -> Shape:
    """A shape from the content of a ``config.json``; ``ValueError`` names what is missing or unknown."""
    full = read_config(config, where)
    family = FAMILIES[full["model_type"]]
    h, heads = full["hidden_size"], full["num_attention_heads"]
    experts, chosen, width = (
        (full[key] for key in family.experts)
        if family.experts
        else (0, 0, full["intermediate_size"])
    )
    if family.experts and (full.get("mlp_only_layers") or full.get("decoder_sparse_step", 1) != 1):
        raise ValueError(
            f"{where}: only some layers have experts (mlp_only_layers, decoder_sparse_step): such a model's "
            "parameters are not counted here; take another model"
        )
    shape = Shape(
        hidden_size=h,
        intermediate_size=width,
        num_hidden_layers=full["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=full["num_key_value_heads"] or heads,
        vocab_size=full["vocab_size"],
        tie_word_embeddings=bool(full["tie_word_embeddings"]),
        head_dim=None if full["head_dim"] in (None, h // heads) else full["head_dim"],
        model_type=full["model_type"],
        experts=experts,
        experts_a_token=chosen,
        config=full,
    )
    vectors = _vectors(family, full, shape)
    usual = (2 * shape.num_hidden_layers + 1) * h
    return replace(shape, vectors=None if vectors == usual else vectors)
