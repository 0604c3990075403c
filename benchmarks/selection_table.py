"""The table of ``selection_value.py``: means over seeds, and differences with their intervals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

SETS = ("random", "newest")
RESAMPLES = 5_000
LOTS = "lots"


def comparison_table(
    results: list[dict[str, Any]], trivial: list[str]
) -> tuple[str, dict[str, Any]]:
    """A Markdown table and its figures, with each arm's mean over its seeds.

    The differences are in percent of the other's bits: from randomly drawn documents, and from the trivial
    arm that is best on that set, each with a 95 % interval.
    """
    arms: dict[str, dict[int, dict[str, Any]]] = {}
    for result in results:
        arms.setdefault(result["arm"], {})[result["seed"]] = result
    best = {
        name: min(
            (arm for arm in trivial if arm in arms),
            key=lambda arm: np.mean([bits_of(run[name]) for run in arms[arm].values()]),
            default=None,
        )
        for name in SETS
    }
    lines = [
        "| arm | seeds | documents | random, bits per byte | against lots | against the best trivial "
        "| newest | against lots | against the best trivial |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    figures: dict[str, Any] = {}
    for arm, runs in arms.items():
        own: dict[str, Any] = {"seeds": sorted(runs)}
        cells = [arm, str(len(runs)), f"{next(iter(runs.values())).get('documents', 0):,}"]
        for name in SETS:
            bits = [bits_of(run[name]) for run in runs.values()]
            own[name] = {"bits_per_byte": float(np.mean(bits)), "of_seeds": bits}
            cells.append(f"{np.mean(bits):.4f} ({min(bits):.4f} to {max(bits):.4f})")
            for key, other in (("against_lots", LOTS), ("against_best_trivial", best[name])):
                found = difference(runs, arms[other], name) if other in arms else None
                own[name][key] = found and {"arm": other, **found}
                cells.append(_cell(found, other, arm))
        figures[arm] = own
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines), figures


def difference(
    runs: dict[int, dict[str, Any]], others: dict[int, dict[str, Any]], name: str
) -> dict[str, float]:
    """How many percent fewer (negative) bits one arm needs than another on a held-out set.

    The bootstrap draws documents with replacement, the same for both arms, and seeds, the same where both
    arms have them: percentiles of ``RESAMPLES`` draws.
    """
    both = sorted(runs.keys() & others.keys())
    left, right = (both, both) if both else (sorted(runs), sorted(others))
    one = np.array([runs[seed][name]["nats"] for seed in left])  # [seeds, documents]
    two = np.array([others[seed][name]["nats"] for seed in right])
    random = np.random.default_rng(0)
    documents = one.shape[1]
    ratios = np.empty(RESAMPLES)
    for n in range(RESAMPLES):
        drawn = np.bincount(random.integers(0, documents, documents), minlength=documents)
        of_one = random.integers(0, len(left), len(left))
        of_two = of_one if both else random.integers(0, len(right), len(right))
        ratios[n] = _mean(one[of_one], drawn) / _mean(two[of_two], drawn)
    low, high = np.quantile(ratios, [0.025, 0.975])
    whole = np.ones(documents)
    value = _mean(one, whole) / _mean(two, whole)
    return {key: 100 * (x - 1) for key, x in (("percent", value), ("low", low), ("high", high))}


def _mean(nats: npt.NDArray[Any], weight: npt.NDArray[Any]) -> float:
    return float((nats @ weight).mean())


def bits_of(found: dict[str, list[float]]) -> float:
    """Bits per byte over all documents of a set, from their losses in nats."""
    return sum(found["nats"]) / math.log(2) / sum(found["bytes"])


def _cell(found: dict[str, float] | None, other: str | None, arm: str) -> str:
    if found is None or other == arm:
        return "-"
    return f"{found['percent']:+.2f} % ({found['low']:+.2f} to {found['high']:+.2f}) {other}"
