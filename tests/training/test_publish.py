"""Published folders: their files, how adapters are merged, and the card."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastcpt import __version__
from fastcpt.files import read_json, write_json
from fastcpt.recipe import Recipe, load_recipe
from fastcpt.training import publish as publishing
from fastcpt.training.card import licence_of
from fastcpt.training.model import ModelError
from fastcpt.training.publish import PublishError, model_card, publish
from fastcpt.training.sft import PLAIN_TEMPLATE
from training.conftest import environment, start, write_recipe

FIGURES = {
    "base": {"perplexity": 40.126, "bits_per_byte": 1.23456, "tokens": 12345},
    "model": {"perplexity": 12.5, "bits_per_byte": 0.9, "tokens": 12345},
}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return load_recipe(write_recipe(tmp_path / "recipe"))


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """A run that passed the gate and was fine-tuned."""
    folder = tmp_path / "record"
    totals = {"steps": 60, "tokens": 244522, "loss": 3.5621, "seconds": 5400.0}
    write_json(folder / "train_cpt" / "training.json", totals)
    write_json(folder / "train_sft" / "training.json", {**totals, "steps": 30})
    write_json(folder / "evaluation.json", {"random": FIGURES, "validation_set": "random"})
    gate = {"passed": True, "value": 12.5, "base_value": 40.13, "threshold": 18.0}
    gate["validation_set"] = "random"
    write_json(folder / "gate.json", gate)
    nothing: dict[str, Any] = {"value": None, "low": None, "high": None, "counted": 0}
    write_json(
        folder / "evaluation_sft.json",
        {
            "rouge_l": {"value": 0.41234, "low": 0.38, "high": 0.44},
            "citation_accuracy": {
                **{"value": 0.75, "low": 0.6, "high": 0.9, "counted": 40},
                "beyond_prompt": nothing,
            },
            "examples": 16,
        },
    )
    return folder


@pytest.fixture
def tuned(model: Path, tmp_path: Path) -> Path:
    """The base model as a fine-tuning leaves it: with a chat template, without a cache."""
    folder = tmp_path / "tuned"
    causal = AutoModelForCausalLM.from_pretrained(model)
    causal.config.use_cache = False
    causal.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = PLAIN_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(model: Path, tmp_path: Path) -> Path:
    """A LoRA training's final folder: adapter, tokenizer and the place of its base."""
    torch.manual_seed(1)
    causal = AutoModelForCausalLM.from_pretrained(model)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"])
    adapted = get_peft_model(causal, lora)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:  # zero until they are trained
            torch.nn.init.normal_(weight, std=0.05)
    folder = tmp_path / "adapter"
    adapted.save_pretrained(str(folder))
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    write_json(folder / "base.json", {"base": str(model)})
    return folder


def logits_of(folder: Path) -> torch.Tensor:
    causal = AutoModelForCausalLM.from_pretrained(folder)
    return causal(input_ids=torch.tensor([[5, 9, 30, 7, 40]])).logits


def test_a_published_model_answers_as_the_trained_one(
    recipe: Recipe, tuned: Path, record: Path, tmp_path: Path
) -> None:
    output = tmp_path / "published"
    publish(recipe, tuned, record, output)
    torch.testing.assert_close(logits_of(output), logits_of(tuned))
    published = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert published.config.use_cache
    assert published.generation_config.eos_token_id == [tokenizer.eos_token_id]
    assert tokenizer.chat_template == PLAIN_TEMPLATE
    assert list(output.glob("*.bin")) == []
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]


def code_of(card: str) -> str:
    """The card's own lines of Python."""
    found = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert found
    return found[1]


