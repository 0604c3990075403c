"""Digests of results: they change with the result's inputs, and with nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from fastcpt.recipe import Recipe, RecipeError, load_recipe
from fastcpt.recipe_sections import CONFIGS, Lora, Model, Training
from fastcpt.training.card import FACTS
from fastcpt.training.made_from import (
    answers_name,
    base_name,
    evaluation_name,
    publication_name,
    training_name,
)


def name(recipe: Recipe, training: Training | None = None, **other: Any) -> str:
    given = {"model": "m", "data": {"corpus": "c"}, "deepspeed": CONFIGS}
    return training_name(recipe, training or recipe.training, **{**given, **other})


def of(overrides: dict[str, Any], recipe: str = "cpt_lora_config") -> str:
    return name(load_recipe(recipe, overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        {"cluster.gpus": 8, "training.gradient_accumulation_steps": 4},
        {"training.per_device_train_batch_size": 1, "training.gradient_accumulation_steps": 32},
        {"cluster.gpus": 1, "training.per_device_train_batch_size": 16},
        {"training.save_steps": 7, "training.logging_steps": 3, "training.save_total_limit": 9},
        {"training.gradient_checkpointing": True},
        {"training.max_skipped_steps": 64},
        {"cluster.hosts": ["b"], "cluster.gpu": "H100", "cluster.root": "elsewhere"},
        {"gate.perplexity_threshold": 3.0, "budget.hours": 3.0, "budget.max_passes": 9.0},
        {"publish.destination": "leave_on_cluster", "description": "other words"},
        {"sft.max_new_tokens": 9, "stage2.max_steps": 31_000, "stage2.warmup_steps": 9},
        {"lora.target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "training.seed": 0},
    ],
)
def test_what_may_change_when_a_training_goes_on_is_not_in_its_name(
    overrides: dict[str, Any],
) -> None:
    # the recipe: four GPUs with a micro-batch of 4, eight times
    assert of(overrides) == of({})


@pytest.mark.parametrize(
    "overrides",
    [
        {"cluster.gpus": 8},
        {"training.per_device_train_batch_size": 2},
        {"training.gradient_accumulation_steps": 16},
        {"training.max_steps": 19_000},
        {"training.learning_rate": 2e-4},
        {"training.warmup_steps": 7},
        {"training.lr_scheduler_type": "linear"},
        {"training.weight_decay": 0.2},
        {"training.adam_beta1": 0.8},
        {"training.adam_beta2": 0.99},
        {"training.adam_epsilon": 1e-7},
        {"training.max_grad_norm": 2.0},
        {"training.seed": 1},
        {"training.use_fp8": False},
        {"training.optimizer_states": "int8"},
        {"training.time_budget_hours": 3.0},
        {"training.skip_sigmas": 5.0},
        {"training.deepspeed": "ds_config_zero3_offload.json"},
        {"corpus.max_seq_length": 2048},
        {"model.dtype": "float32"},
        {"model.attn_implementation": "sdpa"},
        {"lora.r": 32},
        {"lora.lora_alpha": 64},
        {"lora.lora_dropout": 0.0},
        {"lora.target_modules": ["q_proj"]},
        {"lora.areas": {"privacy": ["data protection"]}},
    ],
)
def test_what_the_weights_depend_on_is_in_a_trainings_name(overrides: dict[str, Any]) -> None:
    changed = load_recipe("cpt_lora_config", overrides)
    assert changed != load_recipe("cpt_lora_config")
    assert name(changed) != of({})


def test_full_training_and_each_input_have_names_of_their_own() -> None:
    recipe = load_recipe("cpt_lora_config")
    names = [
        name(recipe),
        name(recipe.model_copy(update={"lora": None})),
        name(recipe.model_copy(update={"lora": Lora()})),
        name(recipe, model="another"),
        name(recipe, data={"corpus": "another"}),
        name(recipe, data={"instructions": "c"}),
    ]
    # this recipe's adapters are the default ones
    assert names[2] == names[0]
    assert len(set(names)) == len(names) - 1


def test_every_setting_of_a_training_was_thought_of() -> None:
    """A field that is added has to be put into one of the two lists above."""
    changed = {
        key.removeprefix("training.")
        for test in (
            test_what_may_change_when_a_training_goes_on_is_not_in_its_name,
            test_what_the_weights_depend_on_is_in_a_trainings_name,
        )
        for mark in test.pytestmark  # type: ignore[attr-defined]
        for overrides in mark.args[1]
        for key in overrides
        if key.startswith("training.")
    }
    assert changed == set(Training.model_fields)


def test_the_deepspeed_file_counts_by_what_it_says(tmp_path: Path) -> None:
    recipe = load_recipe("cpt_config_fast")
    plain = tmp_path / recipe.training.deepspeed
    shutil.copyfile(CONFIGS / plain.name, plain)
    assert name(recipe, deepspeed=tmp_path) == name(recipe)
    content = json.loads(plain.read_text())
    plain.write_text(json.dumps(dict(reversed(content.items())), indent=7))
    assert name(recipe, deepspeed=tmp_path) == name(recipe)
    renamed = recipe.training.model_copy(update={"deepspeed": "mine.json"})
    shutil.copyfile(plain, tmp_path / "mine.json")
    assert name(recipe, renamed, deepspeed=tmp_path) == name(recipe)
    plain.write_text(json.dumps({**content, "gradient_clipping": 2.0}))
    assert name(recipe, deepspeed=tmp_path) != name(recipe)
    plain.unlink()
    with pytest.raises(RecipeError, match=r"training\.deepspeed: ds_config_zero3\.json cannot be"):
        name(recipe, deepspeed=tmp_path)


def test_a_field_that_is_added_with_a_default_orphans_no_model() -> None:
    """What the next version has, as it would be written: in the training, the model, the adapters."""

    class LaterTraining(Training):
        ema_decay: float = Field(0.0, ge=0.0)

    class LaterModel(Model):
        rope_scaling: dict[str, Any] | None = None

    class LaterLora(Lora):
        use_dora: bool = False

    class LaterRecipe(Recipe):
        training: LaterTraining = LaterTraining()
        model: LaterModel = LaterModel()
        lora: LaterLora | None = None

    recipe = load_recipe("cpt_lora_config")
    later = LaterRecipe.model_validate(recipe.model_dump())
    assert later.model_dump() != recipe.model_dump()
    assert name(later) == name(recipe)
    assert base_name(later, "t") == base_name(recipe, "t")
    facts: dict[str, Any] = {fact: {} for fact in FACTS}
    assert publication_name(later, facts, "m") == publication_name(recipe, facts, "m")
    used = later.training.model_copy(update={"ema_decay": 0.999})
    assert name(later, used) != name(recipe)


def test_the_defaults_that_names_rest_on() -> None:
    """A name leaves out what is at its default: another default needs another TRAINING_FORMAT."""
    assert Training().model_dump() == {
        "max_steps": 12_000,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 16,
        "learning_rate": 3e-5,
        "warmup_steps": 500,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.1,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": "auto",
        "logging_steps": 10,
        "save_steps": 500,
        "save_total_limit": 2,
        "seed": 0,
        "use_fp8": False,
        "optimizer_states": "float32",
        "time_budget_hours": None,
        "skip_sigmas": 6.0,
        "max_skipped_steps": 20,
        "deepspeed": "ds_config_zero3.json",
    }
    assert Model().model_dump() == {
        "name_or_path": "meta-llama/Llama-3.1-70B-Instruct",
        "config": None,
        "dtype": "bfloat16",
        "attn_implementation": "auto",
    }
    assert Lora().model_dump() == {
        "r": 64,
        "lora_alpha": 128,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "areas": {},
    }


def test_a_base_model_is_its_hub_name_or_what_it_is_initialised_from() -> None:
    assert base_name(load_recipe("cpt_config"), "t") == "meta-llama/Llama-3.1-70B-Instruct"
    sample = base_name(load_recipe("sample"), "t")
    assert sample.startswith("base-")
    assert base_name(load_recipe("sample", {"training.max_steps": 20}), "t") == sample
    shape = load_recipe("sample").model.config
    for changed in (
        base_name(load_recipe("sample"), "another tokenizer"),
        base_name(load_recipe("sample", {"training.seed": 1}), "t"),
        base_name(load_recipe("sample", {"model.dtype": "bfloat16"}), "t"),
        base_name(load_recipe("sample", {"model.config": {**shape, "hidden_size": 64}}), "t"),
    ):
        assert changed != sample


def test_an_evaluation_is_that_of_its_settings() -> None:
    recipe = load_recipe("sample")

    def perplexity(overrides: dict[str, Any], base: str = "b", corpus: str = "c") -> str:
        return evaluation_name(load_recipe("sample", overrides), base=base, corpus=corpus)

    same = perplexity({"gate.perplexity_threshold": 3.0, "training.max_steps": 20})
    assert same == evaluation_name(recipe, base="b", corpus="c")
    others = {
        perplexity({"gate.validation_set": "newest"}),
        perplexity({"corpus.max_seq_length": 256}),
        perplexity({"model.dtype": "bfloat16"}),
        perplexity({}, base="another"),
        perplexity({}, corpus="another"),
    }
    assert len(others | {same}) == 6

    answers = {
        answers_name(load_recipe("sample", {key: value}), base="b", instructions="i")
        for key, value in (
            ("sft.max_new_tokens", 65),
            ("corpus.max_seq_length", 256),
            ("model.dtype", "bfloat16"),
        )
    }
    same = answers_name(recipe, base="b", instructions="i")
    others = answers_name(recipe, base="another", instructions="i")
    assert len(answers | {same, others}) == 5


def test_a_publication_is_that_of_its_model_and_of_what_its_card_tells() -> None:
    recipe = load_recipe("sample")
    facts: dict[str, Any] = {fact: {} for fact in FACTS}
    totals = {"steps": 8, "tokens": 9, "loss": 2.0, "seconds": 60.0}
    facts["train_cpt/training"] = totals
    same = publication_name(recipe, facts, "m")
    # what a job took in a run is no part of the model
    again = {**facts, "train_cpt/training": {**totals, "job_seconds": 77.0}}
    elsewhere = load_recipe("sample", {"cluster.connection": "b", "documents.path": "/law"})
    assert publication_name(elsewhere, again, "m") == same
    others = {
        publication_name(recipe, facts, "another"),
        publication_name(recipe, {**facts, "train_cpt/training": {**totals, "steps": 9}}, "m"),
        publication_name(recipe, {**facts, "train_sft/training": totals}, "m"),
        publication_name(load_recipe("sample", {"model.dtype": "bfloat16"}), facts, "m"),
        publication_name(load_recipe("sample", {"description": "another"}), facts, "m"),
    }
    assert len(others | {same}) == 6
