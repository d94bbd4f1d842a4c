"""The next trial of the sampler `surrogate`, and what may be expected of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from optuna.trial import FrozenTrial, TrialState

from sweeps.interrupted import is_interrupted
from sweeps.space import Space, to_unit
from sweeps.surrogate import Floats, expected_improvement, fit

_REACH = 0.35  # of the trust region, from its centre along each axis of the unit cube
_SPREAD, _NEAR = 256, 128  # places that are looked at: all over it, and close to the centre
_CLOSE = 0.08  # standard deviation of those
_DOUBT = 0.5  # standard deviations of the belief that a place's loss is drawn with
_BEND = 0.2  # of the median loss above the best: from there on losses count by their logarithm
_FEW = 8  # complete trials with a rung, below which pruned ones are shifted and not regressed


@dataclass(frozen=True, kw_only=True)
class Observations:
    """What trials have shown.

    Attributes:
        x: Places in the unit cube, shape `(trial, parameter)`.
        y: Losses in nats, shape `(trial,)`.
        extra: Variance of each beyond the noise that all have.
        pending: Places of the trials that are under way, shape `(pending, parameter)`.
    """

    x: Floats
    y: Floats
    extra: Floats
    pending: Floats


def observe(space: Space, trials: Sequence[FrozenTrial]) -> Observations | None:
    """What trials have shown; `None` where fewer than two are complete.

    A trial that was pruned counts with the loss that its last rung foretells, less surely; one
    that diverged as the worst of the others.
    """
    trials = [t for t in trials if not is_interrupted(t) and t.params.keys() >= space.keys()]
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    if len(complete) < 2:
        return None
    rows = [(t, _value(t), 0.0) for t in complete]
    for t in trials:
        if t.state == TrialState.PRUNED and t.last_step is not None:
            found = foretell(complete, t.last_step, t.intermediate_values[t.last_step])
            if found is not None:
                rows.append((t, *found))
    worst = max(y for _, y, _ in rows)
    rows += [(t, worst, 0.0) for t in trials if t.state == TrialState.FAIL]
    places = [to_unit(space, t.params) for t in trials if t.state == TrialState.RUNNING]
    return Observations(
        x=np.stack([to_unit(space, t.params) for t, _, _ in rows]),
        y=np.array([y for _, y, _ in rows]),
        extra=np.array([variance for _, _, variance in rows]),
        pending=np.array(places).reshape(len(places), len(space)),
    )


def foretell(complete: Sequence[FrozenTrial], step: int, loss: float) -> tuple[float, float] | None:
    """The final loss, and its variance, of a trial that had `loss` at `step`.

    By the line through the complete trials' losses at that step and in the end; where they are
    few, by their mean difference. `None` where fewer than two have such a rung.
    """
    pairs = [
        (t.intermediate_values[step], _value(t)) for t in complete if step in t.intermediate_values
    ]
    if len(pairs) < 2:
        return None
    at, final = np.array(pairs).T
    slope = 1.0
    if len(pairs) >= _FEW and at.var() > 0:
        slope = float(np.cov(at, final)[0, 1] / at.var(ddof=1))
    left = final - slope * at
    return float(left.mean() + slope * loss), float(left.var(ddof=1))


def _value(trial: FrozenTrial) -> float:
    assert trial.value is not None
    return trial.value


def warp(y: Floats) -> tuple[Floats, Floats]:
    """Losses on a scale that is logarithmic far above the best, and the scale's slope there.

    How bad the bad half is matters little for where the best are, and would decide the fit.
    """
    best = y.min()
    span = _BEND * float(np.median(y) - best) or 1.0
    return best + span * np.log1p((y - best) / span), 1 / (1 + (y - best) / span)


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """The next trial, and what is expected of it.

    Attributes:
        place: In the unit cube.
        gain: Largest expected improvement on the best so far, noise left out, in nats.
        noise: Standard deviation of a loss by chance, in nats, as the surrogate sees it.
    """

    place: Floats
    gain: float
    noise: float

    @property
    def enough(self) -> bool:
        """Whether another trial is not worth it: it is expected to gain less than half the noise.

        At the noise itself replayed searches ended too early (docs/decisions/0007-search.md).
        """
        return self.gain < self.noise / 2


def propose(
    space: Space,
    trials: Sequence[FrozenTrial],
    rng: np.random.Generator,
    candidates: Floats | None = None,
) -> Proposal | None:
    """The place to try next; `None` while too little is known.

    A trust region around the place that the surrogate believes to be the best so far keeps the
    quadratic from being followed where nothing was tried. Within it a loss is drawn for every
    place, and the lowest is taken: where many are as good for all that is known, as along a valley,
    trials spread out. Trials under way are believed to find what the surrogate expects there.

    Args:
        space: The search space.
        trials: All but the one that is to be drawn.
        rng: For the places that are looked at, and their losses.
        candidates: The only places allowed, shape `(candidate, parameter)`; `None` is all.
    """
    seen = observe(space, trials)
    if seen is None:
        return None
    y, slope = warp(seen.y)
    model = fit(seen.x, y, extra=seen.extra * slope**2)
    if len(seen.pending):
        model = model.believe(seen.pending)
    believed = model.predict(seen.x)[0]
    centre = seen.x[believed.argmin()]
    if candidates is None:
        candidates = _around(centre, rng)
    inside = np.abs(candidates - centre).max(axis=1) <= _REACH
    if inside.any():
        candidates = candidates[inside]
    mean, deviation = model.predict(candidates)
    drawn = mean + _DOUBT * deviation * rng.normal(size=mean.shape)
    gain = expected_improvement(float(believed.min()), mean, deviation)
    return Proposal(place=candidates[drawn.argmin()], gain=float(gain.max()), noise=model.noise)


def _around(centre: Floats, rng: np.random.Generator) -> Floats:
    """Places of the trust region: spread evenly, and close to its centre."""
    engine = torch.quasirandom.SobolEngine(
        len(centre), scramble=True, seed=int(rng.integers(2**31))
    )
    spread = engine.draw(_SPREAD, dtype=torch.float64).numpy()
    low, high = np.maximum(centre - _REACH, 0), np.minimum(centre + _REACH, 1)
    near = np.clip(centre + _CLOSE * rng.normal(size=(_NEAR, len(centre))), low, high)
    return np.concatenate([low + (high - low) * spread, near])
