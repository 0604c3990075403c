"""Confidence intervals of figures that are ratios of sums over documents or answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

RESAMPLES, SEED = 2_000, 0
AT_ONCE = 2_000_000  # draws that exist at one time


def ratio(parts: npt.NDArray[Any], wholes: npt.NDArray[Any]) -> dict[str, float | None]:
    """``value`` = ``sum(parts) / sum(wholes)``, and ``low`` and ``high`` of its 95 % interval.

    The units (documents, answers) are drawn with replacement, each with all that it contributes:
    what one document gives is not independent (percentile bootstrap, Efron 1979). Two models are
    compared by the parts' difference, unit by unit: that is the paired bootstrap. A resample
    without anything to divide by is left out. All None where there is nothing to divide by.
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
