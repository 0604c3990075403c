"""Which years of a corpus are believed: one wrong date must not make all other acts look old.

The clock is not asked, so that a corpus is the same whenever it is built. A year is odd if it
is after 2100, or if it and all later ones together are of few documents that lie further beyond
the next earlier year than that one is beyond the median, and more than five years beyond it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

LATEST = 2100
GAP_YEARS = 5
FEW_SHARE = 0.01  # of the dated documents, and one in any case
LEAST_DATED = 10  # of fewer documents nothing can be said


def newest_plausible(years: npt.NDArray[np.int16]) -> int:
    """The corpus's newest year that is not odd; 0 where no year is known. Unknown years are 0."""
    known = years[(years > 0) & (years <= LATEST)].astype(np.int64)
    if not len(known):
        return 0
    distinct, counts = np.unique(known, return_counts=True)
    # of each year: the documents of later years
    later = len(known) - np.cumsum(counts)
    few = later <= max(1, FEW_SHARE * len(known))
    usual = distinct - np.median(known)
    gap = np.append(np.diff(distinct), 0)
    apart = (gap > GAP_YEARS) & (gap > usual)
    cuts = np.flatnonzero(few & apart)
    if len(known) < LEAST_DATED or not len(cuts):
        return int(distinct[-1])
    return int(distinct[cuts[0]])
