"""Reads and validates a recipe from a YAML file.

A recipe is everything a run depends on: the documents, how they are scored, selected and packed, the
model, its training, when it is good enough, the machines, and the budget. Keys of the training section are
those of transformers' ``TrainingArguments``, keys of the LoRA section those of peft's ``LoraConfig``. An
unknown key is refused with the nearest known one, a value out of range with its limits, each with its line
in the file.

It imports neither Airflow nor torch, so every room may import it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from fastcpt.recipe_score import Score
from fastcpt.recipe_sections import (
    CONFIGS,
    Budget,
    Checkpoints,
    Claim,
    Cluster,
    Corpus,
    Documents,
    Evaluation,
    Gate,
    Lora,
    Model,
    Publish,
    Section,
    Selection,
    Sft,
    Tokenizer,
    Training,
)
from fastcpt.recurring import Recurring
from fastcpt.yaml_files import YamlError, read_yaml_lines

DEFAULT_RECIPE = "cpt_config_fast"


class RecipeError(ValueError):
    """The recipe cannot be used; the message names file, line and key, and what to do."""


class Recipe(Section):
    """A validated recipe.

    In the file, ``stage2`` and ``sft.training`` have only their differences from ``training``; here all
    three are complete.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,100}$")
    description: str = ""
    claim: Claim | None = None
    documents: Documents = Documents()
    score: Score = Score()
    selection: Selection = Selection()
    corpus: Corpus = Corpus()
    tokenizer: Tokenizer = Tokenizer()
    model: Model = Model()
    training: Training = Training()
    stage2: Training = Training(max_steps=30_000, learning_rate=1e-5)
    lora: Lora | None = None
    evaluation: Evaluation = Evaluation()
    gate: Gate = Gate()
    sft: Sft = Sft()
    cluster: Cluster = Cluster()
    checkpoints: Checkpoints = Checkpoints()
    budget: Budget = Budget()
    recurring: Recurring = Recurring()
    publish: Publish = Publish()

    @model_validator(mode="after")
    def small_states_are_of_bf16_weights(self) -> Recipe:
        trainings = (self.training, self.stage2, self.sft.training)
        small = [one for one in trainings if one.optimizer_states != "float32"]
        if small and self.model.dtype != "bfloat16":
            raise ValueError(
                f"optimizer_states {small[0].optimizer_states} is for weights in bfloat16, and "
                f"model.dtype is {self.model.dtype}: take float32 states"
            )
        return self

    @model_validator(mode="after")
    def model_outlives_the_machine(self) -> Recipe:
        if self.cluster.rent and self.publish.destination == "leave_on_cluster":
            raise ValueError(
                "publish.destination leave_on_cluster would lose the model with the rented machine: "
                "bring_back"
            )
        return self

    @property
    def global_batch_size(self) -> int:
        """Sequences of one optimizer step, over all GPUs."""
        training = self.training
        return (
            training.per_device_train_batch_size
            * training.gradient_accumulation_steps
            * self.cluster.gpus
        )

    def to_yaml(self) -> str:
        """The recipe with every default written out; ``load_recipe`` reads it back unchanged."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def recipe_names() -> list[str]:
    """The recipes that come with the project, by file name without ``.yaml``."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """The file of a recipe given by name or path; ``RecipeError`` if there is none."""
    for path in (CONFIGS / f"{name}.yaml", CONFIGS / name, Path(name)):
        if path.suffix in {".yaml", ".yml"} and path.is_file():
            return path
    close = difflib.get_close_matches(name, recipe_names(), n=1, cutoff=0.4)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    raise RecipeError(f"no recipe '{name}'{hint} Recipes here: {', '.join(recipe_names())}.")


def load_recipe(name: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read and validate a recipe.

    ``name`` is a recipe's name or a path to its YAML file. ``overrides`` maps dotted keys
    (``"selection.quality_threshold"``) to values that replace the file's. Raises a ``RecipeError`` that
    lists every problem with file, line and key.
    """
    path = find_recipe(str(name))
    try:
        content, lines = read_yaml_lines(path)
    except YamlError as error:
        raise RecipeError(str(error)) from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path.name}: a recipe is a mapping of sections, this file is not")
    content.setdefault("name", path.stem)
    for key, value in (overrides or {}).items():
        _put(content, key, value)
    whole = _with_inherited_training(content)
    if "training.max_steps" in (overrides or {}):
        whole["training"] = _with_short_warmup(whole["training"])
    try:
        return Recipe.model_validate(whole)
    except ValidationError as error:
        problems = [
            _problem(path.name, lines, item, set(overrides or {}))
            for item in error.errors()
            if not _is_inherited(item["loc"], content)
        ]
        raise RecipeError("\n".join(problems)) from error


