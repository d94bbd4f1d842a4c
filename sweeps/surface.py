"""What the trials say about the optimum: a quadratic of the loss, fitted where it is low.

The loss is a quadratic in the logarithms of the hyperparameters, plus noise, plus what no quadratic
fits. The noise of a trial is known from the seeds; the misfit is taken to grow with the loss above
the lowest, so that the fit is local without a border; by which share of it, the evidence decides.
The coefficients have a weak prior, and their posterior is normal (Bishop 2006, eq. 3.50, 3.51).
Every draw from it is a surface with an optimum within the ranges: the interval of the optimum is
that of the draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mutransfer.bundle_evidence import Trial
from mutransfer.errors import UserError
from sweeps.space import Space, from_unit, to_unit
from sweeps.surrogate import Floats

DRAWS = 2000
_MISFITS = (0.01, 0.03, 0.1, 0.2, 0.4, 0.8)  # share of the loss above the lowest
_PRIOR = 3.0  # standard deviation of a coefficient, in units of the losses' spread
_SWEEPS = 40  # of coordinate descent
_ENDS = (0.025, 0.975)  # of a 95% interval
_POINTS = 33  # of a line through the optimum


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One hyperparameter at the optimum.

    Attributes:
        optimum: Median over the draws.
        low: Lower end of its 95% interval, within the range that was searched.
        high: Upper end.
        default: What it would be if it were not searched.
        told_from_default: Whether the default lies outside the interval.
        curvature: Second derivative of the loss there, nats per octave squared; its 95% interval
            follows.
        curvature_low: Lower end.
        curvature_high: Upper end.
        octave: Rise of the loss, in nats, by a factor of 2 to the worse side, all else held.
        values: Values over the whole range, for a picture.
        losses: The loss there with all else at the optimum, nats: median over the draws.
        losses_low: Lower end of its 95% interval.
        losses_high: Upper end.
    """

    optimum: float
    low: float
    high: float
    default: float
    told_from_default: bool
    curvature: float
    curvature_low: float
    curvature_high: float
    octave: float
    values: tuple[float, ...]
    losses: tuple[float, ...]
    losses_low: tuple[float, ...]
    losses_high: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Surface:
    """The fit.

    Attributes:
        axes: By hyperparameter.
        loss: At the optimum, nats; its 95% interval follows.
        loss_low: Lower end.
        loss_high: Upper end.
        noise: Standard deviation of a loss over seeds, nats.
        trials: Complete trials that were fitted.
        misfit: Share of the loss above the lowest that no quadratic fits.
    """

    axes: dict[str, Axis]
    loss: float
    loss_low: float
    loss_high: float
    noise: float
    trials: int
    misfit: float


def seed_deviation(trials: Sequence[Trial]) -> float | None:
    """Standard deviation of a loss over seeds, pooled over the trials that have several."""
    squares, freedom = 0.0, 0
    for trial in trials:
        losses = list(trial.losses.values())
        if len(losses) > 1:
            squares += float(np.var(losses)) * len(losses)
            freedom += len(losses) - 1
    return math.sqrt(squares / freedom) if freedom else None


