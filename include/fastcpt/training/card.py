"""The model card: how a model came to be and what it was measured to do. No torch.

It has only facts of the run's record, and no paths or hosts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fastcpt.files import read_json
from fastcpt.gate import words
from fastcpt.recipe import Recipe
from fastcpt.yaml_files import read_yaml

HUB_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?"
TRAININGS = {
    "train_cpt": "continued pre-training",
    "train_cpt_stage2": "continued pre-training, stage 2",
    "train_sft": "fine-tuning",
}
LIMITS = (
    "The figures above are all that was measured. Nothing here says how the model does on other "
    "tasks, languages or legal systems, or what it forgot of its base model's skills. It may "
    "state law that does not exist and cite acts that say something else: check what it writes "
    "against the official text. The base model's licence still applies."
)
# Without these arguments transformers 5.17 warns of its own defaults: a length that is set twice, and a
# clean-up that byte-level tokenizers refuse.
USE = """```python
from transformers import GenerationConfig, pipeline

model = pipeline("text-generation", model="path/to/this/folder", clean_up_tokenization_spaces=False)
prompt = {prompt}
length = GenerationConfig(max_new_tokens=200)
print(model(prompt, generation_config=length)[0]["generated_text"])
```"""
CHAT_PROMPT = '[{"role": "user", "content": "What does the act regulate?"}]'
# The files of a run's record that the card is made from, without ``.json``.
FACTS = (
    *("gguf", "corpus_manifest", "evaluation", "evaluation_stage2", "gate", "gate_stage2"),
    *("evaluation_sft", "decision", *(f"{training}/training" for training in TRAININGS)),
)


def read_facts(record: Path) -> dict[str, dict[str, Any]]:
    """The content of each of ``FACTS``; empty if the run does not have the file."""
    files = {name: record / f"{name}.json" for name in FACTS}
    return {name: dict(read_json(file)) if file.is_file() else {} for name, file in files.items()}


def hub_name(recipe: Recipe) -> str | None:
    """The base model's hub name; None for random weights or a folder."""
    name = recipe.model.name_or_path
    return name if name and re.fullmatch(HUB_NAME, name) else None


def licence_of(hub_name: str) -> str | None:
    """The hub's word for a base model's licence (``licences.yaml``); None if it is not known."""
    known: dict[str, str] = read_yaml(Path(__file__).with_name("licences.yaml"))
    return next((word for name, word in known.items() if hub_name.startswith(name)), None)


def model_card(
    recipe: Recipe,
    facts: Mapping[str, Any],
    *,
    parameters: int,
    areas: Sequence[str] = (),
    version: str = "",
) -> str:
    """The text of README.md.

    ``facts`` are those of ``read_facts``; a section without facts is left out. ``areas`` are the legal areas
    that have an adapter in ``adapters/``. ``version`` is that of Fast CPT. It is left out of the text that
    names a publication (``made_from``), so that a new version does not publish the same model again.
    """
    is_tuned = bool(facts["train_sft/training"])
    tuned = ", then fine-tuned on instructions" if is_tuned else ""
    program = f"Fast CPT {version}".rstrip()
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(recipe, facts['gguf']), sort_keys=False)}---",
        f"# {_title(recipe, facts['gguf'], parameters)}{tuned}",
        f"A language model of {parameters:,} parameters, trained from {_origin(recipe, facts['gguf'])} on legal texts"
        f"{tuned} by the {program} recipe `{recipe.name}`. {recipe.description}".rstrip(),
        "## Use",
        USE.format(prompt=CHAT_PROMPT if is_tuned else '"Article 1"'),
    ]
    if is_tuned:
        parts.append(
            "It was fine-tuned with the tokenizer's chat template; give it prompts through "
            "`tokenizer.apply_chat_template(..., add_generation_prompt=True)`."
        )
    if areas:
        parts.append(
            f"Adapters of single legal areas are in `adapters/`: {', '.join(areas)}. Each is for the "
            "base model, not for this model, which has the mean of the adapters merged into it: "
            '`PeftModel.from_pretrained(base_model, "path/to/this/folder/adapters/AREA")`.'
        )
    parts += _section("Training data", _data(facts["corpus_manifest"]))
    parts += _section("Training", _trainings(recipe, facts))
    parts += _section("Perplexity on held-out documents", _perplexity(facts))
    parts += _section("Answers to held-out instructions", _answers(facts["evaluation_sft"]))
    parts += _section("Recommended or not", _decision(facts["decision"]))
    parts += ["## Limits", LIMITS]
    return "\n\n".join(parts) + "\n"


def _front_matter(recipe: Recipe, gguf: Mapping[str, Any]) -> dict[str, Any]:
    """The hub's own fields (https://huggingface.co/docs/hub/model-cards); unknown ones are left out."""
    base = hub_name(recipe)
    licence = licence_of(base) if base else gguf.get("license")
    lineage = {"base_model": base, "base_model_relation": "finetune"} if base else {}
    return {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **lineage,
        **({"license": licence} if licence else {}),
        "tags": ["legal", "continued-pretraining"],
    }


def _title(recipe: Recipe, gguf: Mapping[str, Any], parameters: int) -> str:
    """What the model is, in one line."""
    if recipe.model.config is not None:
        return f"A model of {_rounded(parameters)} parameters trained on legal texts"
    base = (hub_name(recipe) or "").rpartition("/")[2] or gguf.get("name")
    return f"{base or f'A model of {_rounded(parameters)} parameters'} continued on legal texts"


def _rounded(parameters: int) -> str:
    billions = parameters / 1e9
    return f"{billions:.1f} B" if billions >= 1 else f"{parameters / 1e6:.1f} M"


