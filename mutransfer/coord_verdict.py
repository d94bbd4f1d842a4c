"""The verdict of a coordinate check: slopes with intervals, held against what is right.

A slope is fitted by least squares of log2 value on log2 width over all widths and seeds, and
has a 95% interval by Student's t. It is fitted again without the smallest width: an effect
that fades when that width is left out is a small model's, not a law.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from mutransfer.coord_depth import LOSS_SHIFTS, depth_expectation
from mutransfer.coord_expect import (
    UNJUDGED,
    Axis,
    Expectation,
    Ladder,
    Thresholds,
    expectation,
)
from mutransfer.coord_late import LEARNED, UNTOLD, late_expectation
from mutransfer.coord_overflow import OVERFLOWS, PARTS, excess_over_smallest
from mutransfer.coord_text import SATURATED, sentence
from mutransfer.errors import UserError
from mutransfer.student import student_t
from mutransfer.verdict import Verdict

INITIAL = frozenset(
    {"activation", "residual", "branch", "attention_logits", "logits", "loss", "weight"}
)
"""Kinds that are judged at t = 0."""

SHOWN = frozenset({"update_ratio", "alignment", *(f"amax_{part}" for part in PARTS)})
"""Kinds that are measured and shown and have no right slope of their own."""

REASONS = {
    "later_update": "Muon sets the operator norm of its steps, which is judged, not their entries",
    "loss": LOSS_SHIFTS,
}
"""Why else something is not judged, by kind."""

DIVERGED = "the run diverges"
DEAD = "it is zero at some widths only"
STILL = "nothing moves it: frozen, in no optimizer group, or without a gradient"
UNSURE = "too noisy to tell; more seeds would"
DAMPED = (
    "eps is not small against Adam's sqrt(v): it is too large, or it is not scaled down with the "
    "width as the gradients are"
)
LOST = (
    "the output multiplier is right at init and lost after the first step: weights and their "
    "updates are right, so it is the forward pass that changes"
)
POOLED = 3
"""Changes are judged on their geometric mean over the last so many measured steps."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A slope of log2 value on log2 width, the ends of its 95% interval, and the refit."""

    slope: float
    low: float
    high: float
    slope_wide: float


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """One measured quantity and the verdict on it.

    Attributes:
        kind, name: What was measured, of which pattern; see `coord_measure`.
        t: Last step that entered.
        times: All steps that entered, as a geometric mean.
        slope: Exponent of the width; `None` where there is none, as of zeros and infinities.
        low, high: Its 95% interval.
        slope_wide: The exponent without the smallest width.
        expected: The right exponent.
        two_sided: Whether too small a slope is judged as well.
        warn, fail: Deviations upwards beyond which the slope warns and fails.
        warn_below, fail_below: The same downwards, `None` where not judged.
        verdict: PASS, WARN or FAIL.
        cause: What a deviation means; empty for a PASS.
        sentence: The verdict in plain words.
        axis: What the slope is an exponent of.
        trained: Steps that the models were trained for before t = 0.
    """

    kind: str
    name: str
    t: int
    times: tuple[int, ...]
    slope: float | None
    low: float | None
    high: float | None
    slope_wide: float | None
    expected: float
    two_sided: bool
    warn: float
    fail: float
    warn_below: float | None
    fail_below: float | None
    verdict: Verdict
    cause: str
    sentence: str
    axis: Axis = "width"
    trained: int = 0


@dataclass(frozen=True, kw_only=True)
class Unjudged:
    """A quantity that is measured and shown but has no right or wrong here."""

    kind: str
    name: str
    reason: str


def fit_slope(widths: Sequence[float], values: Sequence[float]) -> Fit:
    """The slope of log2 `values` on log2 `widths`, pointwise pairs, all positive and finite.

    Raises:
        UserError: There are fewer than three widths.
    """
    x, y = np.log2(np.asarray(widths, float)), np.log2(np.asarray(values, float))
    if len(set(x.tolist())) < 3:
        raise UserError("too few widths for a slope and its error", where="widths",
                        got=sorted(set(widths)), expected="at least 3")  # fmt: skip
    dx = x - x.mean()
    slope = float(dx @ y / (dx @ dx))
    residual = y - y.mean() - slope * dx
    degrees = len(x) - 2
    error = math.sqrt(float(residual @ residual) / degrees / float(dx @ dx))
    half = student_t(degrees) * error
    wide = x > x.min()
    wx = x[wide] - x[wide].mean()
    return Fit(slope=slope, low=slope - half, high=slope + half,
               slope_wide=float(wx @ y[wide] / (wx @ wx)))  # fmt: skip


