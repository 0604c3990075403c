"""Which model families the trainer supports, and which of them in fused blocks and in FP8.

A model is described by its configuration: the content of ``config.json`` or transformers'
``config.to_dict()``. The trainer checks it before it loads anything, the plan before anything is rented;
so nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fastcpt.recipe import Recipe

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FUSED = ("llama", "mistral", "qwen2", "qwen3")  # families with fused blocks
# rotary embeddings that depend on the position alone, without a factor on the attention
ROPES = ("default", "linear", "llama3")
NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# transformers' defaults in most families, for keys that a configuration leaves out.
USUAL: dict[str, Any] = {
    "tie_word_embeddings": False,
    "num_key_value_heads": None,  # as many as heads
    "head_dim": None,  # hidden_size / heads
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
}


@dataclass(frozen=True)
class Family:
    """How the models of one ``model_type`` differ from Llama, whose values are the defaults here.

    ``defaults``: transformers' defaults for keys that a configuration leaves out; ``fixed``: values that
    transformers uses whatever the configuration says.
    """

    words: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    norms: int = 2  # per layer, each of the hidden size
    query_norms: Literal["none", "head", "all"] = (
        "none"  # on queries and keys: per head or over all
    )
    output_bias: bool = True  # attention_bias includes the attention's output layer
    gated: bool = True
    linears: tuple[str, ...] = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
    experts: tuple[
        str, ...
    ] = ()  # keys for: number of experts, experts per token, width of an expert
    other: int = 0  # parameters of a layer apart from matrices, norms and biases
    liger: bool = True  # liger-kernel supports it


_NO_BIAS = {"attention_bias": False, "mlp_bias": False}
_NO_MLP_BIAS = {"mlp_bias": False}
_EXPERTS = ("num_local_experts", "num_experts_per_tok", "intermediate_size")
_OLMO: dict[str, Any] = {"fixed": _NO_MLP_BIAS, "query_norms": "all"}
_GEMMA = {"tie_word_embeddings": True, "head_dim": 256}
_GEMMA_3 = {
    **_GEMMA,
    **{"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26},
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262_208},
    "sliding_window": 4096,
}
# tests/training/test_families.py counts each as transformers does
FAMILIES = {
    "llama": Family("Llama"),
    "mistral": Family(
        "Mistral", {"num_key_value_heads": 8, "sliding_window": 4096}, fixed=_NO_BIAS
    ),
    "qwen2": Family(
        "Qwen 2",
        {"num_key_value_heads": 32, "use_sliding_window": False, "sliding_window": 4096},
        fixed={"attention_bias": True, "mlp_bias": False},
        output_bias=False,
    ),
    "qwen3": Family(
        "Qwen 3",
        {
            **{"num_key_value_heads": 32, "head_dim": 128},
            **{"use_sliding_window": False, "sliding_window": 4096},
        },
        fixed=_NO_MLP_BIAS,
        query_norms="head",
    ),
    "gemma": Family("Gemma", {**_GEMMA, "num_key_value_heads": 16}, fixed=_NO_MLP_BIAS),
    "gemma2": Family(
        "Gemma 2",
        {
            **{**_GEMMA, "num_key_value_heads": 4, "sliding_window": 4096},
            "final_logit_softcapping": 30.0,
        },
        fixed=_NO_MLP_BIAS,
        norms=4,
    ),
    "gemma3_text": Family("Gemma 3", _GEMMA_3, fixed=_NO_MLP_BIAS, norms=4, query_norms="head"),
    "phi3": Family(
        "Phi 3", fixed=_NO_BIAS, linears=("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    ),
    "apertus": Family(
        "Apertus",
        fixed=_NO_MLP_BIAS,
        query_norms="head",
        gated=False,
        linears=(*ATTENTION, "up_proj", "down_proj"),
        other=2,  # of xIELU
        liger=False,
    ),
    "olmo2": Family("OLMo 2", **_OLMO),
    "olmo3": Family("OLMo 3", {"sliding_window": 4096}, **_OLMO),
    "smollm3": Family(
        "SmolLM 3",
        {
            **{"tie_word_embeddings": True, "num_key_value_heads": 4},
            **{"use_sliding_window": False, "sliding_window": None},
        },
    ),
    "mixtral": Family(
        "Mixtral",
        {"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
        fixed=_NO_BIAS,
        linears=ATTENTION,
        experts=_EXPERTS,
    ),
    "qwen3_moe": Family(
        "Qwen 3 with experts",
        {
            **{"num_key_value_heads": 4, "use_sliding_window": False, "sliding_window": 4096},
            **{"num_local_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
        },
        fixed=_NO_MLP_BIAS,
        query_norms="head",
        linears=ATTENTION,
        experts=("num_local_experts", "num_experts_per_tok", "moe_intermediate_size"),
    ),
    "gpt_oss": Family(
        "gpt-oss",
        {
            **{"num_key_value_heads": 8, "head_dim": 64, "attention_bias": True},
            **{"num_local_experts": 128, "num_experts_per_tok": 4, "sliding_window": 128},
        },
        # its experts always have biases
        fixed={"mlp_bias": True},
        linears=ATTENTION,
        experts=_EXPERTS,
    ),
}


def read_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A configuration with its family's defaults filled in; for a multimodal model, its text part.

    Raises ``ValueError`` that names ``where`` for an unknown family or a missing dimension.
    """
    text = config.get("text_config")
    parts = {**config, **text} if isinstance(text, Mapping) else dict(config)
    kind = str(parts.get("model_type"))
    if isinstance(text, Mapping) and f"{kind}_text" in FAMILIES:
        kind = f"{kind}_text"
    if kind not in FAMILIES:
        says = f"model_type is {kind!r}" if "model_type" in parts else "no 'model_type'"
        raise ValueError(f"{where}: {says}; known here are {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    found = {**USUAL, **family.defaults, **parts, **family.fixed, "model_type": kind}
    if "num_experts" in parts and "num_local_experts" not in parts:
        found["num_local_experts"] = parts["num_experts"]
    for key in (*NEEDED, "vocab_size"):
        if not isinstance(found.get(key), int):
            raise ValueError(f"{where}: no '{key}', so the model's size is not known; add it")
    return found


def head_width(config: Any) -> int:
    """Width of a head; without ``head_dim``, the hidden size divided by the heads."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def refusal(config: Mapping[str, Any], recipe: Recipe, fp8: bool, attention: str) -> str | None:
    """Why the trainer cannot train a model (its ``read_config``) as the recipe says; None if it can.
    ``attention`` is what layers without fused blocks use."""
    targets = recipe.lora.target_modules if recipe.lora else []
    why = cannot_train(config, recipe.corpus.max_seq_length, attention, targets)
    if why is not None:
        return f"the trainer does not take it: {why}"
    wanted = recipe.model.attn_implementation
    size = recipe.corpus.max_seq_length
    why = cannot_fuse(config, recipe.model.dtype, wanted, size) if fp8 else None
    if why is not None:
        made_for = ", ".join(FAMILIES[kind].words for kind in FUSED)
        return (
            f"FP8 is made for models of {made_for} in bfloat16 and attn_implementation auto or "
            f"flash_attention_2, but {why}: set use_fp8 to false, and leave out --use_fp8"
        )
    return None


def cannot_train(
    config: Mapping[str, Any], size: int, attention: str, targets: Collection[str]
) -> str | None:
    """Why a model cannot be trained at all on rows of ``size`` tokens; None if it can."""
    family = FAMILIES[config["model_type"]]
    if "text_config" in config or "vision_config" in config:
        return (
            f"it reads more than text, and its other parts ({family.words}'s for images) would be "
            "changed without being trained; take a model of text alone"
        )
    if family.experts:
        return (
            f"it is a mixture of experts ({family.words}), and what keeps these in balance is not in the "
            "trainer's loss; take a model without experts"
        )
    if config.get("quantization_config"):
        return "its weights are quantized; take the model with bfloat16 weights"
    if config.get("final_logit_softcapping") is not None:
        return (
            f"{family.words} caps its logits (final_logit_softcapping), the trainer's loss does not"
        )
    window = _window(config)
    if window is not None and window < size and attention != "flash_attention_2":
        return (
            f"its sliding window of {window} tokens is shorter than rows of {size} "
            f"(corpus.max_seq_length), and attention {attention} has no windows; set model.attn_implementation "
            "to flash_attention_2, or shorten the rows"
        )
    missing = sorted(set(targets) - set(family.linears))
    if missing:
        return (
            f"{family.words} has no layers {', '.join(missing)} (lora.target_modules); its layers are "
            f"{', '.join(family.linears)}"
        )
    return None


def _window(config: Mapping[str, Any]) -> int | None:
    """The sliding window, if any layer has one."""
    layers = config.get("layer_types")
    if not config.get("use_sliding_window", True) or (layers and "sliding_attention" not in layers):
        return None
    window: int | None = config["sliding_window"]
    return window


def cannot_fuse(config: Mapping[str, Any], dtype: str, attention: str, size: int) -> str | None:
    """Why a model (its ``read_config``) does not get fused blocks; None if it does.

    ``attention`` is the recipe's, ``size`` the tokens of a row. ``layers.can_fuse`` also checks the host.
    """
    family = FAMILIES[config["model_type"]]
    if config["model_type"] not in FUSED:
        return f"this is {family.words} ({_features(config, family)})"
    if config.get("hidden_act", "silu") != "silu":
        return f"hidden_act is {config['hidden_act']}"
    for key in ("attention_bias", "mlp_bias"):
        if config[key] and (key == "mlp_bias" or family.output_bias):
            return f"the model has biases ({key})"
    for key in ("hidden_size", "intermediate_size"):
        if config[key] % 16:
            return f"{key} ({config[key]}) is no multiple of 16"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPES:
        return f"its positions are of rope type {kind}"
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        return "only part of its heads is turned by position (partial_rotary_factor)"
    if dtype != "bfloat16":
        return f"model.dtype is {dtype}"
    if attention not in ("auto", "flash_attention_2"):
        return f"model.attn_implementation is {attention}"
    window = _window(config)
    if window is not None and window < size:
        return f"its sliding window of {window} tokens is shorter than rows of {size}"
    return None


def _features(config: Mapping[str, Any], family: Family) -> str:
    """How its layers differ from Llama's."""
    found = ["norms on queries and keys"] if family.query_norms != "none" else []
    if config["attention_bias"]:
        found.append("biases")
    if family.norms > 2:
        found.append(f"{family.norms} norms per layer")
    if _window(config) is not None:
        found.append("a sliding window")
    if not family.gated:
        found.append("no gate")
    if family.linears[0] not in ATTENTION:
        found.append("layers of other names")
    return ", ".join(found) or f"model_type {config['model_type']}"
