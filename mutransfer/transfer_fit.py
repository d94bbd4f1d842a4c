"""The numbers under a transfer check: a curve's minimum, its value in between, its interval.

A minimum that the grid does not pin down is a range, not a number: where the best grid point is
the lowest learning rate tried, all that is known is that the minimum lies below the midpoint
between it and the next. Ranges go through the bootstrap as they are, with infinite ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from mutransfer.student import student_t

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

TAIL = 0.025  # on either side of a 95% interval


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """Losses of one arm at one width.

    Attributes:
        width: The model's width.
        log2_lr: Ascending grid, shape `(lr,)`.
        loss: Shape `(seed, lr)`, in nats: infinite where the run diverged, NaN where none ran.
    """

    width: int
    log2_lr: Floats
    loss: Floats

    @property
    def diverged(self) -> NDArray[np.bool_]:
        """Learning rates at which any seed diverged, shape `(lr,)`."""
        return np.asarray(np.isposinf(self.loss).any(axis=0))

    @cached_property
    def seed_levels(self) -> Floats:
        """What each seed adds to the loss at every learning rate, shape `(seed,)`.

        Zero unless runs are missing: only then would a mean over fewer seeds be moved by which
        seeds they are. Fitted by least squares on loss = seed + learning rate, and zero too
        where the seeds share too few learning rates for that.
        """
        ran = np.isfinite(self.loss) & ~self.diverged
        rows, columns = np.nonzero(ran)
        seeds, rates = np.unique(rows), np.unique(columns)
        levels = np.zeros(len(self.loss))
        if len(rows) == len(seeds) * len(rates):
            return levels
        design = np.hstack([rows[:, None] == seeds, columns[:, None] == rates]).astype(float)
        fit, _, rank, _ = np.linalg.lstsq(design, self.loss[ran], rcond=None)
        if rank == len(seeds) + len(rates) - 1:
            levels[seeds] = fit[: len(seeds)] - fit[: len(seeds)].mean()
        return levels

    def mean(self, counts: Counts) -> Floats:
        """Mean loss at each learning rate: infinite if any seed diverged, NaN if none ran.

        Args:
            counts: How often each seed is taken, shape `(..., seed)`.

        Returns:
            Shape `(..., lr)`.
        """
        mean = weighted_mean(counts, self.loss - self.seed_levels[:, None])
        mean[..., self.diverged] = math.inf
        return mean


def weighted_mean(counts: Counts, values: Floats) -> Floats:
    """Mean of `values` along their first axis, each taken `counts` times and NaN left out.

    Args:
        counts: Shape `(..., seed)`.
        values: Shape `(seed, ...)`; one infinite value that is taken makes the mean infinite.
    """
    finite = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        mean = np.asarray((counts @ np.where(finite, values, 0.0)) / (counts @ finite))
    mean[counts @ np.isposinf(values) > 0] = math.inf
    return mean


@dataclass(frozen=True, kw_only=True)
class Location:
    """Where a curve has its minimum: at `vertex`, or, without one, between `low` and `high`.

    Attributes:
        best: Index of the best grid point; `None` where no learning rate has a finite loss.
        vertex: log2 learning rate of the parabola's minimum; `None` where the best grid point
            lacks a neighbour with a finite loss.
        low: Lower end of what is known; equal to `vertex` where there is one.
        high: Upper end.
        left: Index of the next lower learning rate that was run; `None` at the grid's end.
        right: The same above.
    """

    best: int | None
    vertex: float | None
    low: float
    high: float
    left: int | None = None
    right: int | None = None


def locate(log2_lr: Floats, mean: Floats, *, bracket: bool = False) -> Location:
    """Finds the minimum of one curve.

    With finite neighbours it is the vertex of the parabola through the best point and the two,
    which never leaves the midpoints to them. At the end of the grid the minimum lies anywhere
    beyond the midpoint to the inner neighbour, and next to a diverged neighbour anywhere up to
    that neighbour, since a loss need not be a parabola beside a cliff.

    Args:
        log2_lr: Ascending, shape `(lr,)`.
        mean: Shape `(lr,)`; infinite is diverged and no candidate, NaN is not run and skipped.
        bracket: Whether `low` and `high` are the neighbours instead of the vertex: all that a
            single seed can say.
    """
    known = np.flatnonzero(~np.isnan(mean))
    if not known.size:
        return Location(best=None, vertex=None, low=-math.inf, high=math.inf)
    if np.isinf(mean[known]).all():
        return Location(best=None, vertex=None, low=-math.inf, high=float(log2_lr[known[0]]))
    at = int(np.argmin(mean[known]))
    best = int(known[at])
    left = int(known[at - 1]) if at else None
    right = int(known[at + 1]) if at + 1 < len(known) else None

    def edge(neighbour: int | None, end: float) -> float:
        if neighbour is None:
            return end
        near = float(log2_lr[neighbour])
        if bracket or math.isinf(mean[neighbour]):
            return near
        return (near + float(log2_lr[best])) / 2

    low, high, vertex = edge(left, -math.inf), edge(right, math.inf), None
    if left is not None and right is not None and np.isfinite(mean[[left, right]]).all():
        three = [left, best, right]
        vertex = parabola_vertex(log2_lr[three], mean[three])
        if not bracket:
            low = high = vertex
    return Location(best=best, vertex=vertex, low=low, high=high, left=left, right=right)


def parabola_vertex(x: Floats, y: Floats) -> float:
    """Where the parabola through three points has its minimum; y[0] > y[1] <= y[2]."""
    down, up = (y[0] - y[1]) * (x[2] - x[1]), (y[2] - y[1]) * (x[1] - x[0])
    return float(x[1] + 0.5 * (down * (x[2] - x[1]) - up * (x[1] - x[0])) / (down + up))


def value_at(x: float, log2_lr: Floats, loss: Floats) -> float:
    """Loss at `x` between grid points, on overlapping parabolas.

    Between two grid points it goes over, in proportion to the distance, from the parabola
    through them and the point before to the one through them and the point after; so it is
    continuous, and an optimum that a resample moves across a midpoint moves its loss by no
    jump. At the ends of the grid, and two points from a learning rate that diverged, there is
    one parabola. Beside such a learning rate there is none: there it is the loss of the nearest
    grid point, which is infinite if that is the one that diverged. NaN outside the grid and
    where one of the points was not run.
    """
    if not log2_lr.size or not log2_lr[0] <= x <= log2_lr[-1]:
        return math.nan
    last = len(log2_lr) - 1
    at = max(min(int(np.searchsorted(log2_lr, x, side="right")) - 1, last - 1), 0)
    starts = [
        start
        for start in (at - 1, at)
        if 0 <= start <= last - 2 and not np.isinf(loss[start : start + 3]).any()
    ]
    if not starts:
        return float(loss[np.argmin(np.abs(log2_lr - x))])
    before, after = (
        _parabola(x, log2_lr[start : start + 3], loss[start : start + 3])
        for start in (starts[0], starts[-1])
    )
    share = (x - log2_lr[at]) / (log2_lr[at + 1] - log2_lr[at])
    return float(before + share * (after - before))


def _parabola(x: float, places: Floats, y: Floats) -> float:
    """The parabola through three points, at `x` (Lagrange's form)."""
    a, b, c = places
    weights = (
        (x - b) * (x - c) / ((a - b) * (a - c)),
        (x - a) * (x - c) / ((b - a) * (b - c)),
        (x - a) * (x - b) / ((c - a) * (c - b)),
    )
    return float(np.dot(weights, y))


def resample(seeds: int, draws: int, seed: int) -> tuple[Counts, Counts]:
    """Bootstrap over seeds.

    Returns:
        The distinct resamples as counts, shape `(distinct, seed)`, and which of them each draw
        is, shape `(draws,)`. A handful of seeds has only a handful of distinct resamples.
    """
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws)
    distinct, index = np.unique(counts, axis=0, return_inverse=True)
    return distinct, index.reshape(-1)


