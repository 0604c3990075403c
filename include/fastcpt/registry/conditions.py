"""Decides whether a model is recommended: a list of conditions, each with value, bound and interval.

The gate has already decided that the model is good enough to fine-tune. Here it is compared with the base
model and, on the recipe's frozen set, with the champion. The comparison is by document, because a document
that is hard for one model is hard for the other too (paired bootstrap, ``fastcpt.intervals``).
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


def recommend(
    publish: Publish,
    gate: Mapping[str, Any],
    evaluation: Evaluation,
    champion: Mapping[str, Any] | None,
    trained_on: int | None = 0,
) -> dict[str, Any]:
    """The content of ``decision.json``: ``recommended``, ``against`` and the ``conditions``.

    ``evaluation`` is the run's last one. ``champion`` has the champion's ``model`` and its
    ``evaluation``; if it is None, the model is compared with the base model. ``trained_on`` is the number
    of documents of the comparison set that either model was trained on; None if the ledger does not know.
    A condition has ``what``, ``value``, ``low``, ``high`` (95 %, None without an interval), ``bound``,
    ``met`` and, if it could not be measured, ``why``.
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
        what = "documents of the comparison set that the model or the champion was trained on"
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
    """Whether the relative saving in bits over the champion, or the base model, reaches the margin."""
    of = "the champion" if champion else "the base model"
    what = f"relative saving in bits per byte over {of}, at least the margin and beyond noise"
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
    what = "share of right answers minus the champion's, not below 0 beyond noise"
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
            "bits per byte saved over the base model, at least and beyond noise",
            _saved(evaluation, evaluation["validation_set"]),
            _above,
            "the base model was not evaluated",
        ),
        (
            wanted.tasks,
            "share of right answers minus the base model's, not below beyond noise",
            answers.get("gain"),
            _not_below,
            "no questions were asked (evaluation.questions)",
        ),
        (
            wanted.forgotten,
            "bits per byte lost on general texts against the base model, at most",
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
    """Bits per byte that the model needs less than the base model; None if that was not measured."""
    documents = _documents(evaluation, validation_set)
    if not documents or "base" not in documents:
        return None
    saved = np.array(documents["base"]) - np.array(documents["model"])
    found = ratio(saved / math.log(2), np.array(documents["bytes"], dtype=np.float64))
    return None if found["value"] is None else found


def _documents(evaluation: Evaluation, validation_set: str | None = None) -> dict[str, Any]:
    """The loss of each document of a set; without a name, of the set that the gate uses."""
    name = validation_set or evaluation["validation_set"]
    return dict(evaluation.get(name, {}).get("by_document", {}))


def _not_comparable(
    evaluation: Evaluation, champion: Evaluation, ours: dict[str, Any], theirs: dict[str, Any]
) -> str:
    """Why two evaluations cannot be compared; empty if they are of the same documents and window."""
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
    """A saving as a loss: the sign and the ends of the interval change."""
    return found and {"value": -found["value"], "low": -found["high"], "high": -found["low"]}


def _condition(what: str, found: Found, bound: float, met: bool) -> dict[str, Any]:
    figures = {key: found.get(key) for key in ("value", "low", "high")}
    return {"what": what, **figures, "bound": bound, "met": met}


def _unmeasured(what: str, bound: float, why: str) -> dict[str, Any]:
    nothing = {"value": None, "low": None, "high": None}
    return {"what": what, **nothing, "bound": bound, "met": False, "why": why}
