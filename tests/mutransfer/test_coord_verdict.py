"""Slopes and verdicts: closed forms, known quantiles, and both sides of every threshold."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import pytest

from mutransfer.coord_expect import Expectation, Ladder, Thresholds, Tolerance
from mutransfer.coord_text import SATURATED
from mutransfer.coord_verdict import (
    DEAD,
    DIVERGED,
    LOST,
    STILL,
    UNSURE,
    Fit,
    Quantity,
    Unjudged,
    decide,
    fit_slope,
    judge,
)
from mutransfer.errors import UserError
from mutransfer.roles import Role

WIDTHS = (32, 64, 128, 256)
ROLES: dict[str, Role] = {"embedding.weight": "embedding", "layers.*.up.weight": "hidden"}
LADDER = Ladder(
    optimizer="adamw",
    roles=ROLES,
    fan_in={"embedding.weight": 1, "layers.*.up.weight": 1},
    fan_out={"embedding.weight": 0, "layers.*.up.weight": 1},
    tokens=True,
)
EPS = 2.0**-10

Value = Callable[[int, int, int], float]
"""(width, seed, t) -> value."""


def make_frame(
    kind: str, name: str, value: Value, *, times: Sequence[int] = (0,), seeds: int = 3
) -> pd.DataFrame:
    rows = [
        (kind, name, t, width, seed, value(width, seed, t))
        for width in WIDTHS
        for seed in range(seeds)
        for t in times
    ]
    return pd.DataFrame(rows, columns=["kind", "name", "t", "width", "seed", "value"])


def only(frame: pd.DataFrame) -> Quantity:
    quantities, unjudged = judge(frame, LADDER, Thresholds())
    assert not unjudged
    (quantity,) = quantities
    return quantity


def activation(value: Value, *, seeds: int = 3) -> Quantity:
    return only(make_frame("activation", "layers.*.up", value, seeds=seeds))


@pytest.mark.parametrize("slope", [-1.0, -0.5, 0.0, 0.37, 1.0])
def test_a_power_of_the_width_is_found_exactly(slope: float) -> None:
    fit = fit_slope(WIDTHS, [3.7 * width**slope for width in WIDTHS])
    found = (fit.slope, fit.low, fit.high, fit.slope_wide)
    assert found == pytest.approx((slope,) * 4, abs=1e-12)


@pytest.mark.parametrize(("a", "b", "c"), [(0.0, 1.0, 0.0), (0.3, -0.2, 1.1), (2.0, 1.0, -3.0)])
def test_three_points_in_closed_form(a: float, b: float, c: float) -> None:
    """One degree of freedom: slope (c - a)/2, residual square (a - 2b + c)^2/6, Sxx = 2."""
    fit = fit_slope([1, 2, 4], [2**a, 2**b, 2**c])
    half = 12.7062 * abs(a - 2 * b + c) / math.sqrt(12)
    assert fit.slope == pytest.approx((c - a) / 2)
    assert (fit.low, fit.high) == pytest.approx((fit.slope - half, fit.slope + half), rel=1e-5)
    assert fit.slope_wide == pytest.approx(c - b)


def test_least_squares_of_numpy_agree_for_uneven_widths_and_seeds() -> None:
    rng = np.random.default_rng(0)
    widths = np.repeat([24.0, 64.0, 96.0, 512.0], 3)
    log = 0.4 * np.log2(widths) + rng.normal(size=12)
    fit = fit_slope(widths.tolist(), (2**log).tolist())
    (slope, _), covariance = np.polyfit(np.log2(widths), log, 1, cov=True)
    assert fit.slope == pytest.approx(slope)
    half = 2.22814 * math.sqrt(covariance[0, 0])
    assert (fit.low, fit.high) == pytest.approx((slope - half, slope + half), rel=1e-4)
    wide = np.polyfit(np.log2(widths[3:]), log[3:], 1)[0]
    assert fit.slope_wide == pytest.approx(wide)


def test_two_widths_have_no_error() -> None:
    with pytest.raises(UserError, match=r"too few widths.*got \[32, 64\]; expected at least 3"):
        fit_slope([32, 64, 64], [1, 2, 3])


def make_fit(deviation: float, half: float, wide: float, right: float = 0.5) -> Fit:
    slope = right + deviation
    return Fit(slope=slope, low=slope - half, high=slope + half, slope_wide=right + wide)


THRESHOLDS = [
    # deviation, half an interval, deviation of wide models: warn is 0.125, fail is 0.25
    (0.25 + EPS, 0.125, 0.125 + EPS, ("FAIL", False)),
    (0.25, 0.0, 0.25, ("WARN", False)),  # not above fail
    (0.25 + EPS, 0.125 + EPS, 0.125 + EPS, ("WARN", False)),  # not surely above warn
    (0.25 + EPS, 0.0, 0.125, ("WARN", False)),  # wide models not above warn
    (0.125 + EPS, 0.125, 0.0625 + EPS, ("WARN", False)),
    (0.125, 0.0, 0.125, ("PASS", False)),  # not above warn
    (0.125 + EPS, 0.125 + EPS, 0.0625 + EPS, ("PASS", False)),  # not surely off
    (0.125 + EPS, 0.0, 0.0625, ("PASS", False)),  # wide models not above half of warn
    (0.25 + EPS, 0.5, 0.0625 + EPS, ("WARN", False)),  # far off, though not surely
    (0.25 + EPS, 0.25, 0.0625, ("PASS", False)),  # far off in the smallest model alone
    (0.25 + EPS, 0.25 + EPS, 0.0625, ("WARN", True)),
    (EPS, 0.25, 0.0, ("PASS", False)),
    (EPS, 0.25 + EPS, 0.0, ("WARN", True)),  # too wide an interval to tell
]


@pytest.mark.parametrize(("deviation", "half", "wide", "expected"), THRESHOLDS)
def test_each_threshold_upwards(
    deviation: float, half: float, wide: float, expected: tuple[str, bool]
) -> None:
    above, below = Tolerance(warn=0.125, fail=0.25), Tolerance(warn=0.5, fail=1)
    for lower in (None, below):
        right = Expectation(slope=0.5, above=above, below=lower, cause_above="")
        assert decide(make_fit(deviation, half, wide), right) == expected


@pytest.mark.parametrize(("deviation", "half", "wide", "expected"), THRESHOLDS)
def test_each_threshold_downwards(
    deviation: float, half: float, wide: float, expected: tuple[str, bool]
) -> None:
    """The mirror image, with tolerances of its own that are twice as wide."""
    above, below = Tolerance(warn=0.0625, fail=0.125), Tolerance(warn=0.25, fail=0.5)
    right = Expectation(slope=0.5, above=above, below=below, cause_above="")
    fit = make_fit(-2 * deviation, 2 * half, -2 * wide)
    assert decide(fit, right) == expected


@pytest.mark.parametrize(
    ("deviation", "half", "expected"),
    [
        (-9.0, 0.0, ("PASS", False)),
        (0.0, 0.25, ("PASS", False)),
        (0.0, 0.25 + EPS, ("WARN", True)),
        (-0.5, 0.75, ("PASS", False)),
        (-0.5, 0.75 + EPS, ("WARN", True)),  # it may still be off upwards
    ],
)
def test_a_one_sided_quantity_may_fall_but_must_be_known_not_to_rise(
    deviation: float, half: float, expected: tuple[str, bool]
) -> None:
    right = Expectation(
        slope=0.5, above=Tolerance(warn=0.125, fail=0.25), below=None, cause_above=""
    )
    assert decide(make_fit(deviation, half, deviation), right) == expected


@pytest.mark.parametrize(
    ("slope", "verdict", "cause"),
    [
        (0.0, "PASS", ""),
        (0.07, "PASS", ""),
        (0.09, "WARN", "does not shrink with the fan-in"),
        (0.16, "FAIL", "does not shrink with the fan-in"),
        (-0.07, "PASS", ""),
        (-0.09, "WARN", "shrinks too fast with the fan-in"),
        (-0.16, "FAIL", "shrinks too fast with the fan-in"),
    ],
)
def test_activations_at_init_are_judged_on_both_sides(
    slope: float, verdict: str, cause: str
) -> None:
    quantity = activation(lambda width, seed, t: 5 * (1 + 1e-3 * seed) * width**slope)
    assert (quantity.verdict, quantity.two_sided, quantity.times) == (verdict, True, (0,))
    assert quantity.slope == pytest.approx(slope, abs=1e-9)
    assert quantity.cause.endswith(cause)
    assert bool(quantity.cause) == (verdict != "PASS")
    assert quantity.cause in quantity.sentence
    limits = Thresholds().init
    assert (quantity.warn, quantity.fail) == (limits.warn, limits.fail)
    assert (quantity.warn_below, quantity.fail_below) == (limits.warn, limits.fail)


def test_loss_at_init_is_judged_upwards_only() -> None:
    falls = only(make_frame("loss", "loss", lambda width, seed, t: 9 * width**-0.5))
    assert (falls.verdict, falls.two_sided) == ("PASS", False)
    assert falls.warn_below is falls.fail_below is None
    rises = only(make_frame("loss", "loss", lambda width, seed, t: 9 * width**0.2))
    assert rises.verdict == "FAIL"
    assert "output multiplier is not divided by the width" in rises.cause


def test_the_smallest_width_alone_does_not_condemn() -> None:
    """All of the slope, 0.27, comes from width 32; with a slope in wide models too, it fails."""
    flat = activation(lambda width, seed, t: 2**-0.9 if width == 32 else 1.0, seeds=5)
    assert flat.slope == pytest.approx(0.27)
    assert flat.low > 0.15  # type: ignore[operator]
    assert (flat.slope_wide, flat.verdict) == (pytest.approx(0, abs=1e-12), "PASS")
    law = activation(lambda width, seed, t: width**0.27, seeds=5)
    assert (law.slope_wide, law.verdict) == (pytest.approx(0.27), "FAIL")


def test_too_noisy_is_a_warning_that_says_so() -> None:
    quantity = activation(lambda width, seed, t: 4.0 ** (-1) ** seed, seeds=2)
    assert quantity.slope == pytest.approx(0, abs=1e-12)
    assert (quantity.verdict, quantity.cause) == ("WARN", UNSURE)
    assert quantity.sentence.endswith(UNSURE)


@pytest.mark.parametrize("kind", ["activation", "residual", "attention_logits"])
def test_all_zero_at_init_is_a_choice(kind: str) -> None:
    frame = make_frame(kind, "layers.*.up", lambda width, seed, t: 0.0)
    quantities, unjudged = judge(frame, LADDER, Thresholds())
    assert not quantities
    assert unjudged == (Unjudged(kind=kind, name="layers.*.up", reason="zero at init, by choice"),)


def test_zero_at_some_widths_only_fails() -> None:
    quantity = activation(lambda width, seed, t: 0.0 if width == 64 and seed == 1 else 1.0)
    assert (quantity.verdict, quantity.cause) == ("FAIL", f"{DEAD} (width 64)")
    assert quantity.slope is quantity.low is quantity.high is quantity.slope_wide is None
    assert quantity.sentence == f"activations of layers.*.up at init: {DEAD} (width 64)"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_at_init_diverges_even_at_every_width(value: float) -> None:
    somewhere = activation(lambda width, seed, t: value if width >= 128 else 1.0)
    assert (somewhere.verdict, somewhere.cause) == ("FAIL", f"{DIVERGED} (width 128, 256)")
    everywhere = activation(lambda width, seed, t: value)
    assert everywhere.verdict == "FAIL"
    assert everywhere.cause == f"{DIVERGED} (width 32, 64, 128, 256)"
    mixed = activation(lambda width, seed, t: value if width == 256 else 0.0)
    assert mixed.cause.startswith(DIVERGED)


def test_a_run_that_diverges_later_fails_its_changes() -> None:
    quantity = only(
        make_frame(
            "delta_logits",
            "logits",
            lambda width, seed, t: math.inf if (width, seed, t) == (256, 2, 8) else 1.0,
            times=(1, 2, 4, 8),
        )
    )
    assert (quantity.verdict, quantity.cause) == ("FAIL", f"{DIVERGED} (width 256)")


def test_what_nothing_moves_fails() -> None:
    frame = make_frame("update", "layers.*.up.weight", lambda width, seed, t: 0.0, times=(1, 2, 4))
    quantity = only(frame)
    assert (quantity.verdict, quantity.times) == ("FAIL", (4,))
    assert quantity.cause == f"{STILL} (width 32, 64, 128, 256)"
    one = only(frame.assign(value=frame["width"].map(lambda width: float(width != 64))))
    assert (one.verdict, one.cause) == ("FAIL", f"{STILL} (width 64)")


@pytest.mark.parametrize("first", [1, 2, 4])
def test_first_updates_are_the_first_that_move(first: int) -> None:
    """Later ones are off, and so are not what is judged."""
    quantity = only(
        make_frame(
            "update",
            "layers.*.up.weight",
            lambda width, seed, t: 0.0 if t < first else width**-1.0 * t if t == first else 1.0,
            times=(1, 2, 4, 8),
        )
    )
    assert (quantity.t, quantity.times, quantity.verdict) == (first, (first,), "PASS")
    assert quantity.slope == pytest.approx(quantity.expected) == -1


@pytest.mark.parametrize(
    ("times", "judged"),
    [((1,), (1,)), ((1, 2), (2,)), ((1, 2, 4), (2, 4)), ((1, 2, 4, 8, 16), (4, 8, 16))],
)
def test_changes_are_judged_on_the_geometric_mean_of_the_last_steps(
    times: tuple[int, ...], judged: tuple[int, ...]
) -> None:
    """The change at step t goes as width^(log2(t)/10)."""
    quantity = only(
        make_frame(
            "delta_activation",
            "layers.*.up",
            lambda width, seed, t: 3 * width ** (math.log2(t) / 10),
            times=times,
        )
    )
    assert (quantity.t, quantity.times) == (judged[-1], judged)
    mean = sum(math.log2(t) / 10 for t in judged) / len(judged)
    assert quantity.slope == pytest.approx(mean, abs=1e-12)


def test_changes_that_have_not_begun_do_not_enter() -> None:
    quantity = only(
        make_frame(
            "delta_residual",
            "layers.*",
            lambda width, seed, t: 0.0 if t <= 2 and width == 32 else 1.0,
            times=(1, 2, 4, 8),
        )
    )
    assert (quantity.times, quantity.verdict) == ((4, 8), "PASS")


def test_what_has_no_right_slope_is_named_with_its_reason() -> None:
    frame = pd.concat(
        [
            make_frame("logits", "logits", lambda width, seed, t: 1.0),
            make_frame("delta_logits", "self-token logits", lambda *_: 1.0, times=(1, 2)),
            make_frame("update_ratio", "layers.*.up.weight", lambda *_: 1.0, times=(1, 2)),
            make_frame("loss", "loss", lambda *_: 1.0, times=(0, 1, 2)),
        ]
    )
    quantities, unjudged = judge(frame, LADDER, Thresholds())
    assert [(q.kind, q.verdict) for q in quantities] == [("loss", "PASS")]
    assert [(each.kind, each.name) for each in unjudged] == [
        ("logits", "logits"), ("delta_logits", "self-token logits")
    ]  # fmt: skip
    assert "judged apart" in unjudged[0].reason
    assert "judged together" in unjudged[1].reason


def test_thresholds_of_one_s_own_are_used() -> None:
    frame = make_frame("activation", "layers.*.up", lambda width, seed, t: width**0.16)
    strict, lax = Thresholds(), Thresholds(init=Tolerance(warn=0.17, fail=0.3))
    verdicts = [judge(frame, LADDER, limits)[0][0].verdict for limits in (strict, lax)]
    assert verdicts == ["FAIL", "PASS"]


def right_at_init() -> pd.DataFrame:
    return pd.concat(
        [
            make_frame("logits", "other-token logits", lambda width, seed, t: width**-0.5),
            make_frame("update", "embedding.weight", lambda *_: 1.0, times=(1, 2)),
        ]
    )


def causes(*frames: pd.DataFrame) -> dict[str, str]:
    quantities, _ = judge(pd.concat(frames), LADDER, Thresholds())
    assert all(q.cause in q.sentence for q in quantities)
    return {q.kind: q.cause for q in quantities}


def test_logits_that_grow_although_all_else_is_right_have_lost_their_multiplier() -> None:
    grow = make_frame("delta_logits", "logits", lambda w, seed, t: w**0.6, times=(1, 2, 4))
    assert causes(right_at_init(), grow)["delta_logits"] == LOST
    fast = make_frame("update", "layers.*.up.weight", lambda *_: 1.0, times=(1, 2))
    assert "hidden learning rates are too large" in causes(fast, grow)["delta_logits"]
    fall = make_frame("delta_logits", "logits", lambda w, seed, t: w**-0.9, times=(1, 2, 4))
    assert "more than once" in causes(right_at_init(), fall)["delta_logits"]


@pytest.mark.parametrize(
    ("logits", "update", "saturated"),
    [(0.5, -0.3, True), (0.5, -0.6, False), (0.5, 0.3, False), (-0.5, -0.3, False)],
)
def test_small_updates_under_large_logits_are_a_consequence(
    logits: float, update: float, saturated: bool
) -> None:
    found = causes(
        make_frame("logits", "other-token logits", lambda width, seed, t: width**logits),
        make_frame("update", "embedding.weight", lambda w, seed, t: w**update, times=(1, 2)),
    )
    assert (found["update"] == SATURATED) == saturated
    assert found["update"]
