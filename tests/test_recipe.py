"""A recipe is read completely, or refused with every problem named by file, line and key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fastcpt.recipe import RecipeError, load_recipe, recipe_names
from fastcpt.recipe_form import (
    FORM,
    form_overrides,
    form_schema,
    given_overrides,
    own_values,
    problems_by_field,
    typed_values,
)
from fastcpt.recipe_sections import CONFIGS

# The published guide's figures: steps, tokens of a sequence, micro-batch, accumulation, rate, GPUs.
PUBLISHED = {
    "cpt_config": (40_000, 4096, 2, 16, 3e-5, 4),
    "cpt_config_reduced_steps": (10_000, 4096, 2, 16, 3e-5, 4),
    "cpt_config_filtered": (12_000, 4096, 2, 16, 3e-5, 4),
    "cpt_config_16gpu": (10_000, 4096, 2, 16, 3e-5, 16),
    "cpt_lora_config": (20_000, 4096, 4, 8, 1e-4, 4),
    "cpt_config_short": (40_000, 2048, 4, 8, 3e-5, 4),
    "cpt_config_fast": (12_000, 3072, 2, 16, 3e-5, 4),
    "cpt_stage1_fast": (10_000, 3072, 2, 16, 3e-5, 4),
    "cpt_stage2_deep": (30_000, 3072, 2, 16, 1e-5, 4),
}


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_recipes_hold_the_published_figures(name: str) -> None:
    recipe = load_recipe(name)
    training = recipe.training
    assert (
        training.max_steps,
        recipe.corpus.max_seq_length,
        training.per_device_train_batch_size,
        training.gradient_accumulation_steps,
        training.learning_rate,
        recipe.cluster.gpus,
    ) == PUBLISHED[name]
    assert recipe.claim is not None


def test_sixteen_gpus_make_a_global_batch_of_512() -> None:
    assert load_recipe("cpt_config_16gpu").global_batch_size == 512


def test_the_second_stage_is_the_same_by_itself_and_after_the_first() -> None:
    assert load_recipe("cpt_stage1_fast").stage2 == load_recipe("cpt_stage2_deep").training


def test_lora_is_the_published_one() -> None:
    lora = load_recipe("cpt_lora_config").lora
    assert lora is not None
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (64, 128, 0.1)
    assert lora.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_written_out_reads_back_unchanged(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "traning:\n  max_steps: 3\n",
            "mine.yaml:1: unknown key 'traning'; did you mean 'training'?",
        ),
        (
            "training:\n  learning_rat: 3e-5\n",
            "mine.yaml:2: unknown key 'training.learning_rat'; did you mean 'learning_rate'?",
        ),
        (
            "lora:\n  alpha: 3\n",
            "mine.yaml:2: unknown key 'lora.alpha'; did you mean 'lora_alpha'?",
        ),
        (
            "\n\ntraining:\n  max_steps: -2\n",
            "mine.yaml:4: training.max_steps: Input should be greater than or equal to 1, not -2",
        ),
        (
            "training: {max_steps: many}\n",
            "mine.yaml:1: training.max_steps: Input should be a valid integer, not 'many'",
        ),
        (
            "model: {name_or_path: x, config: {hidden_size: 1}}\n",
            "mine.yaml:1: model: give exactly one of name_or_path and config",
        ),
        (
            "training: {deepspeed: mine.json}\n",
            "mine.yaml:1: training.deepspeed: no such file in include/configs, which has ds_",
        ),
        ("- a\n", "mine.yaml: a recipe is a mapping of sections, this file is not"),
        ("a: [\n", "mine.yaml:2: not valid YAML"),
    ],
)
def test_a_wrong_recipe_is_refused_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as refused:
        load_recipe(write(tmp_path, text))
    assert str(refused.value).splitlines()[0].startswith(message)


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "training: {max_steps: 0}\ngate: {perplexity_threshold: 0.5}\nx: 1\n")
    with pytest.raises(RecipeError) as refused:
        load_recipe(path)
    assert len(str(refused.value).splitlines()) == 3


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'cpt_config_fast'"):
        load_recipe("cpt_config_fats")


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"name: \xff\xfe")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(path)


def test_the_form_overrides_the_recipe() -> None:
    recipe = load_recipe(
        "cpt_config_fast",
        form_overrides(
            {"documents": "/law", "max_steps": 50, "quality_threshold": 70, "gpus": None}
        ),
    )
    assert recipe.documents.path == "/law"
    assert recipe.selection.quality_threshold == 70
    assert recipe.cluster.gpus == 4
    assert (recipe.training.max_steps, recipe.training.warmup_steps) == (50, 5)


def test_fewer_steps_in_the_form_leave_the_later_stages_warm_up() -> None:
    # 50 steps: a tenth of them; stage 2 warms up over the 500 of its 30,000 steps that the recipe means
    fewer = load_recipe("cpt_stage1_fast", form_overrides({"max_steps": 50}))
    assert (fewer.training.max_steps, fewer.training.warmup_steps) == (50, 5)
    assert fewer.stage2 == load_recipe("cpt_stage1_fast").stage2
    assert (fewer.stage2.max_steps, fewer.stage2.warmup_steps) == (30_000, 500)
    assert fewer.sft.training == load_recipe("cpt_stage1_fast").sft.training


@pytest.mark.parametrize("name", ["a/b\ntags: x", "", "  ", "a\tb", " a/b", "a/b\r", "a\u2028b"])
def test_a_base_model_that_is_plainly_no_name_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=r"model\.name_or_path: not a hub name or folder"):
        load_recipe("cpt_config_fast", {"model.name_or_path": name})


def test_a_wrong_override_is_named_as_one() -> None:
    with pytest.raises(RecipeError, match=r"^override: gate.perplexity_threshold: .*, not 0.5$"):
        load_recipe("cpt_config_fast", {"gate.perplexity_threshold": 0.5})


def test_a_tokenizer_in_the_form_takes_the_place_of_training_one() -> None:
    recipe = load_recipe("sample", form_overrides({"tokenizer": "/t"}))
    assert (recipe.tokenizer.path, recipe.tokenizer.train_vocab_size) == ("/t", None)


@pytest.mark.parametrize("name", FORM)
def test_every_field_of_the_form_says_what_it_is_and_can_be_left_to_the_recipe(name: str) -> None:
    schema = form_schema(name)
    assert schema["description"].endswith(".")
    assert schema["type"][1] == "null"


def test_a_base_model_in_the_form_takes_the_place_of_one_made_at_random() -> None:
    recipe = load_recipe("sample", form_overrides({"base_model": "org/model"}))
    assert (recipe.model.name_or_path, recipe.model.config) == ("org/model", None)


def test_a_switch_of_the_form_is_on_off_or_the_recipes() -> None:
    assert form_schema("use_fp8")["enum"] == [None, "on", "off"]
    for typed, value in (("on", True), ("off", False), (None, True)):
        recipe = load_recipe("cpt_config_fast", form_overrides({"use_fp8": typed}))
        assert recipe.training.use_fp8 is value


def test_what_is_typed_is_told_at_its_field() -> None:
    values, wrong = typed_values({"max_steps": "12.5", "learning_rate": "2e-5", "gpus": " "})
    assert values == {"learning_rate": 2e-5}
    assert wrong == {"max_steps": "a whole number is needed"}
    with pytest.raises(RecipeError) as error:
        load_recipe("sample", form_overrides({"gpus": 0, "learning_rate": 3.0}))
    by_field, others = problems_by_field(str(error.value))
    assert by_field["gpus"].startswith("Input should be greater than or equal to 1, not 0")
    assert by_field["learning_rate"].startswith("Input should be less than or equal to 1")
    assert others == []


def test_an_empty_field_shows_the_recipes_own_value() -> None:
    own = own_values(load_recipe("cpt_config_fast"))
    assert own["max_steps"] == "12000"
    assert own["use_fp8"] == "on"
    assert own["budget_money"] == "180.0"
    assert own["documents"] == ""


def test_the_forms_limits_are_the_recipes() -> None:
    assert form_schema("gpus")["minimum"] == 1
    assert form_schema("gpus")["description"].endswith("At least 1, at most 4,096.")
    assert form_schema("perplexity_threshold")["exclusiveMinimum"] == 1.0


def test_the_recipes_are_plain_yaml() -> None:
    for path in CONFIGS.glob("*.yaml"):
        assert isinstance(yaml.safe_load(path.read_text()), dict)  # by another reader than ours


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hours", ".inf"),
        ("hours", ".nan"),
        ("money", ".inf"),
        ("money", "-1"),
        ("max_passes", "0"),
        ("max_passes", ".inf"),
        ("max_passes", "-4"),
    ],
)
def test_a_budget_is_a_number_above_0(tmp_path, key, value):
    path = tmp_path / "mine.yaml"
    path.write_text(f"description: x\nbudget:\n  {key}: {value}\n")
    with pytest.raises(RecipeError, match=rf"mine.yaml:3: budget\.{key}: "):
        load_recipe(path)


def test_a_corpus_is_seen_four_times_at_most_unless_the_recipe_says_otherwise():
    assert load_recipe("cpt_config_fast").budget.max_passes == 4
    assert load_recipe("cpt_config").budget.max_passes == 5


def test_areas_that_are_one_folder_on_a_mac_are_refused(tmp_path: Path) -> None:
    areas = {"lora.areas": {"Tax law": ["Taxation"], "tax Law": ["Customs"]}}
    with pytest.raises(RecipeError, match="'Tax law' and 'tax Law' are one folder on a Mac"):
        load_recipe("cpt_lora_config", areas)


RENT = {"acquire": ["rent"], "release": ["rent"], "status": ["rent"]}


@pytest.mark.parametrize("key", ["cluster", "cluster.rent", "cluster.rent.acquire"])
def test_a_form_brings_no_commands(key: str) -> None:
    with pytest.raises(RecipeError, match=f"override: {key}: commands of this machine"):
        given_overrides({"overrides": {"budget.money": 4.0, key: ["touch", "pwned"]}})
    harmless = {"cluster.gpus": 2, "cluster.root": "there"}
    assert given_overrides({"overrides": harmless}) == harmless
    assert given_overrides({}) == {}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"cluster.hosts": ["second"]}, "rent is for one machine"),
        ({"cluster.launcher": "slurm"}, "rent is for one machine"),
        (
            {"publish.destination": "leave_on_cluster"},
            "would lose the model with the rented machine",
        ),
        ({"cluster.rent": {**RENT, "acquire": "rent --gpus 4"}}, r"cluster\.rent\.acquire"),
        ({"cluster.rent": {**RENT, "status": []}}, r"cluster\.rent\.status"),
    ],
)
def test_what_cannot_be_rented_is_said_before_anything_is(more: dict[str, Any], says: str) -> None:
    assert load_recipe("sample", {"cluster.rent": RENT}).cluster.rent is not None
    with pytest.raises(RecipeError, match=says):
        load_recipe("sample", {"cluster.rent": RENT, **more})