def _origin(recipe: Recipe, gguf: Mapping[str, Any]) -> str:
    if recipe.model.config is not None:
        return "random weights (`model.config` of the recipe)"
    if base := hub_name(recipe):
        return f"`{base}`"
    if not gguf:
        return "a base model in a local folder"
    maker = f" by {gguf['organization']}" if gguf.get("organization") else ""
    licence = f", licence {gguf['license']}" if gguf.get("license") else ""
    return f"`{gguf['file']}`{maker} (GGUF, SHA-256 `{gguf['sha256']}`{licence})"


def _section(title: str, parts: list[str]) -> list[str]:
    return [f"## {title}", *parts] if parts else []


def _data(manifest: Mapping[str, Any]) -> list[str]:
    if not manifest:
        return []
    rows = [
        ("documents", f"{manifest['documents']:,}"),
        ("tokens", f"{manifest['tokens']:,}"),
        ("tokens per sequence", f"{manifest['max_seq_length']:,}"),
        ("corpus", f"`{manifest['digest']}`"),
    ]
    return [_table(("", ""), rows)]


def _trainings(recipe: Recipe, facts: Mapping[str, Any]) -> list[str]:
    settings = {
        "train_cpt": recipe.training,
        "train_cpt_stage2": recipe.stage2,
        "train_sft": recipe.sft.training,
    }
    rows = []
    for training, label in TRAININGS.items():
        totals = facts[f"{training}/training"]
        if totals:
            rows.append(
                (
                    label,
                    f"{totals['steps']:,}",
                    f"{totals['tokens']:,}",
                    f"{settings[training].learning_rate:g}",
                    f"{totals['loss']:.3f}",
                    _duration(totals["seconds"]),
                )
            )
    if not rows:
        return []
    lora = recipe.lora
    how = (
        f"Low-rank adapters (r {lora.r}, alpha {lora.lora_alpha}, on "
        f"{', '.join(lora.target_modules)}), merged into the weights."
        if lora
        else "All weights were trained."
    )
    header = ("training", "steps", "tokens", "learning rate", "last loss", "time")
    return [how, _table(header, rows)]


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:,.2f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def _perplexity(facts: Mapping[str, Any]) -> list[str]:
    evaluation = facts["evaluation_stage2"] or facts["evaluation"]
    rows = []
    for name in ("random", "newest", "general"):
        figures = evaluation.get(name, {})
        areas = figures.get("adapters", {}).items()
        for kind, of in ((name, figures), *((f"{name}, {area}", by) for area, by in areas)):
            for who, label in (
                ("base", "base model"),
                ("model", "after continued pre-training"),
                ("adapter", "with the area's own adapter"),
            ):
                found = of.get(who)
                if found:
                    rows.append(
                        (
                            kind,
                            label,
                            f"{found['perplexity']:.2f}",
                            f"{found['bits_per_byte']:.4f}",
                            f"{found['tokens']:,}",
                        )
                    )
    if not rows:
        return []
    parts = [
        _table(("validation set", "model", "perplexity", "bits per byte", "tokens"), rows),
        "Each token counts once, in strided windows. `random`: acts held out at random; `newest`: "
        "the newest acts; `general`: general texts, to measure forgetting. No version of a "
        "held-out text was trained on.",
    ]
    gate = facts["gate_stage2"] or facts["gate"]
    if gate:
        parts.append(f"At the gate: {words(gate)}.")
    parts += _questions(evaluation.get("questions"))
    if facts["train_sft/training"]:
        parts.append("These figures were measured before fine-tuning.")
    return parts


def _questions(asked: Mapping[str, Any] | None) -> list[str]:
    if not asked:
        return []
    base = asked.get("base", {}).get("table", {})
    rows = [
        (
            kind,
            f"{row['asked']:,}",
            _interval(base[kind]) if kind in base else "",
            _interval(row),
            _interval(row["gain"]) if "gain" in row else "",
        )
        for kind, row in asked["model"]["table"].items()
    ]
    return [
        "Questions made from the held-out documents, with four answers each (guessing: 0.25). Share "
        "of right answers, with 95 % intervals:",
        _table(("kind", "asked", "base model", "this model", "gain"), rows),
    ]


def _decision(decision: Mapping[str, Any]) -> list[str]:
    if not decision:
        return []
    is_met = "meets all conditions" if decision["recommended"] else "does not meet all conditions"
    of = f"`{decision['against']}`" if decision["against"] else "the base model"
    rows = [
        (
            condition["what"],
            f"{condition['bound']:g}",
            "not measured" if condition["value"] is None else f"{condition['value']:.4g}",
            f"{condition['low']:.4g} to {condition['high']:.4g}"
            if condition["low"] is not None
            else "",
            "yes" if condition["met"] else "no",
        )
        for condition in decision["conditions"]
    ]
    return [
        f"Compared with {of}, this model {is_met}.",
        _table(("condition", "bound", "value", "95 % interval", "met"), rows),
    ]


def _answers(evaluation: Mapping[str, Any]) -> list[str]:
    if not evaluation:
        return []
    citations = evaluation["citation_accuracy"]
    rows = [
        ("ROUGE-L (F)", _interval(evaluation["rouge_l"]), f"{evaluation['examples']:,} answers"),
        ("citation accuracy", _interval(citations), f"{citations['counted']:,} citations"),
    ]
    beyond = citations.get("beyond_prompt")
    if beyond:
        rows.append(
            (
                "the same, without citations in the prompt",
                _interval(beyond),
                f"{beyond['counted']:,} citations",
            )
        )
    return [
        _table(("figure", "value (95 % interval)", "counted over"), rows),
        "Citation accuracy is the share of EU acts and judgments cited by number in the answers "
        "that the reference answers cite too.",
    ]


def _interval(figure: Mapping[str, Any]) -> str:
    if figure["value"] is None:
        return "none counted"
    return f"{figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
