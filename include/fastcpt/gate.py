"""The gate: is the model good enough to be fine-tuned?

Perplexity strictly below the recipe's threshold passes. Anything that is no perplexity (missing,
not a number, infinite, below 1) is an error and never an answer: a run must not go on to hours of
training, or past the gate, on the strength of a broken evaluation.

A base model that passes by itself is said wherever the gate is: then passing shows nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class GateError(ValueError):
    """The evaluation holds no usable perplexity; evaluating again is what helps, not a retry."""


def decide(evaluation: dict[str, Any], threshold: float, validation_set: str) -> dict[str, Any]:
    """Compare the trained model's perplexity on ``validation_set`` with ``threshold``.

    ``evaluation`` is the content of ``evaluation.json``. The answer is what ``gate.json`` holds:
    ``decision`` ("pass" or "miss"), ``passed``, ``value``, ``base_value`` (None where the base
    model was not evaluated), ``threshold`` and ``validation_set``. Raises ``GateError``.
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
    """What ``decide`` answered, in words without a full stop at the end."""
    base, threshold = gate["base_value"], gate["threshold"]
    relation = "below" if gate["passed"] else "not below"
    of_base = f", base model {base:,.2f}" if base is not None else ""
    decided = (
        f"{gate['value']:,.2f}{of_base}; {relation} the gate's {threshold:g} "
        f"({gate['validation_set']} validation set)"
    )
    return ". ".join(filter(None, (decided, base_passes(base, threshold))))


def base_passes(base: float | None, threshold: float) -> str:
    """A sentence where a base model of this perplexity passes the gate; empty where it does not."""
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
    """The perplexity among a model's figures: exp of a mean loss, so finite and at least 1."""
    value = figures.get("perplexity") if isinstance(figures, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and value >= 1 else None
