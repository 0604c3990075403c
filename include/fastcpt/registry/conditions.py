"""Whether a model is recommended: every condition with its value, its bound and its interval.

The gate has decided before whether there is a model at all. Here it is compared with the base model
and, on the recipe's frozen set, with its champion: document by document, so that what makes one act
harder than another counts on both sides (paired bootstrap over documents, ``fastcpt.intervals``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcpt.intervals import ratio
from fastcpt.recipe_sections import Publish

Floats = npt.NDArray[np.float64]
Evaluation = Mapping[str, Any]
Found = Mapping[str, Any]  # value, low, high


def decide(
    publish: Publish,
    gate: Mapping[str, Any],
    evaluation: Evaluation,
    champion: Mapping[str, Any] | None,
    trained_on: int | None = 0,
) -> dict[str, Any]:
    """What ``decision.json`` holds: ``recommended``, ``against`` and the ``conditions``.

    ``evaluation`` is the run's last; ``champion`` has the champion's ``model`` and its own
    ``evaluation``, None where the recipe has none: then the base model has to be beaten.
    ``trained_on``: documents of the comparison set that either of them was trained on; None: the ledger does not know. A
    condition has ``what``, ``value``, ``low``, ``high`` (95 %, None where there is no interval),
    ``bound``, ``met`` and, where it could not be measured, ``why``.
    """
    conditions = [
        {
            "what": f"perplexity below the gate's ({gate['validation_set']} set)",
            **{"value": gate["value"], "low": None, "high": None},
            **{"bound": gate["threshold"], "met": bool(gate["passed"])},
        },
        _better(publish.margin, evaluation, champion["evaluation"] if champion else None),
    ]
    if champion:
        what = "documents of the comparison set that it or the champion was trained on"
        conditions.append(
            _unmeasured(what, 0, "the ledger does not know one of their corpora")
            if trained_on is None
            else _condition(what, {"value": trained_on}, 0, met=trained_on == 0)
        )
        conditions += _answers_not_worse(evaluation, champion["evaluation"])
    conditions += _over_base(publish, evaluation)
    return {
        "recommended": all(condition["met"] for condition in conditions),
        "against": champion["model"] if champion else None,
        "conditions": conditions,
    }


def _better(margin: float, evaluation: Evaluation, champion: Evaluation | None) -> dict[str, Any]:
    """Fewer bits than the champion, or the base model, needs: by the margin, and beyond the noise."""
    of = "the champion's" if champion else "the base model's"
    what = f"share of bits a byte saved of {of}, at least the margin and beyond noise"
    ours = _documents(evaluation)
    theirs, who = (_documents(champion), "model") if champion else (ours, "base")
    why = _not_comparable(evaluation, champion, ours, theirs) if champion else ""
    if not why and who not in theirs:
        why = "the base model was not evaluated"
    if why:
        return _unmeasured(what, margin, why)
    before, now = np.array(theirs[who]), np.array(ours["model"])
    found = ratio(before - now, before)
    return _condition(what, found, margin, met=_above(found, margin))


def _answers_not_worse(evaluation: Evaluation, champion: Evaluation) -> list[dict[str, Any]]:
    ours = str(evaluation.get("questions", {}).get("model", {}).get("right", ""))
    theirs = str(champion.get("questions", {}).get("model", {}).get("right", ""))
    if not ours and not theirs:
        return []
    what = "share of questions answered rightly beyond the champion's, not below 0 beyond noise"
    if len(ours) != len(theirs):  # evaluation.questions changed
        why = f"{len(ours)} questions were asked, the champion {len(theirs)}"
        return [_unmeasured(what, 0.0, why)]
    gains = np.array([int(our) - int(their) for our, their in zip(ours, theirs, strict=True)])
    found = ratio(gains.astype(np.float64), np.ones(len(gains)))
    return [_condition(what, found, 0.0, met=_not_below(found, 0.0))]


def _over_base(publish: Publish, evaluation: Evaluation) -> list[dict[str, Any]]:
    """The recipe's own conditions (``publish.conditions``), all against the base model."""
    wanted = publish.conditions
    answers = evaluation.get("questions", {}).get("model", {}).get("table", {}).get("all", {})
    asked: list[tuple[float | None, str, Found | None, Callable[[Found, float], bool], str]] = [
        (
            wanted.improvement,
            "bits a byte saved of the base model's, at least and beyond noise",
            _saved(evaluation, evaluation["validation_set"]),
            _above,
            "the base model was not evaluated",
        ),
        (
            wanted.tasks,
            "share of questions answered rightly beyond the base model's, not below beyond noise",
            answers.get("gain"),
            _not_below,
            "no questions were asked (evaluation.questions)",
        ),
        (
            wanted.forgotten,
            "bits a byte lost on general texts beside the base model, at most",
            _negative(_saved(evaluation, "general")),
            _at_most,
            "no general set (documents.replay)",
        ),
    ]
    return [
        _condition(what, found, bound, met(found, bound))
        if found
        else _unmeasured(what, bound, why)
        for bound, what, found, met, why in asked
        if bound is not None
    ]


def _saved(evaluation: Evaluation, validation_set: str) -> dict[str, Any] | None:
    """Bits a byte that the model needs less than the base model; None where that was not measured."""
    documents = _documents(evaluation, validation_set)
    if not documents or "base" not in documents:
        return None
    saved = np.array(documents["base"]) - np.array(documents["model"])
    found = ratio(saved / math.log(2), np.array(documents["bytes"], dtype=np.float64))
    return None if found["value"] is None else found


def _documents(evaluation: Evaluation, validation_set: str | None = None) -> dict[str, Any]:
    """The losses of each document of a set; of the gate's without a name."""
    name = validation_set or evaluation["validation_set"]
    return dict(evaluation.get(name, {}).get("by_document", {}))


def _not_comparable(
    evaluation: Evaluation, champion: Evaluation, ours: dict[str, Any], theirs: dict[str, Any]
) -> str:
    """Why two evaluations are not of the same documents read in the same way; empty where they are."""
    if not ours or not theirs:
        return (
            "an evaluation has no losses of single documents: one of the two is of an older version"
        )
    for key in ("validation_set", "window"):
        if evaluation[key] != champion[key]:
            return f"the {key} is {evaluation[key]}, the champion's {champion[key]}"
    if (ours["id"], ours["bytes"]) != (theirs["id"], theirs["bytes"]):
        return "the champion was not evaluated on these documents"
    return ""


def _above(found: Found, bound: float) -> bool:
    return bool(found["low"] > 0 and found["value"] >= bound)


def _not_below(found: Found, bound: float) -> bool:
    return bool(found["high"] >= bound)


def _at_most(found: Found, bound: float) -> bool:
    return bool(found["value"] <= bound)


def _negative(found: Found | None) -> Found | None:
    """What is saved as what is lost."""
    return found and {"value": -found["value"], "low": -found["high"], "high": -found["low"]}


def _condition(what: str, found: Found, bound: float, met: bool) -> dict[str, Any]:
    figures = {key: found.get(key) for key in ("value", "low", "high")}
    return {"what": what, **figures, "bound": bound, "met": met}


def _unmeasured(what: str, bound: float, why: str) -> dict[str, Any]:
    nothing = {"value": None, "low": None, "high": None}
    return {"what": what, **nothing, "bound": bound, "met": False, "why": why}
