"""Where a run's training begins: the base model, or the champion as it was before fine-tuning."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path

from fastcpt.recipe import Recipe, load_recipe
from fastcpt.recurring import Start
from fastcpt.registry.champion import champion, models

# The recipe's values that have to equal the champion's, so that its weights can be trained further.
SAME = (
    *("model.name_or_path", "model.config", "model.dtype", "tokenizer.path"),
    *("tokenizer.train_vocab_size", "corpus.max_seq_length", "lora", "gate.validation_set"),
)


class StartError(ValueError):
    """Training cannot go on from the champion; the message says why and what to do."""


def start_of(recipe: Recipe, home: Path) -> Start | None:
    """The champion that the recipe's training goes on from; None if it begins with the base model.

    It begins with the base model if ``recurring.start`` is ``base`` or the recipe has no champion. Raises
    ``StartError`` if the champion is of another model or recipe or of an older version, or if the host is
    rented and the champion's weights are not on this machine.
    """
    best = champion(home, recipe.name)
    if recipe.recurring.start == "base" or best is None:
        return None
    facts = models(home, recipe.name)[best]
    if "before_sft" not in facts:
        raise _cannot(best, "it was published by an older version, which did not note where it is")
    if recipe.cluster.rent and not brought(home, facts["before_sft"]).is_dir():
        why = f"{brought(home, facts['before_sft'])} is missing, and the next rented host has it neither"
        raise _cannot(best, why)
    its = home / "runs" / facts["record"] / "recipe.yaml"
    if not its.is_file():
        raise _cannot(best, f"its recipe, {its}, is gone")
    if differ := _differences(load_recipe(its), recipe):
        raise _cannot(best, f"its recipe is another one: {'; '.join(differ)}")
    return {
        "model": best,
        "training": facts["before_sft"],
        "record": facts["record"],
        "corpora": facts["corpora"],
    }


def brought(home: Path, training: str) -> Path:
    """The folder on this machine for a training's weights before fine-tuning."""
    return home / "before_sft" / training


def _differences(its: Recipe, ours: Recipe) -> list[str]:
    found = []
    for key in SAME:
        theirs, wanted = map(attrgetter(key), (its, ours))
        if theirs != wanted:
            found.append(f"{key} was {theirs!r} and is {wanted!r}")
    return found


def _cannot(model: str, why: str) -> StartError:
    return StartError(
        f"training cannot go on from champion {model}: {why}. Set recurring.start to base, "
        "or give the recipe another name"
    )
