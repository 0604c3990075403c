"""Families of models: counted as transformers does, refused by plan and trainer alike, and trained
with transformers' own loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from fastcpt.families import FAMILIES, NEEDED, read_config
from fastcpt.planning.models import KNOWN, MODELS
from fastcpt.planning.plan import plan
from fastcpt.recipe import Recipe, load_recipe
from fastcpt.shapes import shape_from_config
from fastcpt.training.data import Row, make_batch
from fastcpt.training.exits import TrainingError
from fastcpt.training.model import ModelError, Trainee, load_model
from fastcpt.training.preflight import check_model
from training.conftest import launch, train_arguments, write_recipe
from training.test_trainer import finish, metrics

CPU = torch.device("cpu")
TINY = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256},
    **{"max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# tiny, and each with something of its own
OWN: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 32},
    "gemma": {"head_dim": 32, "num_key_value_heads": 1},
    "gemma2": {"head_dim": 32},
    "gemma3_text": {"head_dim": 32, "num_key_value_heads": 1},
    "mixtral": EXPERTS,
    "qwen3_moe": {**EXPERTS, "moe_intermediate_size": 32},
    "gpt_oss": {**EXPERTS, "head_dim": 16},
}
TRAINED = [
    kind
    for kind, family in FAMILIES.items()
    if not family.experts and "final_logit_softcapping" not in family.defaults
]


def tiny(kind: str, **settings: Any) -> Any:
    return CONFIG_MAPPING[kind](**{**TINY, **OWN.get(kind, {}), **settings})


def counted(config: Any) -> int:
    """What transformers makes of a configuration; nothing is allocated."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", KNOWN)
def test_models_known_by_name_are_counted_as_transformers_does(name: str) -> None:
    content = yaml.safe_load(MODELS.read_text())[name]
    content = content.get("text_config", content)
    own = {key: value for key, value in content.items() if key != "model_type"}
    assert KNOWN[name].parameters == counted(CONFIG_MAPPING[content["model_type"]](**own))


ODD: dict[str, dict[str, Any]] = {
    "as it is": {},
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 48},
    "a head's own keys": {"num_key_value_heads": 4},
    "a window": {"sliding_window": 16, "use_sliding_window": True},
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("kind", FAMILIES)
def test_odd_settings_are_counted_as_transformers_does(kind: str, odd: str, tmp_path: Path) -> None:
    config = tiny(kind, **ODD[odd])
    config.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert shape_from_config(content, "config.json").parameters == counted(config)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_silent_configuration_means_what_transformers_takes(kind: str) -> None:
    content: dict[str, Any] = {key: TINY[key] for key in NEEDED}
    content["vocab_size"] = 256_000  # beyond every family's padding
    own = CONFIG_MAPPING[kind](**content)
    found = shape_from_config({"model_type": kind, **content}, "config.json")
    assert found.parameters == counted(own)
    assert found.tie_word_embeddings == own.tie_word_embeddings
    full = read_config({"model_type": kind, **content}, "config.json")
    for key in ("sliding_window", "final_logit_softcapping", "num_experts_per_tok"):
        if key in full and full.get("use_sliding_window", True):
            assert full[key] == getattr(own, key, None), key