@pytest.mark.parametrize("is_tuned", [True, False])
def test_the_cards_own_code_runs_without_a_warning(
    recipe: Recipe, tuned: Path, record: Path, tmp_path: Path, is_tuned: bool
) -> None:
    output = tmp_path / "published"
    if not is_tuned:
        (record / "train_sft" / "training.json").unlink()
    publish(recipe, tuned, record, output)
    code = code_of((output / "README.md").read_text()).replace("path/to/this/folder", str(output))
    command = [sys.executable, "-W", "always", "-c", code]
    settings = {**environment(), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    ran = subprocess.run(command, env=settings, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()
    assert ran.stderr == ""


def test_adapters_are_merged_and_rounded_once(
    tmp_path: Path, adapter: Path, model: Path, record: Path
) -> None:
    recipe = load_recipe(write_recipe(tmp_path / "recipe", model={"dtype": "bfloat16"}))
    result = publish(recipe, adapter, record, tmp_path / "published")
    assert result["merged"]
    merged = load_file(tmp_path / "published" / "model.safetensors")
    base = load_file(model / "model.safetensors")
    lora = load_file(adapter / "adapter_model.safetensors")
    assert merged.keys() == base.keys()
    for name, weight in base.items():
        plain = weight.to(torch.bfloat16)
        place = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{place}.lora_A.weight" in lora:
            product = lora[f"{place}.lora_B.weight"] @ lora[f"{place}.lora_A.weight"]
            expected = (plain.float() + 8 / 4 * product).to(torch.bfloat16)
            assert not torch.equal(expected, plain)
            plain = expected
        assert torch.equal(merged[name], plain), name


def test_published_again_from_the_same_inputs_nothing_is_written(
    recipe: Recipe, tuned: Path, record: Path, tmp_path: Path
) -> None:
    output = tmp_path / "published"
    publish(recipe, tuned, record, output)
    before = (output / "model.safetensors").stat().st_mtime_ns
    publish(recipe, tuned, record, output)
    assert (output / "model.safetensors").stat().st_mtime_ns == before


def test_a_publication_says_by_which_version_it_was_made_and_another_one_publishes_nothing_again(
    recipe: Recipe, tuned: Path, record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "published"
    first = publish(recipe, tuned, record, output)
    assert first["version"] == read_json(output / "publication.json")["version"] == __version__
    assert f"the Fast CPT {__version__} recipe `" in (output / "README.md").read_text()
    monkeypatch.setattr(publishing, "__version__", "99.0.0")
    assert publish(recipe, tuned, record, output) == first


def test_another_record_makes_another_card(
    recipe: Recipe, tuned: Path, record: Path, tmp_path: Path
) -> None:
    output = tmp_path / "published"
    publish(recipe, tuned, record, output)
    write_json(record / "gate.json", {**read_json(record / "gate.json"), "value": 11.25})
    publish(recipe, tuned, record, output)
    assert "11.25, base model 40.13; below the gate's 18" in (output / "README.md").read_text()


def test_a_publishing_that_dies_leaves_no_folder_and_is_done_by_the_next(
    recipe: Recipe, tuned: Path, record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: Any, **__: Any) -> str:
        raise OSError("no space left on device")

    output = tmp_path / "published"
    with monkeypatch.context() as patched:
        patched.setattr(publishing, "model_card", dies)
        with pytest.raises(OSError, match="no space"):
            publish(recipe, tuned, record, output)
    assert not output.exists()
    publish(recipe, tuned, record, output)
    assert (output / "README.md").is_file()
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]


def test_weights_that_are_not_finite_are_not_published(
    recipe: Recipe, tuned: Path, record: Path, tmp_path: Path
) -> None:
    causal = AutoModelForCausalLM.from_pretrained(tuned)
    causal.model.norm.weight.data[0] = float("nan")
    causal.save_pretrained(tuned)
    with pytest.raises(PublishError, match=r"model\.norm\.weight"):
        publish(recipe, tuned, record, tmp_path / "published")
    assert not (tmp_path / "published").exists()


def test_a_folder_without_a_model_is_refused(recipe: Recipe, record: Path, tmp_path: Path) -> None:
    with pytest.raises(PublishError, match="no such folder"):
        publish(recipe, tmp_path / "missing", record, tmp_path / "published")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"config\.json"):
        publish(recipe, tmp_path / "empty", record, tmp_path / "published")


def test_an_adapter_whose_base_is_gone_is_refused(
    recipe: Recipe, adapter: Path, record: Path, tmp_path: Path
) -> None:
    write_json(adapter / "base.json", {"base": str(tmp_path / "gone")})
    with pytest.raises(ModelError, match="gone"):
        publish(recipe, adapter, record, tmp_path / "published")


def test_the_card_tells_the_runs_figures_and_no_place(
    recipe: Recipe, tuned: Path, record: Path, tmp_path: Path
) -> None:
    publish(recipe, tuned, record, tmp_path / "published")
    card = (tmp_path / "published" / "README.md").read_text()
    assert "| random | base model | 40.13 | 1.2346 | 12,345 |" in card
    assert "| random | after continued pre-training | 12.50 | 0.9000 | 12,345 |" in card
    assert (
        "At the gate: 12.50, base model 40.13; below the gate's 18 (random validation set)." in card
    )
    assert "| continued pre-training | 60 | 244,522 | 0.01 | 3.562 | 1.50 h |" in card
    assert "| ROUGE-L (F) | 0.412 (0.380 to 0.440) | 16 answers |" in card
    assert "| citation accuracy | 0.750 (0.600 to 0.900) | 40 citations |" in card
    assert "none counted | 0 citations" in card
    assert "All weights were trained" in card
    assert str(tmp_path) not in card
    front = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert front
    assert "base_model" not in front[1]


def card_of(recipe: Recipe, record: Path) -> str:
    names = ["gguf", "corpus_manifest", "evaluation", "evaluation_stage2", "gate", "gate_stage2"]
    names += ["evaluation_sft", "train_cpt/training", "train_cpt_stage2/training"]
    names += ["train_sft/training", "decision"]
    facts = {
        name: json.loads(file.read_text()) if (file := record / f"{name}.json").is_file() else {}
        for name in names
    }
    return model_card(recipe, facts, parameters=8_030_261_248)


def test_the_card_has_every_condition_of_the_decision(recipe: Recipe, record: Path) -> None:
    saved = {"what": "bits saved", "value": 0.0123, "low": 0.01, "high": 0.015, "bound": 0.002}
    lost = {"what": "bits lost", "value": None, "low": None, "high": None, "bound": 0.02}
    conditions = [{**saved, "met": True}, {**lost, "met": False, "why": "no general set"}]
    decision = {"recommended": False, "against": "law-1", "conditions": conditions}
    write_json(record / "decision.json", decision)
    card = card_of(recipe, record)
    assert "Compared with `law-1`, this model does not meet all conditions." in card
    assert "| bits saved | 0.002 | 0.0123 | 0.01 to 0.015 | yes |" in card
    assert "| bits lost | 0.02 | not measured |  | no |" in card


def test_the_card_of_a_hub_model_names_it_and_how_it_was_adapted(
    tmp_path: Path, record: Path
) -> None:
    model = {"name_or_path": "meta-llama/Llama-3.1-8B", "config": None}
    recipe = load_recipe(write_recipe(tmp_path / "r", model=model, lora={"r": 64}))
    card = card_of(recipe, record)
    hub = ModelCard(card).data
    assert (hub.base_model, hub.base_model_relation) == ("meta-llama/Llama-3.1-8B", "finetune")
    assert (hub.library_name, hub.pipeline_tag) == ("transformers", "text-generation")
    assert hub.license == "llama3.1"
    title = "# Llama-3.1-8B continued on legal texts, then fine-tuned on instructions"
    assert title in card.splitlines()
    assert "8,030,261,248 parameters, trained from `meta-llama/Llama-3.1-8B`" in card
    assert "Low-rank adapters (r 64, alpha 128, on q_proj, k_proj, v_proj, o_proj)" in card


def test_the_cards_front_matter_is_yaml_whatever_the_base_model_is_called(
    tmp_path: Path, record: Path
) -> None:
    plain = load_recipe(write_recipe(tmp_path / "r", model={"name_or_path": "a/b", "config": None}))
    for name in ("a/b\nlicense: mit", "a: b", "yes", "1e5", "a/b/c", "{a}", "a/b#c"):
        # as a recipe of an older version has it: this one's would be refused
        model = plain.model.model_copy(update={"name_or_path": name})
        card = card_of(plain.model_copy(update={"model": model}), record)
        front = yaml.safe_load(card.split("---\n")[1])
        is_name = name in ("yes", "1e5")
        told = {"base_model": name, "base_model_relation": "finetune"} if is_name else {}
        assert front == {
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "tags": ["legal", "continued-pretraining"],
            **told,
        }


def test_the_card_names_no_folder_of_the_base_model(tmp_path: Path, record: Path) -> None:
    model = {"name_or_path": "/secret/place/llama", "config": None}
    card = card_of(load_recipe(write_recipe(tmp_path / "r", model=model)), record)
    assert "secret" not in card


def test_the_card_names_the_gguf_file_and_its_licence(recipe: Recipe, record: Path) -> None:
    facts = {
        "file": "SmolLM2-135M-Instruct.Q4_1.gguf",
        "sha256": "b179c952",
        "name": "Smollm2 135M",
        "organization": "HuggingFaceTB",
        "license": "apache-2.0",
    }
    write_json(record / "gguf.json", facts)
    model = recipe.model.model_copy(update={"name_or_path": "/base/folder", "config": None})
    card = card_of(recipe.model_copy(update={"model": model}), record)
    assert (
        "trained from `SmolLM2-135M-Instruct.Q4_1.gguf` by HuggingFaceTB (GGUF, SHA-256 `b179c952`, "
        "licence apache-2.0) on legal texts"
    ) in card
    assert "license: apache-2.0\n" in card


def test_the_card_says_nothing_of_what_was_not_measured(recipe: Recipe, tmp_path: Path) -> None:
    card = card_of(recipe, tmp_path)
    for word in ("Perplexity on", "Training data", "Answers to", "fine-tun", "gate"):
        assert word not in card


def test_the_title_says_what_the_model_is(recipe: Recipe, tmp_path: Path) -> None:
    assert "\n# A model of 8.0 B parameters trained on legal texts\n" in card_of(recipe, tmp_path)
    folder = recipe.model.model_copy(update={"name_or_path": "/base/folder", "config": None})
    of_folder = recipe.model_copy(update={"model": folder})
    title = "\n# A model of 8.0 B parameters continued on legal texts\n"
    assert title in card_of(of_folder, tmp_path)
    write_json(tmp_path / "gguf.json", {"file": "a.gguf", "sha256": "b1", "name": "Smollm2 135M"})
    assert "\n# Smollm2 135M continued on legal texts\n" in card_of(of_folder, tmp_path)


@pytest.mark.parametrize(
    ("base", "licence"),
    [
        ("meta-llama/Llama-3.1-70B-Instruct", "llama3.1"),
        ("Qwen/Qwen2.5-7B", "apache-2.0"),
        ("Qwen/Qwen2.5-3B", None),  # Qwen's research licence, which has no name on the hub
        ("google/gemma-3-4b-it", "gemma"),
        ("someone/Llama-3.1-8B-tuned", None),
    ],
)
def test_a_licence_is_told_where_it_is_known(base: str, licence: str | None) -> None:
    assert licence_of(base) == licence


def test_after_stage_2_the_card_has_its_perplexity(recipe: Recipe, record: Path) -> None:
    better = {**FIGURES, "model": {**FIGURES["model"], "perplexity": 9.87}}
    write_json(record / "evaluation_stage2.json", {"random": better})
    card = card_of(recipe, record)
    assert "| 9.87 |" in card
    assert "| 12.50 |" not in card


@pytest.mark.slow
def test_the_command_ends_with_78_for_a_wrong_folder(tmp_path: Path, record: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe")
    script = start(
        "publish_model.py",
        *("--config", recipe, "--model", tmp_path / "missing"),
        *("--record", record, "--output_dir", tmp_path / "published"),
    )
    output, _ = script.communicate()
    assert script.returncode == 78
    assert "--model" in output
    assert "Traceback" not in output
