"""The newest plausible year of a corpus: one wrong date must not make all other documents look old.

The clock is not used, so a corpus is the same whenever it is built. A year is implausible after 2100.
It is also implausible if few documents have it or a later one, and the gap to the next earlier year is
more than five years and more than that year's distance from the median.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

LATEST = 2100
GAP_YEARS = 5
FEW_SHARE = 0.01  # of the dated documents, and at least one
LEAST_DATED = 10  # fewer documents show no outlier


def newest_plausible(years: npt.NDArray[np.int16]) -> int:
    """The corpus's newest plausible year; 0 if none is known. Unknown years are 0."""
    known = years[(years > 0) & (years <= LATEST)].astype(np.int64)
    if not len(known):
        return 0
    distinct, counts = np.unique(known, return_counts=True)
    # for each year, the number of documents of later years
    later = len(known) - np.cumsum(counts)
    few = later <= max(1, FEW_SHARE * len(known))
    usual = distinct - np.median(known)
    gap = np.append(np.diff(distinct), 0)
    apart = (gap > GAP_YEARS) & (gap > usual)
    cuts = np.flatnonzero(few & apart)
    if len(known) < LEAST_DATED or not len(cuts):
        return int(distinct[-1])
    return int(distinct[cuts[0]])
