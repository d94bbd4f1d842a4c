"""The surface: closed forms, coverage of its interval, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mutransfer.bundle_evidence import Trial
from mutransfer.errors import UserError
from sweeps.experiment import Range
from sweeps.space import from_unit, sobol, space_of
from sweeps.surface import _features, _lowest, fit_surface, seed_deviation

SPACE = space_of({name: Range(low=1.0, high=2.0**8) for name in "abc"})
MIDDLE = from_unit(SPACE, np.full(3, 0.5))
WEIGHTS = np.array([3.0, 1.0, 0.0])


def trials(seed: int, *, best: Any = (0.4, 0.6, 0.5), noise: float = 0.01) -> list[Trial]:
    """40 trials of a bowl whose last coordinate does nothing, the best 4 over 3 seeds."""
    rng, design = np.random.default_rng(seed), sobol(3, seed)
    points = [design(index) for index in range(40)]
    true = [2.3 + float(WEIGHTS @ (x - best) ** 2) for x in points]
    losses = [{0: loss + noise * rng.normal()} for loss in true]
    for i in sorted(range(40), key=lambda i: losses[i][0])[:4]:
        losses[i] |= {s: true[i] + noise * rng.normal() for s in (1, 2)}
    return [Trial.of(i, "COMPLETE", from_unit(SPACE, points[i]), losses[i]) for i in range(40)]


def test_the_interval_holds_the_optimum_as_often_as_it_says() -> None:
    hits = 0
    for seed in range(60):
        surface = fit_surface(SPACE, trials(seed), MIDDLE)
        for name, u in (("a", 0.4), ("b", 0.6)):
            axis = surface.axes[name]
            hits += axis.low <= 2 ** (8 * u) <= axis.high
    assert 0.88 * 120 <= hits <= 0.99 * 120


def test_what_matters_and_what_does_not() -> None:
    surface = fit_surface(SPACE, trials(0), MIDDLE)
    a, b, c = (surface.axes[name] for name in "abc")
    assert a.told_from_default
    assert b.told_from_default
    assert not c.told_from_default
    assert c.high / c.low > 30
    assert a.curvature == pytest.approx(2 * 3 / 8**2, rel=0.1)
    assert a.octave == pytest.approx(3 / 8**2, rel=0.2)
    assert a.curvature_low < a.curvature < a.curvature_high
    assert surface.loss == pytest.approx(2.3, abs=0.01)
    assert surface.loss_low < surface.loss < surface.loss_high
    assert (a.values[0], a.values[-1]) == pytest.approx((1.0, 256.0))
    assert min(a.losses) == pytest.approx(surface.loss, abs=0.01)


def test_an_optimum_beyond_the_range_is_at_its_end() -> None:
    surface = fit_surface(SPACE, trials(1, best=(-0.3, 0.6, 0.5)), MIDDLE)
    assert surface.axes["a"].optimum == 1.0
    assert surface.axes["a"].high < 1.5


def test_a_wall_far_from_the_optimum_does_not_move_it() -> None:
    given = trials(2)
    for i, t in enumerate(given):
        if t.params["a"] > 2**6:
            losses = {int(s): loss + 3.0 for s, loss in t.losses.items()}
            given[i] = Trial.of(t.number, "COMPLETE", t.params, losses)
    surface = fit_surface(SPACE, given, MIDDLE)
    assert surface.axes["a"].low <= 2 ** (8 * 0.4) <= surface.axes["a"].high


def test_descent_finds_the_lowest_point_of_the_cube() -> None:
    rng = np.random.default_rng(3)
    root = rng.normal(size=(20, 3, 3))
    hessian = root @ root.transpose(0, 2, 1) + 0.1 * np.eye(3)
    i, j = np.triu_indices(3)
    products = hessian[:, i, j] * np.where(i == j, 0.5, 1.0)
    draws = np.concatenate([np.zeros((20, 1)), rng.normal(size=(20, 3)), products], axis=1)
    found = _lowest(draws, np.full(3, 0.5))
    assert found.min() >= 0
    assert found.max() <= 1
    values = (draws * _features(found)).sum(axis=1)
    everywhere = _features(rng.random((20_000, 3))) @ draws.T
    assert (values <= everywhere.min(axis=0) + 1e-4).all()


def test_noise_is_pooled_over_trials() -> None:
    given = [
        Trial.of(0, "COMPLETE", {}, {0: 1.0, 1: 3.0}),
        Trial.of(1, "COMPLETE", {}, {0: 5.0, 1: 5.0, 2: 8.0}),
        Trial.of(2, "COMPLETE", {}, {0: 9.0}),
    ]
    assert seed_deviation(given) == pytest.approx(np.sqrt((2 + 6) / 3))
    assert seed_deviation(given[2:]) is None


def test_too_little_to_fit_is_refused() -> None:
    given = trials(4)
    with pytest.raises(UserError, match="no trial has more than one seed"):
        fit_surface(SPACE, [t for t in given if len(t.losses) == 1], MIDDLE)
    few = sorted(given, key=lambda t: -len(t.losses))[:6]
    with pytest.raises(UserError, match="got 6; expected at least 7"):
        fit_surface(SPACE, few, MIDDLE)
