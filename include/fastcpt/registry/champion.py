"""The champion of a recipe, under one fixed path for whatever serves it.

    home/models/<recipe>-<digest>/     a published model
    home/models/<recipe>/champion      a link to the champion's folder
    home/models/<recipe>/champion.json which model that is, where, since when and why
    home/models/<recipe>/models.json   all models with their decisions, and all events with their times
    home/models/<recipe>/evaluations/  each model's evaluation, for comparison with later models

``models.json`` is the source. It is replaced in one step, under a lock. The link and ``champion.json`` are
derived from it; if a process dies in between, the next change sets them again.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastcpt.files import flush, read_json, write_json
from fastcpt.held_out import HeldOutError, freeze, unfreeze

PROMOTED, ROLLED_BACK, RETIRED, KEPT = "promoted", "rolled back", "retired", "kept"
AT_ONCE = "fast_cpt"  # noted as ``who`` when a run promotes its model


class RegistryError(ValueError):
    """The request cannot be carried out; the message says why and what can be done instead."""


def folder_of(home: Path, recipe: str) -> Path:
    return home / "models" / recipe


def models(home: Path, recipe: str) -> dict[str, dict[str, Any]]:
    """Every model of a recipe by its name, in the order in which they came."""
    return dict(_read(home, recipe)["models"])


def events(home: Path, recipe: str) -> list[dict[str, Any]]:
    """All events, the oldest first: ``time``, ``what``, ``model``, ``instead_of``, ``who``, ``why``, ``told``."""
    return list(_read(home, recipe)["events"])


def untold(home: Path) -> list[str]:
    """The recipes with events of which no message was sent, whoever caused them."""
    recipes = [file.parent.name for file in sorted(home.glob("models/*/models.json"))]
    return [recipe for recipe in recipes if any(map(_is_untold, events(home, recipe)))]


def take_untold(home: Path, recipe: str) -> dict[str, Any] | None:
    """The oldest event of which no message was sent, or None. It is marked as told, so one caller gets it."""
    with _locked(home, recipe) as state:
        event: dict[str, Any] | None = next(filter(_is_untold, state["events"]), None)
        if event:
            event["told"] = True
        return event


def champion(home: Path, recipe: str) -> str | None:
    """The champion's name; None if there is no champion."""
    return _champion(_read(home, recipe))


def predecessor(home: Path, recipe: str) -> str | None:
    """The champion before the present one was promoted: ``rollback`` returns to it."""
    return _predecessor(_read(home, recipe))


def evaluation_of(home: Path, recipe: str, model: str) -> dict[str, Any]:
    return dict(read_json(folder_of(home, recipe) / "evaluations" / f"{model}.json"))


def add_model(
    home: Path, recipe: str, model: str, facts: dict[str, Any], evaluation: dict[str, Any]
) -> str:
    """Register a published model: as the champion if its decision recommends it, else as a candidate.

    ``facts``: ``run``, ``record`` (its folder's name), ``path`` (of the published model), ``training`` and
    ``before_sft`` (names of its last training and of the one before fine-tuning), ``corpus`` (its digest),
    ``corpora`` (of all that it was trained on, the oldest first), ``gone_on_from`` (a model's name or None),
    ``decision``. A model that is registered already stays what it is. Returns what happened, in words.
    """
    with _locked(home, recipe) as state:
        if model in state["models"]:
            return f"{model} is known: {_standing(state, model)}"
        write_json(folder_of(home, recipe) / "evaluations" / f"{model}.json", evaluation)
        state["models"][model] = {**facts, "added": _now()}
        decision, why = facts["decision"], reason(facts["decision"])
        if decision["recommended"] and decision["against"] != _champion(state):
            why = f"the champion changed since it was compared with {decision['against'] or 'the base model'}"
        elif decision["recommended"]:
            try:
                return _set(home, recipe, state, PROMOTED, model, AT_ONCE, why)
            # its corpus is of an older version: keep the model as a candidate
            except HeldOutError as error:
                why = str(error)
        return _note(state, KEPT, model, AT_ONCE, why)


def promote(home: Path, recipe: str, model: str, who: str, why: str) -> str:
    """Make a model the champion. ``RegistryError`` if it is not known or its folder is gone."""
    with _locked(home, recipe) as state:
        if model not in state["models"]:
            known = ", ".join(state["models"]) or "none"
            raise RegistryError(f"recipe '{recipe}' has no model '{model}'; known: {known}")
        if model == _champion(state):
            return f"{model} is the champion"
        return _set(home, recipe, state, PROMOTED, model, who, why)