def decide(fit: Fit, right: Expectation) -> tuple[Verdict, bool]:
    """The verdict on a slope, and whether it is only that the interval is too wide to tell.

    FAIL: off by more than `fail`, surely by more than `warn`, and by more than `warn` in wide
    models too. WARN: off by more than `warn`, surely off, and by half of that in wide models
    too; or off by more than `fail` and not sure; or an interval wider than `fail` either way.
    """
    deviation = fit.slope - right.slope
    upwards = deviation > 0
    tolerance = right.above if upwards else right.below
    half = (fit.high - fit.low) / 2
    if tolerance is None:
        return ("WARN", True) if fit.high - right.slope > right.above.fail else ("PASS", False)
    sign = 1 if upwards else -1
    surely = min(sign * (fit.low - right.slope), sign * (fit.high - right.slope))
    wide, size = sign * (fit.slope_wide - right.slope), abs(deviation)
    if size > tolerance.fail and surely > tolerance.warn and wide > tolerance.warn:
        return "FAIL", False
    if size > tolerance.warn and surely > 0 and wide > tolerance.warn / 2:
        return "WARN", False
    if size > tolerance.fail and wide > tolerance.warn / 2:
        return "WARN", False
    return ("WARN", True) if half > tolerance.fail else ("PASS", False)


def judge(
    frame: pd.DataFrame, ladder: Ladder, limits: Thresholds
) -> tuple[tuple[Quantity, ...], tuple[Unjudged, ...]]:
    """Verdicts on everything in the frame that has a right slope, and why the rest has none.

    Args:
        frame: Columns kind, name, t, width, seed, value.
        ladder: The models of the check.
        limits: The tolerances.
    """
    quantities: list[Quantity] = []
    unjudged: list[Unjudged] = []
    for key, group in frame.groupby(["kind", "name"], sort=False):
        kind, name = (str(part) for part in key)
        right = _right(kind, name, ladder, limits)
        points = group.pivot(index=["width", "seed"], columns="t", values="value")
        if kind == "eps_share":  # infinite as long as all gradients are zero
            points = points[np.isfinite(points)].dropna(axis=1)
            if points.empty:
                continue
        if right is None:
            if kind not in SHOWN:
                learned = ladder.trained and kind in UNTOLD
                reason = LEARNED if learned else UNJUDGED.get((kind, name)) or REASONS[kind]
                unjudged.append(Unjudged(kind=kind, name=name, reason=reason))
        elif kind in INITIAL and bool((points[0] == 0).all()):
            unjudged.append(Unjudged(kind=kind, name=name, reason="zero at init, by choice"))
        else:
            quantities.append(_quantity(kind, name, points, right, ladder))
    return _explained(quantities), tuple(unjudged)


def _right(kind: str, name: str, ladder: Ladder, limits: Thresholds) -> Expectation | None:
    right = _right_of_fresh(kind, name, ladder, limits)
    return late_expectation(kind, name, ladder, limits, right) if ladder.trained else right


def _right_of_fresh(kind: str, name: str, ladder: Ladder, limits: Thresholds) -> Expectation | None:
    if kind == "eps_share":
        return Expectation(slope=0.0, above=limits.update, below=None, cause_above=DAMPED)
    if kind.startswith("overflow"):
        cause = OVERFLOWS.format(ladder.axis)
        return Expectation(slope=0.0, above=limits.overflow, below=None, cause_above=cause)
    over = depth_expectation if ladder.axis == "depth" else expectation
    return over(kind, name, ladder, limits)


def _explained(quantities: Sequence[Quantity]) -> tuple[Quantity, ...]:
    """The quantities, with causes that only several of them together give away.

    Logits whose change grows although all is right at init, and all updates are, are computed
    otherwise than at init. Where logits grow at init, updates that fall by less than a half
    power of the width, the least that a wrongly scaled learning rate is off, do so because the
    softmax has no gradient left.
    """
    failed = [q for q in quantities if q.verdict == "FAIL"]
    right = not any(not q.kind.startswith("delta_") for q in failed)
    grown = any(q.kind == "logits" and _off(q) > 0 for q in failed)
    explained = []
    for q in quantities:
        cause = q.cause
        if right and q.kind == "delta_logits" and q.verdict == "FAIL" and _off(q) > 0:
            cause = LOST
        if grown and "update" in q.kind and q.verdict != "PASS" and -0.5 < _off(q) < 0:
            cause = SATURATED
        new = replace(q, cause=cause)
        explained.append(replace(new, sentence=sentence([new])))
    return tuple(explained)


