"""Bootstrap confidence intervals of ratios of sums over documents or answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

RESAMPLES, SEED = 2_000, 0
AT_ONCE = 2_000_000  # draws in memory


def ratio(parts: npt.NDArray[Any], wholes: npt.NDArray[Any]) -> dict[str, float | None]:
    """``value`` = ``sum(parts) / sum(wholes)``, and ``low`` and ``high`` of its 95 % interval.

    Percentile bootstrap (Efron 1979): whole units (documents, answers) are drawn with replacement, as
    values within a unit are not independent. To compare two models, pass the differences of their parts
    per unit (paired bootstrap). A resample with a zero denominator is left out. All values are None if the
    denominator is zero.
    """
    if not wholes.sum():
        return {"value": None, "low": None, "high": None}
    random = np.random.default_rng(SEED)
    ratios: list[float] = []
    many = max(1, AT_ONCE // len(parts))
    for begin in range(0, RESAMPLES, many):
        size = (min(many, RESAMPLES - begin), len(parts))
        drawn = random.integers(0, len(parts), size)
        sums = wholes[drawn].sum(axis=1)
        ratios += (parts[drawn].sum(axis=1)[sums > 0] / sums[sums > 0]).tolist()
    low, high = np.quantile(ratios, [0.025, 0.975])
    return {"value": float(parts.sum() / wholes.sum()), "low": float(low), "high": float(high)}