def fit_surface(space: Space, trials: Sequence[Trial], defaults: Mapping[str, float]) -> Surface:
    """Fits the surface.

    Args:
        space: What was searched.
        trials: The trials; those that are complete count.
        defaults: By hyperparameter.

    Raises:
        UserError: No trial has two seeds, so that the noise is unknown, or fewer trials are
            complete than a quadratic without mixed terms has coefficients.
    """
    complete = [t for t in trials if t.state == "COMPLETE" and t.mean_loss is not None]
    noise, least = seed_deviation(complete), 2 * len(space) + 1
    if noise is None:
        raise UserError("the noise is not known, as no trial has more than one seed", where="sweep",
                        cure="Set sweep.confirm_seeds to 2 at least.")  # fmt: skip
    if len(complete) < least:
        raise UserError("too few complete trials for a quadratic", where="sweep",
                        got=len(complete), expected=f"at least {least}",
                        cure="Run more trials.")  # fmt: skip
    x = np.stack([to_unit(space, t.params) for t in complete])
    y = np.array([t.mean_loss for t in complete])
    above = y - y.min()
    known, features = noise**2 / np.array([len(t.losses) for t in complete]), _features(x)
    fits = {share: _posterior(features, y, known + (share * above) ** 2) for share in _MISFITS}
    misfit = max(fits, key=lambda share: fits[share][2])
    mean, factor, _ = fits[misfit]
    draws = mean + np.random.default_rng(0).normal(size=(DRAWS, len(mean))) @ factor.T
    places = _lowest(draws, x[y.argmin()])
    octaves = np.log2([d.high / d.low for d in space.values()])
    curvatures = np.stack([2 * draws[:, k] for k in _squares(len(space))]) / octaves[:, None] ** 2
    centre = np.median(places, axis=0)
    losses = draws @ _features(centre[None])[0]  # each draw's own lowest would be too low
    middle, ends = from_unit(space, centre), np.quantile(places, _ENDS, axis=0)
    low, high = (from_unit(space, end) for end in ends)
    axes = {}
    for k, name in enumerate(space):
        bottom, top = np.quantile(curvatures[k], _ENDS)
        line = np.tile(centre, (_POINTS, 1))
        line[:, k] = np.linspace(0, 1, _POINTS)
        losses_low, median, losses_high = np.quantile(
            _features(line) @ draws.T, [_ENDS[0], 0.5, _ENDS[1]], axis=1
        )
        axes[name] = Axis(
            optimum=middle[name],
            low=low[name],
            high=high[name],
            default=defaults[name],
            told_from_default=not low[name] <= defaults[name] <= high[name],
            curvature=float(np.median(curvatures[k])),
            curvature_low=float(bottom),
            curvature_high=float(top),
            octave=_rise(mean, centre, k, 1 / octaves[k]),
            values=tuple(from_unit(space, place)[name] for place in line),
            losses=tuple(median.tolist()),
            losses_low=tuple(losses_low.tolist()),
            losses_high=tuple(losses_high.tolist()),
        )
    return Surface(
        axes=axes,
        loss=float(np.median(losses)),
        loss_low=float(np.quantile(losses, _ENDS[0])),
        loss_high=float(np.quantile(losses, _ENDS[1])),
        noise=noise,
        trials=len(complete),
        misfit=misfit,
    )


def _features(x: Floats) -> Floats:
    """Constant, linear, and all products of two coordinates; shape `(n, feature)`."""
    i, j = np.triu_indices(x.shape[1])
    return np.concatenate([np.ones((len(x), 1)), x, x[:, i] * x[:, j]], axis=1)


def _squares(dimensions: int) -> list[int]:
    """Where the squares are among the features."""
    i, j = np.triu_indices(dimensions)
    return [1 + dimensions + int(k) for k in np.flatnonzero(i == j)]


def _posterior(features: Floats, y: Floats, expected: Floats) -> tuple[Floats, Floats, float]:
    """Mean of the coefficients, a factor of their covariance, and the logarithm of the evidence.

    Args:
        features: Shape `(trial, feature)`.
        y: Losses.
        expected: Variance of each.
    """
    weight = 1 / np.sqrt(expected)
    spread = float(y.std()) or 1.0
    prior = np.full(features.shape[1], 1 / (_PRIOR * spread))
    prior[0] = 0.0  # the constant is free
    design = np.concatenate([features * weight[:, None], np.diag(prior)])
    target = np.concatenate([(y - y.mean()) * weight, np.zeros(len(prior))])
    q, r = np.linalg.qr(design)
    mean = np.linalg.solve(r, q.T @ target)
    left = float(((design @ mean - target) ** 2).sum())
    evidence = float(np.log(weight).sum() - np.log(np.abs(r.diagonal())).sum()) - left / 2
    mean[0] += y.mean()
    return mean, np.linalg.inv(r), evidence


def _lowest(draws: Floats, start: Floats) -> Floats:
    """Where each drawn quadratic is lowest in the unit cube, by coordinate descent from `start`.

    Shape `(draw, parameter)`. Where a draw curves down along a coordinate, the lower end is taken.
    """
    dimensions = len(start)
    i, j = np.triu_indices(dimensions)
    hessian = np.zeros((len(draws), dimensions, dimensions))
    hessian[:, i, j] += draws[:, 1 + dimensions :]
    hessian[:, j, i] += draws[:, 1 + dimensions :]
    linear, x = draws[:, 1 : 1 + dimensions], np.tile(start, (len(draws), 1))
    for _ in range(_SWEEPS):
        for k in range(dimensions):
            curvature = hessian[:, k, k]
            slope = linear[:, k] + (hessian[:, k] * x).sum(axis=1) - curvature * x[:, k]
            inside = np.clip(-slope / np.where(curvature > 0, curvature, 1.0), 0.0, 1.0)
            x[:, k] = np.where(curvature > 0, inside, (slope + curvature / 2 < 0).astype(float))
    return x


def _rise(mean: Floats, centre: Floats, k: int, step: float) -> float:
    """Rise of the mean surface by `step` along coordinate `k`, to the side where it rises more."""
    moved = np.tile(centre, (3, 1))
    moved[1, k] += step
    moved[2, k] -= step
    values = _features(moved) @ mean
    return float(values[1:].max() - values[0])
