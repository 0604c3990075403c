"""The names of results on the cluster, by which a later run finds them. No torch.

A name is a digest of everything that the result depends on, and of nothing else. Only fields of a recipe
that differ from their defaults count, so a new field whose default means "as before" changes no name. If
you change a default, or the result for the same inputs, increase that result's format number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastcpt.files import digest_of, read_json
from fastcpt.manifests import FileEntry
from fastcpt.recipe import Recipe, RecipeError
from fastcpt.recipe_sections import Section, Training
from fastcpt.training.card import model_card

TRAINING_FORMAT = 1
EVALUATION_FORMAT = 3
ANSWERS_FORMAT = 2
PUBLICATION_FORMAT = 1
# Settings that may change when a training resumes (docs/training.md), or that can only end it.
MAY_CHANGE = frozenset(
    {
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "logging_steps",
        "save_steps",
        "save_total_limit",
        "max_skipped_steps",
    }
)


def base_name(recipe: Recipe, tokenizer: str) -> str:
    """The recipe's base model: its hub name or folder, or ``base-<digest>`` if it is initialised here.

    ``tokenizer`` is the digest of the tokenizer that gives the vocabulary.
    """
    if recipe.model.name_or_path is not None:
        return recipe.model.name_or_path
    model = _settings(recipe.model)
    return f"base-{digest_of('base', TRAINING_FORMAT, model, recipe.training.seed, tokenizer)}"


def tokenizer_digest(files: Sequence[FileEntry]) -> str:
    """The digest of a corpus's tokenizer, from the files in its manifest (``file``, ``sha256``)."""
    its = (file for file in files if file["file"].startswith("tokenizer/"))
    return digest_of(sorted([file["file"], file["sha256"]] for file in its))


def training_name(
    recipe: Recipe,
    training: Training,
    *,
    model: str,
    data: Mapping[str, str],
    deepspeed: Path,
) -> str:
    """The name of a training: a digest of everything that its weights depend on.

    ``model`` is the name of the initial model, ``data`` the digests of the training data, ``deepspeed``
    the folder of its DeepSpeed file, which counts by content. Micro-batch, accumulation and GPUs count
    only through their product, the global batch. Raises ``RecipeError`` without the DeepSpeed file.
    """
    settings = _settings(training)
    file = deepspeed / training.deepspeed
    try:
        settings["deepspeed"] = read_json(file)
    except (OSError, ValueError) as error:
        raise RecipeError(f"training.deepspeed: {file.name} cannot be read: {error}") from error
    micro, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    return digest_of(
        "training",
        TRAINING_FORMAT,
        model,
        dict(data),
        recipe.corpus.max_seq_length,
        {key: value for key, value in settings.items() if key not in MAY_CHANGE},
        micro * accumulation * recipe.cluster.gpus,
        _settings(recipe.model, {"name_or_path", "config"}),
        None if recipe.lora is None else _settings(recipe.lora),
    )


def evaluation_name(recipe: Recipe, *, base: str, corpus: str) -> str:
    """The name of a perplexity evaluation among those of one model: base model, corpus and settings."""
    asked = recipe.gate.validation_set, recipe.evaluation.questions
    settings = recipe.corpus.max_seq_length, recipe.model.dtype, *asked
    return digest_of("evaluation", EVALUATION_FORMAT, base, corpus, *settings)


def answers_name(recipe: Recipe, *, base: str, instructions: str) -> str:
    """The name of an evaluation of answers among those of one model: base, instructions and settings."""
    settings = recipe.corpus.max_seq_length, recipe.model.dtype, recipe.sft.max_new_tokens
    return digest_of("answers", ANSWERS_FORMAT, base, instructions, *settings)


def publication_name(recipe: Recipe, facts: Mapping[str, Any], model: Any) -> str:
    """The name of a published model: the model and the text of its card, which has all else that counts."""
    card = model_card(recipe, facts, parameters=0)
    return digest_of("publication", PUBLICATION_FORMAT, model, recipe.model.dtype, card)


def _settings(section: Section, without: set[str] | None = None) -> dict[str, Any]:
    """The fields of a section that differ from their defaults."""
    return section.model_dump(mode="json", exclude_defaults=True, exclude=without)
