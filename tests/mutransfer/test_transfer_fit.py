"""The numbers under a transfer check, against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mutransfer.transfer_fit import (
    Curve,
    bounds,
    locate,
    parabola_vertex,
    resample,
    slope,
    value_at,
    weighted_mean,
    widening,
)

INF, NAN = math.inf, math.nan
GRID = np.arange(-9.0, -3.0)  # -9 … -4


def curve(loss: list[list[float]]) -> Curve:
    return Curve(width=32, log2_lr=np.arange(len(loss[0]), dtype=float), loss=np.array(loss))


@pytest.mark.parametrize("x", [(-7.0, -6.0, -5.0), (-7.0, -6.5, -5.0), (-10.0, -6.0, -5.9)])
@pytest.mark.parametrize("minimum", [-6.4, -6.0, -5.96])
def test_vertex_of_a_parabola_is_exact_on_any_spacing(
    x: tuple[float, float, float], minimum: float
) -> None:
    points = np.array(x)
    assert parabola_vertex(points, 3 + 0.1 * (points - minimum) ** 2) == pytest.approx(minimum)


def test_interior_minimum_is_a_point() -> None:
    place = locate(GRID, (GRID + 6.3) ** 2)
    assert place.best == 3
    assert place.vertex == place.low == place.high == pytest.approx(-6.3)


def test_vertex_never_leaves_the_midpoints_to_its_neighbours() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        x = np.cumsum(rng.uniform(0.1, 3, size=3))
        y = np.array([rng.exponential() + 1e-6, 0.0, rng.exponential()])
        assert (x[0] + x[1]) / 2 < parabola_vertex(x, y) <= (x[1] + x[2]) / 2 + 1e-12


@pytest.mark.parametrize(
    ("mean", "low", "high"),
    [
        ([1, 2, 3, 4, 5, 6], -INF, -8.5),
        ([6, 5, 4, 3, 2, 1], -4.5, INF),
        ([3, 2, 1, INF, INF, INF], -7.5, -6),  # up to the cliff, not half-way
        ([INF, 1, 2, 3, 4, 5], -9, -7.5),
        ([INF, INF, 1, INF, INF, INF], -8, -6),
        ([INF] * 6, -INF, -9),
        ([NAN] * 6, -INF, INF),
        ([NAN, 1, NAN, 2, 3, NAN], -INF, -7),  # what was not run is no neighbour
        ([NAN, NAN, 1, NAN, NAN, NAN], -INF, INF),
    ],
)
def test_without_two_finite_neighbours_the_minimum_is_a_range(
    mean: list[float], low: float, high: float
) -> None:
    place = locate(GRID, np.array(mean, dtype=float))
    assert place.vertex is None
    assert (place.low, place.high) == (low, high)


def test_missing_neighbour_is_skipped() -> None:
    mean = (GRID + 6.3) ** 2
    mean[2] = NAN
    place = locate(GRID, mean)
    assert (place.left, place.best, place.right) == (1, 3, 4)
    assert place.vertex == pytest.approx(-6.3)


def test_a_single_seed_gets_the_bracket() -> None:
    place = locate(GRID, (GRID + 6.3) ** 2, bracket=True)
    assert place.vertex == pytest.approx(-6.3)
    assert (place.low, place.high) == (-7, -5)
    assert locate(GRID, GRID, bracket=True).high == -8


@pytest.mark.parametrize("x", [-9.0, -8.7, -6.5, -4.2, -4.0])
def test_value_between_grid_points_is_exact_for_a_parabola(x: float) -> None:
    assert value_at(x, GRID, 2 + 0.3 * (GRID + 6.1) ** 2) == pytest.approx(2 + 0.3 * (x + 6.1) ** 2)


def test_value_outside_the_grid_or_where_nothing_ran_is_unknown() -> None:
    loss = GRID**2
    assert math.isnan(value_at(-9.01, GRID, loss))
    assert math.isnan(value_at(-3.99, GRID, loss))
    assert math.isnan(value_at(-6, GRID, np.where(GRID == -5, NAN, loss)))
    assert math.isnan(value_at(-6, GRID[:0], loss[:0]))


@pytest.mark.parametrize(
    ("x", "expected"), [(-7.6, 4 - 0.4), (-7.4, 4 - 0.6), (-6.6, 3.0), (-6.4, INF), (-5.0, INF)]
)
def test_value_beside_a_cliff_is_that_of_the_nearest_grid_point(x: float, expected: float) -> None:
    loss = np.array([5.0, 4.0, 3.0, INF, INF, INF])  # a line up to -7
    assert value_at(x, GRID, loss) == pytest.approx(expected)


def test_value_is_continuous_across_grid_points_and_midpoints() -> None:
    loss = np.array([3.0, 2.2, 2.0, 2.1, 2.9, 3.4])  # no parabola
    for x in [*GRID[1:-1], *(GRID[:-1] + 0.5)]:
        below, above = value_at(x - 1e-9, GRID, loss), value_at(x + 1e-9, GRID, loss)
        assert below == pytest.approx(above, abs=1e-7)
    assert [value_at(x, GRID, loss) for x in GRID] == pytest.approx(loss)


def test_mean_is_that_of_the_repeated_seeds() -> None:
    rng = np.random.default_rng(1)
    losses, counts = rng.normal(size=(4, 3)), np.array([[2, 0, 1, 1], [0, 0, 0, 4]])
    expected = [losses[[0, 0, 2, 3]].mean(axis=0), losses[3]]
    assert weighted_mean(counts, losses) == pytest.approx(np.array(expected))


def test_one_diverged_seed_makes_the_mean_infinite_and_a_missing_one_is_left_out() -> None:
    counts = np.array([[1, 1], [0, 2], [2, 0]])
    mean = weighted_mean(counts, np.array([[1.0, INF], [3.0, 2.0]]))
    assert mean.tolist() == [[2, INF], [3, 2], [1, INF]]
    mean = weighted_mean(counts, np.array([[NAN], [3.0]]))
    assert mean[:2, 0].tolist() == [3, 3]
    assert math.isnan(mean[2, 0])


def test_a_learning_rate_at_which_a_seed_diverged_is_out_of_every_resample() -> None:
    mean = curve([[3.0, INF], [2.0, 1.0]]).mean(np.array([[1, 1], [0, 2]]))
    assert mean.tolist() == [[2.5, INF], [2.0, INF]]


def test_missing_runs_do_not_tilt_the_curve() -> None:
    seeds, rates = np.array([[0.0], [0.5], [-0.2]]), np.array([3.0, 1.0, 2.0, 4.0])
    loss = seeds + rates
    loss[1, 1] = loss[2, 3] = NAN
    mean = curve(loss.tolist()).mean(np.ones(3, dtype=np.int64))
    assert np.diff(mean) == pytest.approx(np.diff(rates))


def test_seeds_without_a_common_learning_rate_are_not_levelled() -> None:
    sparse = curve([[1.0, NAN, 3.0], [NAN, 2.0, NAN]])
    assert sparse.seed_levels.tolist() == [0, 0]
    assert sparse.mean(np.ones(2, dtype=np.int64)).tolist() == [1, 2, 3]


def test_resamples_are_distinct_and_keep_the_number_of_seeds() -> None:
    distinct, index = resample(3, 500, 0)
    assert len(np.unique(distinct, axis=0)) == len(distinct) == 10  # multisets of 3 from 3
    assert distinct.sum(axis=1).tolist() == [3] * 10
    assert index.shape == (500,)
    assert set(index.tolist()) == set(range(10))


@pytest.mark.parametrize(
    ("seeds", "tail", "student", "normal", "error"),
    [
        (2, 0.025, 12.7062, 1.95996, 0.001),
        (3, 0.025, 4.3027, 1.95996, 0.001),
        (4, 0.025, 3.1824, 1.95996, 0.002),
        (5, 0.025, 2.7764, 1.95996, 0.001),
        (10, 0.025, 2.2622, 1.95996, 0.001),
        (10, 0.05, 1.8331, 1.64485, 0.001),
    ],
)
def test_widening_turns_a_percentile_bootstrap_into_students_t(
    seeds: int, tail: float, student: float, normal: float, error: float
) -> None:
    expected = student / normal * math.sqrt(seeds / (seeds - 1))
    assert widening(seeds, tail) == pytest.approx(expected, rel=error)


def test_a_single_seed_has_no_spread_to_widen() -> None:
    assert widening(1) == 1


def test_bounds_hold_the_estimate_and_keep_infinite_ends() -> None:
    draws = np.full(100, 5.0)
    assert bounds(1.0, 1.0, draws, draws, 4) == (1.0, pytest.approx(1 + 4 * widening(4)))
    rare, often = np.zeros(1000), np.zeros(1000)
    rare[:20], often[:30] = -INF, -INF
    assert bounds(0.0, 0.0, rare, rare, 3) == (0, 0)
    assert bounds(0.0, 0.0, often, often, 3) == (-INF, 0)
    assert bounds(-INF, 2.0, often, np.full(1000, 2.0), 3) == (-INF, 2)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """With three seeds; the plain percentile bootstrap holds it in 76% of cases."""
    rng, grid, hits = np.random.default_rng(0), np.arange(-9.0, -2), 0
    distinct, index = resample(3, 400, 0)
    for _ in range(300):
        optimum = rng.uniform(-6.5, -5.5)
        loss = 3 + 0.05 * (grid - optimum) ** 2 + 0.01 * rng.normal(size=(3, len(grid)))
        runs = Curve(width=32, log2_lr=grid, loss=loss + 0.02 * rng.normal(size=(3, 1)))
        point = locate(grid, runs.mean(np.ones(3, dtype=np.int64)))
        drawn = [locate(grid, mean) for mean in runs.mean(distinct)]
        low, high = np.array([(place.low, place.high) for place in drawn])[index].T
        low_end, high_end = bounds(point.low, point.high, low, high, 3)
        hits += low_end <= optimum <= high_end
    assert hits / 300 > 0.88


def test_slope_of_points_and_of_ranges() -> None:
    x = [5.0, 6.0, 7.0, 8.0]
    points = np.array([1.0, 1.5, 2.0, 2.5])
    assert slope(x, points, points) == (pytest.approx(0.5), pytest.approx(0.5))
    least, most = slope(x, np.array([1.0, 1.5, 2.0, -INF]), points)
    assert (least, most) == (-INF, pytest.approx(0.5))
    least, most = slope([5.0, 6.0, 7.0], np.array([0.0, -INF, 1.0]), np.array([0.0, INF, 1.0]))
    assert (least, most) == (0.5, 0.5)  # the middle point has no leverage