def _with_inherited_training(content: dict[str, Any]) -> dict[str, Any]:
    """Fill ``stage2`` and ``sft.training`` with the values of ``training`` that they do not change."""
    training = content.get("training")
    base = dict(training) if isinstance(training, dict) else {}
    # the time budget is for the first stage only, and an unknown key is reported in its own section
    inherited = Training.model_fields.keys() - {"time_budget_hours"}
    base = {key: value for key, value in base.items() if key in inherited}
    stage2 = content.get("stage2") or {}
    sft = content.get("sft") or {}
    if not isinstance(stage2, dict) or not isinstance(sft, dict):
        return content
    sft_training = sft.get("training") or {}
    if not isinstance(sft_training, dict):
        return content
    return {
        **content,
        "stage2": {**base, "max_steps": 30_000, "learning_rate": 1e-5, **stage2},
        "sft": {
            **sft,
            "training": {**base, "max_steps": 500, "warmup_steps": 20, **sft_training},
        },
    }


def _is_inherited(loc: tuple[int | str, ...], content: dict[str, Any]) -> bool:
    """Whether a wrong value of a later training was inherited from ``training``, which reports it."""
    for section in (("stage2",), ("sft", "training")):
        if loc[: len(section)] == section and len(loc) > len(section):
            given: Any = content
            for key in section:
                given = (given or {}).get(key)
            return loc[len(section)] not in (given or {})
    return False


def _put(content: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        inner = content.setdefault(section, {})
        if not isinstance(inner, dict):
            inner = content[section] = {}
        content = inner
    content[last] = value


def _with_short_warmup(training: dict[str, Any]) -> dict[str, Any]:
    """The first stage's settings with a warm-up of at most a tenth of its steps.

    The form has a field for the steps but none for the warm-up. Later stages keep theirs.
    """
    steps, warmup = training["max_steps"], training.get("warmup_steps", 500)
    if not (isinstance(steps, int) and isinstance(warmup, int)):
        return training
    return {**training, "warmup_steps": min(warmup, steps // 10)}


def _problem(
    file: str,
    lines: dict[tuple[str, ...], int],
    error: Any,
    overridden: set[str],
) -> str:
    keys = tuple(str(part) for part in error["loc"] if _is_key(part))
    dotted = ".".join(keys)
    line = next((lines[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in lines), None)
    where = f"{file}:{line}" if line and dotted not in overridden else file
    if dotted in overridden:
        where = "override"
    if error["type"] == "extra_forbidden":
        known = _known_keys(keys[:-1])
        close = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(known)}"
        return f"{where}: unknown key '{dotted}'; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    given = "" if isinstance(error["input"], (dict, BaseModel)) else f", not {error['input']!r}"
    return f"{where}: {dotted or 'recipe'}: {message}{given}"


def _is_key(part: object) -> bool:
    # pydantic puts the tried member of a union into the path of an error, which is not a key
    return not (
        isinstance(part, str) and part in {"bool", "int", "float", "str", "literal['auto']"}
    )


def _known_keys(sections: tuple[str, ...]) -> list[str]:
    model: Any = Recipe
    for section in sections:
        annotation = model.model_fields[section].annotation
        members = [annotation, *get_args(annotation)]
        model = next(
            member for member in members if isinstance(member, type) and issubclass(member, Section)
        )
    return list(model.model_fields)