def _off(quantity: Quantity) -> float:
    return 0.0 if quantity.slope is None else quantity.slope - quantity.expected


def damping(points: pd.DataFrame) -> Fit:
    """The share of a step that eps takes away: |d log step / d log eps| = eps/(sqrt(v) + eps).

    Args:
        points: eps/sqrt(v), a row per width and seed.
    """
    return largest((points / (1 + points)).mean(axis=1))


def largest(shares: pd.Series) -> Fit:
    """A share by width and seed, at the width where its mean is largest.

    The interval is from the smallest to the largest over seeds; `slope_wide` is the largest
    without the smallest width.
    """
    by_width = shares.groupby(level="width")
    mean = by_width.mean().to_numpy()
    worst = int(mean.argmax())
    return Fit(
        slope=float(mean[worst]),
        low=float(by_width.min().iloc[worst]),
        high=float(by_width.max().iloc[worst]),
        slope_wide=float(mean[1:].max()),
    )


def _fit(kind: str, points: pd.DataFrame) -> Fit:
    """What is held against the right value: a share, or else a slope."""
    if kind.startswith("overflow"):
        return largest(excess_over_smallest(points))
    if kind == "eps_share":
        return damping(points)
    widths = [float(width) for width, _ in points.index]
    return fit_slope(widths, np.exp2(np.log2(points).mean(axis=1)).tolist())


def _quantity(
    kind: str, name: str, points: pd.DataFrame, right: Expectation, ladder: Ladder
) -> Quantity:
    """The verdict on the values of one quantity: one row per width and seed, a column per t."""
    axis, times = ladder.axis, _times(kind, points)
    chosen = points[list(times)]
    fit, cause = None, ""
    verdict: Verdict = "FAIL"
    odd = chosen[~(np.isfinite(chosen) & (chosen > 0)).all(axis=1)]
    overflow = kind.startswith("overflow")  # where it is zero, all is well
    if len(odd) and not overflow:
        finite = bool(np.isfinite(odd).all(axis=None))
        where = ", ".join(str(width) for width in sorted(set(odd.index.get_level_values("width"))))
        cause = f"{(STILL if times[0] else DEAD) if finite else DIVERGED} ({axis} {where})"
    else:
        fit = _fit(kind, chosen)
        verdict, unsure = decide(fit, right)
        if verdict != "PASS":
            upwards = fit.slope > right.slope
            cause = UNSURE if unsure else right.cause_above if upwards else right.cause_below
            if overflow:
                mean = excess_over_smallest(chosen).groupby(level="width").mean()
                cause += f" ({axis} {mean.idxmax()})"
    found = Quantity(
        kind=kind,
        name=name,
        t=times[-1],
        times=times,
        slope=fit.slope if fit else None,
        low=fit.low if fit else None,
        high=fit.high if fit else None,
        slope_wide=fit.slope_wide if fit else None,
        expected=right.slope,
        two_sided=right.below is not None,
        warn=right.above.warn,
        fail=right.above.fail,
        warn_below=right.below.warn if right.below else None,
        fail_below=right.below.fail if right.below else None,
        verdict=verdict,
        cause=cause,
        sentence="",
        axis=axis,
        trained=ladder.trained,
    )
    return replace(found, sentence=sentence([found]))


def _times(kind: str, points: pd.DataFrame) -> tuple[int, ...]:
    """The steps to judge at: 0; all; the first that moves a weight at all; or the last ones.

    Zero-initialized projections keep the gradients before them at zero for a step or two.
    """
    times = [int(t) for t in points.columns]
    if kind in INITIAL:
        return (0,)
    if kind.startswith("overflow"):
        return tuple(times)
    alive = [t for t in times if t and bool((points[t] != 0).all())] or times[-1:]
    if kind == "update":
        return (alive[0],)
    return tuple([t for t in alive if t > 1][-POOLED:] or alive[-1:])
