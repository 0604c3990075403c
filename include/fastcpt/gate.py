"""The gate: is the model good enough to be fine-tuned?

A perplexity strictly below the recipe's threshold passes. An invalid perplexity (missing, not a number,
infinite, below 1) is an error, not a decision: a run must not continue because of a broken evaluation.

If the base model passes the gate too, every report of the gate says so: passing then shows nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, TypedDict


class GateError(ValueError):
    """The evaluation has no usable perplexity; it has to be repeated, retrying the gate does not help."""


class Decision(TypedDict):
    """The content of ``gate.json``; ``base_value`` is None if the base model was not evaluated."""

    decision: Literal["pass", "miss"]
    passed: bool
    value: float
    base_value: float | None
    threshold: float
    validation_set: str


def decide(evaluation: dict[str, Any], threshold: float, validation_set: str) -> Decision:
    """Compare the trained model's perplexity on ``validation_set`` with ``threshold``.

    ``evaluation`` is the content of ``evaluation.json``. Raises ``GateError``.
    """
    if not (math.isfinite(threshold) and threshold > 1):
        raise GateError(f"gate.perplexity_threshold must be a number above 1, not {threshold}")
    figures = figures_of(evaluation, validation_set)
    value = _perplexity(figures.get("model"))
    if value is None:
        raise GateError(
            f"the evaluation on the {validation_set} validation set gives no usable perplexity of "
            f"the model (found {figures.get('model')!r}); look into the log of the evaluation task"
        )
    passed = value < threshold
    return {
        "decision": "pass" if passed else "miss",
        "passed": passed,
        "value": value,
        "base_value": _perplexity(figures.get("base")),
        "threshold": threshold,
        "validation_set": validation_set,
    }


def words(gate: Mapping[str, Any]) -> str:
    """The result of ``decide`` in words, without a full stop."""
    base, threshold = gate["base_value"], gate["threshold"]
    relation = "below" if gate["passed"] else "not below"
    of_base = f", base model {base:,.2f}" if base is not None else ""
    decided = (
        f"{gate['value']:,.2f}{of_base}; {relation} the gate's {threshold:g} "
        f"({gate['validation_set']} validation set)"
    )
    return ". ".join(filter(None, (decided, base_passes(base, threshold))))


def base_passes(base: float | None, threshold: float) -> str:
    """A warning if a base model of this perplexity passes the gate, else empty."""
    if base is None or base >= threshold:
        return ""
    return (
        f"The base model passes this gate too ({base:,.2f}, below {threshold:g}): passing it does not "
        "show that training helped"
    )


def figures_of(evaluation: dict[str, Any], validation_set: str) -> dict[str, Any]:
    """``{"model": {...}, "base": {...}}`` of one validation set of an evaluation."""
    figures = evaluation.get(validation_set)
    if figures is None and evaluation.get("validation_set") == validation_set:
        figures = evaluation
    if not isinstance(figures, dict):
        raise GateError(f"the evaluation says nothing of the {validation_set} validation set")
    return figures


def _perplexity(figures: Any) -> float | None:
    """A model's perplexity, or None if it is not a finite number of at least 1."""
    value = figures.get("perplexity") if isinstance(figures, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and value >= 1 else None