def test_the_text_of_a_model_of_images_is_read_with_its_familys_defaults() -> None:
    content = {"model_type": "gemma3", "text_config": {"hidden_size": 2560}, "vision_config": {}}
    own = CONFIG_MAPPING["gemma3_text"](hidden_size=2560)
    found = shape_from_config(content, "config.json")
    assert found.parameters == counted(own)
    assert (found.keys, found.tie_word_embeddings) == (4 * 256, True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random model of each family, and Llamas with something odd, as folders."""
    configs = {kind: tiny(kind) for kind in FAMILIES}
    configs["windows"] = tiny("mistral", sliding_window=16)
    configs["biases"] = tiny("llama", attention_bias=True)
    configs["gelu"] = tiny("llama", hidden_act="gelu")
    configs["odd sides"] = tiny("llama", intermediate_size=90)
    yarn = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 2.0}
    configs["yarn"] = tiny(
        "llama", rope_parameters={**yarn, "original_max_position_embeddings": 64}
    )
    configs["images"] = CONFIG_MAPPING["gemma3"](
        text_config={**TINY, **OWN["gemma3_text"]},
        vision_config={
            **{"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1},
            **{"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        },
    )
    folders = {}
    torch.manual_seed(0)
    for name, config in configs.items():
        folders[name] = tmp_path_factory.mktemp(name.replace(" ", "_"))
        AutoModelForCausalLM.from_config(config).save_pretrained(folders[name])
    return folders


RECIPES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "FP8": {"training": {"use_fp8": True}},
    "LoRA": {"lora": {"target_modules": ["q_proj", "v_proj"]}},
    "FP8, LoRA": {"training": {"use_fp8": True}, "lora": {"target_modules": ["q_proj", "o_proj"]}},
    "FP8, LoRA on all": {
        "training": {"use_fp8": True},
        "lora": {"target_modules": ["q_proj", "down_proj"]},
    },
    "FP8, sdpa": {"training": {"use_fp8": True}, "model": {"attn_implementation": "sdpa"}},
    "FP8 of float32": {"training": {"use_fp8": True}, "model": {"dtype": "float32"}},
}
NAMES = [*FAMILIES, "windows", "biases", "gelu", "odd sides", "yarn", "images"]


def recipe_for(folder: Path, tmp_path: Path, sections: dict[str, Any]) -> Recipe:
    model = {"name_or_path": str(folder), "config": None, "dtype": "bfloat16"}
    rest = {key: value for key, value in sections.items() if key != "model"}
    file = write_recipe(tmp_path, model={**model, **sections.get("model", {})}, **rest)
    return load_recipe(str(file))


@pytest.mark.parametrize("how", RECIPES)
@pytest.mark.parametrize("name", NAMES)
def test_the_plan_refuses_what_the_trainer_refuses_in_the_same_words(
    saved: dict[str, Path], tmp_path: Path, name: str, how: str
) -> None:
    recipe = recipe_for(saved[name], tmp_path, RECIPES[how])
    planned = plan(recipe).problems  # on this host's CPUs, as the trainer here
    gpus = plan(recipe, cluster="2xH100").problems
    words = trainers_refusal(recipe, saved[name])
    if words is None:
        assert planned == gpus == ()
    elif words.startswith("FP8 needs a Hopper or newer GPU"):  # all that is in the model's way
        assert planned == ("precision: a CPU has no FP8; the figures are those of bfloat16",)
        assert gpus == ()
    else:
        assert any(words in problem or "has no FP8" in problem for problem in planned)
        # windows are flash-attn's, which GPU hosts have
        assert any(words in problem for problem in gpus) or "window" in words


def trainers_refusal(recipe: Recipe, model: Path) -> str | None:
    """What the trainer says before it begins."""
    try:
        check_model(recipe, str(model), recipe.training.use_fp8)
    except (TrainingError, ModelError) as refused:
        return str(refused).removeprefix(f"--model {model}: ")
    return None


@pytest.mark.parametrize("kind", TRAINED)
def test_the_loss_is_transformers_own(saved: dict[str, Path], kind: str) -> None:
    causal, attention = load_model(saved[kind], dtype="float32")
    document = np.random.default_rng(0).integers(3, 256, 40).astype(np.int32)
    batch = make_batch([Row(document, np.array([40], np.int32), None)], 40)
    loss = Trainee(causal.train(), attention, None)(batch, CPU)
    ids = torch.tensor(document)[None].long()
    plain = AutoModelForCausalLM.from_pretrained(saved[kind], attn_implementation=attention)
    own = plain(input_ids=ids, labels=ids).loss * 39
    torch.testing.assert_close(loss, own, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["qwen2", "apertus"])
def test_a_family_that_is_taken_trains_on_two_ranks(
    saved: dict[str, Path], corpus: Path, tmp_path: Path, kind: str
) -> None:
    recipe = write_recipe(tmp_path, training={"max_steps": 4, "warmup_steps": 1})
    arguments = train_arguments(recipe, corpus, tmp_path / "out", "--model", saved[kind])
    code, output = finish(launch("train_cpt.py", *arguments))
    assert code == 0, output
    losses = [line["loss"] for line in metrics(tmp_path / "out")]
    assert losses[-1] < losses[0] < np.log(256) + 1


def test_a_refused_model_ends_before_anything_is_read(
    saved: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    arguments = train_arguments(write_recipe(tmp_path), corpus, tmp_path / "out", "--use_fp8")
    code, output = finish(launch("train_cpt.py", *arguments, "--model", saved["apertus"], ranks=1))
    assert code == 78, output
    assert (
        "but this is Apertus (norms on queries and keys, no gate): set use_fp8 to false" in output
    )
    assert not (tmp_path / "out" / "rows").exists()
