"""Student's t, for every interval that rests on a few seeds."""

from __future__ import annotations

import math
from statistics import NormalDist


def student_t(degrees: int, tail: float = 0.025) -> float:
    """The quantile that leaves `tail` above it; infinite without degrees of freedom.

    Closed for 1 and 2 degrees, else the expansion in 1/degrees of Abramowitz and Stegun 26.7.5:
    for a tail of 2.5% it is off by 0.1% at 3 and by less with more.
    """
    if degrees < 1:
        return math.inf
    if degrees == 1:
        return math.tan((0.5 - tail) * math.pi)
    if degrees == 2:
        return (1 - 2 * tail) * math.sqrt(2 / (4 * tail * (1 - tail)))
    z, n = NormalDist().inv_cdf(1 - tail), degrees
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * n**4)
    )
