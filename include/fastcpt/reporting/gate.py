"""The gate: is the model good enough to be fine-tuned?

Perplexity strictly below the recipe's threshold passes. Anything that is no perplexity (missing,
not a number, infinite, below 1) is an error and never an answer: a run must not go on to hours of
training, or past the gate, on the strength of a broken evaluation.
"""

from __future__ import annotations

import math
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