def bounds(
    low: float, high: float, lows: Floats, highs: Floats, seeds: int, tail: float = TAIL
) -> tuple[float, float]:
    """Interval of an estimate: bootstrap percentiles, widened for the number of seeds.

    Args:
        low: Lower end of the estimate; the estimate itself unless that is a range.
        high: Upper end of the estimate.
        lows: Lower ends of the bootstrap draws, shape `(draw,)`.
        highs: Upper ends, likewise.
        seeds: Number of seeds behind the estimate, at least 1.
        tail: Probability left out on either side.
    """
    factor = widening(seeds, tail)

    def stretch(centre: float, end: float) -> float:
        apart = math.isfinite(centre) and math.isfinite(end)
        return centre + (end - centre) * factor if apart else end

    return (
        min(low, stretch(low, float(np.quantile(lows, tail, method="lower")))),
        max(high, stretch(high, float(np.quantile(highs, 1 - tail, method="higher")))),
    )


def widening(seeds: int, tail: float = TAIL) -> float:
    """How much too narrow a percentile bootstrap over `seeds` is; 1 for a single seed.

    That of a mean spreads sqrt((n-1)/n) z standard errors where Student's t says t, and others
    fall short by about as much (Hesterberg, 1411.5279, section 3): 2.7 times with 3 seeds.
    """
    if seeds < 2:
        return 1.0
    z, freedom = NormalDist().inv_cdf(1 - tail), seeds - 1
    return student_t(freedom, tail) / z * math.sqrt(seeds / freedom)


def slope(x: Sequence[float], low: Floats, high: Floats) -> tuple[Floats, Floats]:
    """Least-squares slopes on `x` of points known to lie between `low` and `high`.

    Args:
        x: Shape `(point,)`, at least two distinct values.
        low: Shape `(..., point)`; minus infinity where unbounded.
        high: Likewise.

    Returns:
        The smallest and the largest slope that the ranges allow, each of shape `(...)`.
    """
    centred = np.asarray(x, dtype=float) - np.mean(x)
    weights = centred / (centred @ centred)
    used = weights != 0
    weights, low, high = weights[used], low[..., used], high[..., used]
    rising = weights > 0
    smallest = (weights * np.where(rising, low, high)).sum(axis=-1)
    largest = (weights * np.where(rising, high, low)).sum(axis=-1)
    return smallest, largest
