"""What a transfer check measures of one arm: optimum by width, drift, trend and regret.

Every figure comes as an estimate and an interval from a bootstrap over seeds, which are resampled
jointly over learning rates and widths, and in which every optimum is found anew.

Noise alone moves a best point about, so it inflates every largest distance and every difference
from a minimum. The lower bounds, which can fail an arm, are therefore taken from what noise does
not push upwards: signed distances per width, and differences between two fixed learning rates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mutransfer.transfer_fit import (
    TAIL,
    Counts,
    Curve,
    Floats,
    Location,
    bounds,
    locate,
    resample,
    slope,
    value_at,
    weighted_mean,
)
from mutransfer.transfer_result import Optimum, power


class Estimate(NamedTuple):
    """A value, `None` if the runs leave it open, and its 95% interval."""

    value: float | None = None
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True, kw_only=True, eq=False)
class Arm:
    """The curves of one arm with every minimum, of the runs as they are and of each resample.

    Attributes:
        curves: One per width, ascending.
        proxy: Index of the width that the optimum is carried over from.
        points: The minimum of each curve.
        behind: Seeds behind each minimum.
        distinct: The distinct resamples, as counts of shape `(distinct, seed)`.
        index: Which of them each bootstrap draw is, shape `(draw,)`.
        drawn: The minima in each distinct resample, per curve.
    """

    curves: Sequence[Curve]
    proxy: int
    points: Sequence[Location]
    behind: Sequence[int]
    distinct: Counts
    index: Counts
    drawn: Sequence[Sequence[Location]]

    @classmethod
    def of(cls, curves: Sequence[Curve], proxy: int, draws: int, seed: int) -> Arm:
        """Finds the minima; a curve with a single seed gets brackets for intervals."""
        everyone = np.ones(len(curves[0].loss), dtype=np.int64)
        distinct, index = resample(len(everyone), draws, seed)
        points, behind, drawn = [], [], []
        for curve in curves:
            count = _seeds_behind(curve, locate(curve.log2_lr, curve.mean(everyone)))
            means = np.vstack([curve.mean(everyone), curve.mean(distinct)])
            found = [locate(curve.log2_lr, mean, bracket=count == 1) for mean in means]
            points.append(found[0])
            behind.append(count)
            drawn.append(found[1:])
        return cls(curves=curves, proxy=proxy, points=points, behind=behind, distinct=distinct,
                   index=index, drawn=drawn)  # fmt: skip

    @property
    def seeds(self) -> int:
        """The fewest seeds behind an interval; widths with one have brackets instead."""
        return min((count for count in self.behind if count > 1), default=1)

    @property
    def low(self) -> Floats:
        """Lower ends of the minima in each bootstrap draw, shape `(draw, width)`."""
        return np.array([[place.low for place in places] for places in self.drawn]).T[self.index]

    @property
    def high(self) -> Floats:
        """Upper ends, likewise."""
        return np.array([[place.high for place in places] for places in self.drawn]).T[self.index]

    @property
    def vertices(self) -> list[float] | None:
        """The optimum of every width, or `None` where one of them has none."""
        found = [point.vertex for point in self.points if point.vertex is not None]
        return found if len(found) == len(self.points) else None


def _seeds_behind(curve: Curve, point: Location) -> int:
    """Seeds with a finite loss at the best grid point and at those neighbours that have one."""
    if point.best is None:
        return int(np.isinf(curve.loss).any(axis=1).sum())
    three = [at for at in (point.left, point.best, point.right) if at is not None]
    ran = np.isfinite(curve.loss).sum(axis=0)
    return int(min(ran[at] for at in three if not curve.diverged[at]))


def optima(arm: Arm) -> list[Optimum]:
    """The optimum at each width, with its interval and, where there is none, what to run."""
    low, high, records = arm.low, arm.high, []
    for at, (curve, point, seeds) in enumerate(
        zip(arm.curves, arm.points, arm.behind, strict=True)
    ):
        best_loss, error, best_log2_lr = math.inf, None, None
        if point.best is not None:
            best_log2_lr = float(curve.log2_lr[point.best])
            losses = curve.loss[np.isfinite(curve.loss[:, point.best]), point.best]
            best_loss = float(losses.mean())
            if len(losses) > 1:
                error = float(losses.std(ddof=1) / math.sqrt(len(losses)))
        least, most = bounds(point.low, point.high, low[:, at], high[:, at], seeds)
        records.append(
            Optimum(width=curve.width, log2_lr=point.vertex, low=least, high=most,
                    interior=point.vertex is not None, note=_advice(curve, point, seeds),
                    best_log2_lr=best_log2_lr, best_loss=best_loss, loss_se=error, seeds=seeds)
        )  # fmt: skip
    return records


def _advice(curve: Curve, point: Location, seeds: int) -> str:
    """Why a curve has no optimum and what to run; empty where nothing is to be said."""
    if point.best is None:
        return f"every learning rate diverged: extend the grid below {power(curve.log2_lr[0])}"
    best = power(curve.log2_lr[point.best])
    if point.vertex is not None:
        return "one seed: the interval is the two neighbours on the grid" if seeds == 1 else ""
    if point.left is None and point.right is None:
        return f"{best} is the only learning rate: extend the grid on both sides"
    if point.left is None:
        return f"best at the lower end of the grid, {best}: extend it downwards"
    if point.right is None:
        return f"best at the upper end of the grid, {best}: extend it upwards"
    cliff = point.right if curve.diverged[point.right] else point.left
    near = power(curve.log2_lr[cliff])
    return f"best at {best}, and {near} diverged: refine the grid between the two"


def drift(arm: Arm) -> Estimate:
    """Largest distance of an optimum from the proxy's, in octaves.

    The upper bound is of the largest of all distances; the lower one is the largest of the
    widths' own, each at a confidence that makes all hold at once (Bonferroni).
    """
    others = [at for at in range(len(arm.points)) if at != arm.proxy]
    if not others:
        return Estimate()
    low, high, home = arm.low, arm.high, arm.points[arm.proxy]
    down, up = low[:, others] - high[:, [arm.proxy]], high[:, others] - low[:, [arm.proxy]]
    tail, nearest, farthest = TAIL / len(others), 0.0, 0.0
    for column, at in enumerate(others):
        smallest, largest = arm.points[at].low - home.high, arm.points[at].high - home.low
        farthest = max(farthest, -smallest, largest)
        least, most = bounds(smallest, largest, down[:, column], up[:, column], arm.seeds, tail)
        nearest = max(nearest, least, -most)
    widest = np.maximum(-down, up).max(axis=1)
    _, top = bounds(farthest, farthest, widest, widest, arm.seeds)
    if (vertices := arm.vertices) is None:
        return Estimate(None, nearest, top)
    return Estimate(max(abs(x - vertices[arm.proxy]) for x in vertices), nearest, top)


def trend(arm: Arm) -> Estimate:
    """Slope of log2 optimum on log2 width over all widths: octaves per doubling."""
    if len(arm.points) < 2:
        return Estimate()
    x = [math.log2(curve.width) for curve in arm.curves]
    ends = np.array([[point.low for point in arm.points], [point.high for point in arm.points]])
    least, most = slope(x, ends[0], ends[1])
    interval = bounds(float(least), float(most), *slope(x, arm.low, arm.high), arm.seeds)
    if (vertices := arm.vertices) is None:
        return Estimate(None, *interval)
    return Estimate(float(slope(x, np.array(vertices), np.array(vertices))[0]), *interval)


def regret(arm: Arm) -> Estimate:
    """Mean over seeds, at the largest width, of loss at the proxy's optimum minus at its own.

    In nats; losses between grid points by `value_at`. The upper bound is from resamples in which
    both optima are found anew; the lower bound holds the two learning rates. Where the largest
    width has no optimum, its best grid point stands in and yields a lower bound only.
    """
    curve, proxy, own = arm.curves[-1], arm.points[arm.proxy], arm.points[-1]
    if proxy is own or proxy.vertex is None or own.best is None:
        return Estimate()
    home = own.vertex if own.vertex is not None else float(curve.log2_lr[own.best])
    paired = np.array([_excess(curve.log2_lr, row, proxy.vertex, home) for row in curve.loss])
    value = float(weighted_mean(np.ones(len(paired), dtype=np.int64), paired))
    if math.isnan(value):
        return Estimate()
    if arm.behind[-1] == 1:
        return Estimate(value if own.vertex is not None else None)
    fixed = weighted_mean(arm.distinct, paired)
    fixed[np.isnan(fixed)] = -math.inf
    anew = np.full(len(arm.distinct), math.inf)
    pairs = zip(curve.mean(arm.distinct), arm.drawn[arm.proxy], arm.drawn[-1], strict=True)
    for at, (mean, there, here) in enumerate(pairs):
        if there.vertex is not None and here.vertex is not None:
            known = ~np.isnan(mean)
            gap = _excess(curve.log2_lr[known], mean[known], there.vertex, here.vertex)
            anew[at] = math.inf if math.isnan(gap) else gap
    least, most = bounds(value, value, fixed[arm.index], anew[arm.index], arm.seeds)
    return Estimate(None, least) if own.vertex is None else Estimate(value, least, most)


def _excess(log2_lr: Floats, loss: Floats, there: float, here: float) -> float:
    return value_at(there, log2_lr, loss) - value_at(here, log2_lr, loss)