def rollback(home: Path, recipe: str, who: str, why: str) -> str:
    """Make the champion's predecessor the champion again; a second rollback goes one further back."""
    with _locked(home, recipe) as state:
        before = _predecessor(state)
        if before is None:
            raise RegistryError(f"recipe '{recipe}' had no champion before this one")
        return _set(home, recipe, state, ROLLED_BACK, before, who, why)


def retire(home: Path, recipe: str, who: str, why: str) -> str:
    """Leave the recipe without a champion: comparison set and tokenizer are no longer fixed."""
    with _locked(home, recipe) as state:
        if _champion(state) is None:
            raise RegistryError(f"recipe '{recipe}' has no champion")
        unfreeze(home, recipe)
        return _note(state, RETIRED, None, who, why)


def reason(decision: dict[str, Any]) -> str:
    """A decision in one line: the conditions that were missed, or that all were met."""
    missed = [condition for condition in decision["conditions"] if not condition["met"]]
    if not missed:
        return f"it meets all {len(decision['conditions'])} conditions"
    return "; ".join(f"missed: {condition_words(condition)}" for condition in missed)


def event_words(event: dict[str, Any]) -> str:
    """An event in one line, with its reason."""
    model, before = event["model"], event["instead_of"]
    of = f" (instead of {before})" if before and before != model and event["what"] != KEPT else ""
    return f"{model or before} {event_kind(event)}{of}: {event['why']}"


def event_kind(event: dict[str, Any]) -> str:
    """What happened, as it is written for people."""
    return "kept as a candidate" if event["what"] == KEPT else str(event["what"])


def condition_words(condition: dict[str, Any]) -> str:
    """A condition with its figures."""
    if condition["value"] is None:
        return f"{condition['what']} ({condition['bound']:g}): not measured: {condition['why']}"
    found = f"{condition['value']:.4g}"
    if condition["low"] is not None:
        found += f" ({condition['low']:.4g} to {condition['high']:.4g})"
    return f"{condition['what']} ({condition['bound']:g}): {found}"


def _read(home: Path, recipe: str) -> dict[str, Any]:
    file = folder_of(home, recipe) / "models.json"
    return dict(read_json(file)) if file.is_file() else {"models": {}, "events": []}


@contextmanager
def _locked(home: Path, recipe: str) -> Iterator[dict[str, Any]]:
    """The state, for one process at a time; written, with link and file, if the block raises nothing."""
    folder = folder_of(home, recipe)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        state = _read(home, recipe)
        yield state
        write_json(folder / "models.json", state)
        _show(folder, state)


def _show(folder: Path, state: dict[str, Any]) -> None:
    """Set the link and ``champion.json`` as the state says."""
    model, link = _champion(state), folder / "champion"
    if model is None:
        link.unlink(missing_ok=True)
        (folder / "champion.json").unlink(missing_ok=True)
        return
    last = next(event for event in reversed(state["events"]) if event["what"] != KEPT)
    facts = {key: state["models"][model][key] for key in ("path", "run")}
    since = {"since": last["time"], "who": last["who"], "why": last["why"]}
    write_json(folder / "champion.json", {"model": model, **facts, **since})
    if (folder.parent / model).is_dir():
        aside = folder / ".champion.partial"
        aside.unlink(missing_ok=True)
        aside.symlink_to(os.path.join("..", model), target_is_directory=True)
        aside.replace(link)
    else:
        link.unlink(missing_ok=True)  # it was left on the cluster: champion.json says where
    flush(folder)


def _set(
    home: Path, recipe: str, state: dict[str, Any], what: str, model: str, who: str, why: str
) -> str:
    facts = state["models"][model]
    if Path(facts["path"]).is_absolute() and not (home / "models" / model).is_dir():
        raise RegistryError(
            f"{home / 'models' / model} is gone: publish it again (run {facts['run']})"
        )
    freeze(home, recipe, facts["corpus"])
    return _note(state, what, model, who, why)


def _note(state: dict[str, Any], what: str, model: str | None, who: str, why: str) -> str:
    event = {
        **{"time": _now(), "what": what, "model": model, "instead_of": _champion(state)},
        **{"who": who, "why": why, "told": False},
    }
    state["events"].append(event)
    return event_words(event)


def _is_untold(event: dict[str, Any]) -> bool:
    # an earlier version's event does not say: its time is over
    return not event.get("told", True)


def _champion(state: dict[str, Any]) -> str | None:
    model = None
    for event in state["events"]:
        if event["what"] != KEPT:
            model = event["model"]
    return model


def _predecessor(state: dict[str, Any]) -> str | None:
    model = _champion(state)
    for event in reversed(state["events"]):
        if (event["what"], event["model"]) == (PROMOTED, model):
            before: str | None = event["instead_of"]
            return before
    return None


def _standing(state: dict[str, Any], model: str) -> str:
    return "the champion" if model == _champion(state) else "no champion"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
