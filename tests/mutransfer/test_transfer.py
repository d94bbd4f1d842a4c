"""The transfer check on synthetic runs whose optimum is known."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import pytest

from mutransfer.errors import UserError
from mutransfer.transfer import judge, transfer_check
from mutransfer.transfer_measure import Estimate
from mutransfer.transfer_result import ArmResult

INF = math.inf
WIDTHS = (32, 64, 128, 256)


def make_runs(
    optima: Sequence[float],
    *,
    arm: str = "completep-tied",
    curvature: float = 0.05,
    noise: float = 0.0,
    seeds: int = 3,
    grid: Sequence[float] = range(-10, -2),
    diverge_above: Mapping[int, float] | None = None,
    rng_seed: int = 0,
) -> pd.DataFrame:
    """Losses 3 + seed + curvature * (log2 lr - optimum)^2 + noise, at as many widths as optima."""
    rng = np.random.default_rng(rng_seed)
    rows = [
        (arm, width, 2.0**x, seed, 3 + 0.03 * seed + curvature * (x - optimum) ** 2)
        for width, optimum in zip(WIDTHS, optima, strict=False)
        for seed in range(seeds)
        for x in grid
    ]
    runs = pd.DataFrame(rows, columns=["arm", "width", "lr", "seed", "loss"])
    runs["loss"] += noise * rng.normal(size=len(runs))
    cliff = runs["width"].map(dict(diverge_above or {}))
    runs.loc[np.log2(runs["lr"]) > cliff, "loss"] = math.nan
    return runs


def only(runs: pd.DataFrame, **keywords: object) -> ArmResult:
    result = transfer_check(runs, bootstrap=300, **keywords)  # type: ignore[arg-type]
    (arm,) = result.arms
    assert result.verdict == arm.verdict
    return arm


def test_exact_parabolas_give_exact_figures() -> None:
    arm = only(make_runs([-6.0, -6.1, -6.2, -6.3]))
    assert [optimum.log2_lr for optimum in arm.optima] == pytest.approx([-6.0, -6.1, -6.2, -6.3])
    assert (arm.drift, arm.drift_low, arm.drift_high) == pytest.approx((0.3, 0.3, 0.3))
    assert arm.drift_per_doubling == pytest.approx(-0.1)
    assert (arm.drift_per_doubling_low, arm.drift_per_doubling_high) == pytest.approx((-0.1, -0.1))
    assert arm.regret == pytest.approx(0.05 * 0.3**2)
    assert (arm.regret_low, arm.regret_high) == pytest.approx((0.0045, 0.0045))
    assert arm.verdict == "PASS"
    assert arm.widths == WIDTHS
    best = arm.optima[3]
    assert (best.best_log2_lr, best.best_loss) == (-6, pytest.approx(3.03 + 0.05 * 0.09))
    assert best.loss_se == pytest.approx(0.03 / math.sqrt(3))
    assert (best.seeds, best.interior, best.note) == (3, True, "")


def test_drift_is_the_largest_not_the_last() -> None:
    arm = only(make_runs([-6.0, -6.45, -6.1, -6.0]))
    assert arm.drift == pytest.approx(0.45)
    assert arm.regret == pytest.approx(0)


def test_two_octaves_of_drift_fail() -> None:
    arm = only(make_runs([-5.0, -5.6, -6.3, -7.0], noise=0.005))
    assert arm.drift == pytest.approx(2, abs=0.2)
    assert arm.drift_low > 1.5
    assert arm.regret == pytest.approx(0.05 * 4, abs=0.02)
    assert arm.verdict == "FAIL"
    assert "drift is at least" in arm.reasons[0]
    assert "regret is at least" in arm.reasons[1]


@pytest.mark.parametrize("rng_seed", range(6))
def test_flat_noise_is_neither_transfer_nor_its_failure(rng_seed: int) -> None:
    runs = make_runs([-6] * 4, curvature=0, noise=0.01, seeds=5, rng_seed=rng_seed)
    assert only(runs).verdict == "WARN"


def test_noise_widens_the_interval_around_the_truth() -> None:
    quiet, loud = (only(make_runs([-6.2] * 4, noise=noise)) for noise in (0.003, 0.01))
    for arm in (quiet, loud):
        assert arm.drift_low <= arm.drift <= arm.drift_high  # type: ignore[operator]
        assert arm.regret_low <= arm.regret <= arm.regret_high  # type: ignore[operator]
    assert loud.drift_high > 2 * quiet.drift_high
    assert loud.regret_high > 10 * loud.regret  # type: ignore[operator]


def test_up_and_down_are_treated_alike() -> None:
    runs = make_runs([-6.0, -6.3, -6.5], noise=0.01)
    down, up = only(runs), only(runs.assign(lr=1 / runs["lr"]))
    for name in ("drift", "drift_low", "drift_high", "regret", "regret_low", "regret_high"):
        assert getattr(down, name) == pytest.approx(getattr(up, name))
    assert down.drift_per_doubling == pytest.approx(-up.drift_per_doubling)  # type: ignore[operator]
    assert down.drift_per_doubling_low == pytest.approx(-up.drift_per_doubling_high)


def test_many_widths_do_not_add_up_to_a_drift() -> None:
    """Without drift the lower bound is above zero in 1 of 20 cases; uncorrected in 1 of 6."""
    arms = (only(make_runs([-6.2] * 4, noise=0.01, seeds=5, rng_seed=i)) for i in range(80))
    assert sum(arm.drift_low > 0 for arm in arms) <= 8


@pytest.mark.parametrize(
    ("optima", "side"), [((-6, -6, -10.4), "downwards"), ((-6, -6, -2.6), "upwards")]
)
def test_optimum_on_the_border_is_none_and_says_where_to_extend(
    optima: tuple[float, ...], side: str
) -> None:
    arm = only(make_runs(optima))
    last = arm.optima[-1]
    assert last.log2_lr is None
    assert not last.interior
    assert last.note.endswith(f"extend it {side}")
    assert arm.drift is arm.regret is arm.drift_per_doubling is None
    assert any(last.note in reason for reason in arm.reasons)
    # the nearest place that the grid leaves open is half a step inside its end
    border = -9.5 if side == "downwards" else -3.5
    assert arm.drift_low == pytest.approx(abs(border + 6))
    assert arm.drift_high == INF
    assert arm.verdict == "FAIL"


def test_border_close_by_is_a_warning() -> None:
    arm = only(make_runs((-6, -6, -7.3), grid=range(-7, -2), curvature=0.02))
    assert arm.drift_low == pytest.approx(0.5)
    assert arm.verdict == "WARN"
    assert arm.drift is None
    assert (arm.optima[-1].low, arm.optima[-1].high) == (-INF, -6.5)


def test_border_at_the_proxy_bounds_the_drift_too() -> None:
    arm = only(make_runs((-11, -7, -7)))
    assert arm.drift_low == pytest.approx(2.5)
    assert arm.regret is None
    assert arm.verdict == "FAIL"


def test_diverged_neighbour_leaves_no_optimum() -> None:
    arm = only(make_runs((-6, -6, -5.9), diverge_above={128: -6}))
    last = arm.optima[-1]
    assert last.note == "best at 2^-6, and 2^-5 diverged: refine the grid between the two"
    assert (last.low, last.high) == (-6.5, -5)
    assert arm.verdict == "WARN"


def test_one_diverged_seed_takes_the_learning_rate_out() -> None:
    runs = make_runs((-6, -6))
    runs.loc[(runs["lr"] == 2**-6) & (runs["seed"] == 1) & (runs["width"] == 64), "loss"] = INF
    arm = only(runs)
    assert arm.optima[1].best_log2_lr in (-7, -5)
    assert not arm.optima[1].interior


def test_diverging_where_the_proxy_is_best_fails() -> None:
    arm = only(make_runs((-5, -6, -8), diverge_above={128: -6}))
    assert arm.regret == arm.regret_low == INF
    assert arm.verdict == "FAIL"


def test_every_learning_rate_diverged() -> None:
    arm = only(make_runs((-6, -6), diverge_above={64: -99}))
    last = arm.optima[1]
    assert (last.best_log2_lr, last.best_loss, last.loss_se) == (None, INF, None)
    assert last.note == "every learning rate diverged: extend the grid below 2^-10"
    assert arm.drift_low == pytest.approx(4)
    assert arm.verdict == "FAIL"


def test_proxy_optimum_outside_the_widest_grid_has_no_regret() -> None:
    wide = make_runs((0, -5.6), grid=range(-7, -4)).query("width == 64")
    arm = only(pd.concat([make_runs((-4.8,)), wide]))
    assert arm.drift == pytest.approx(0.8)
    assert arm.regret is None
    assert arm.verdict == "WARN"
    assert arm.reasons[-1] == (
        "the proxy's optimum 2^-4.80 was not run at width 64: extend the grid there"
    )


@pytest.mark.parametrize(
    ("drift", "regret", "verdict"),
    [
        ((0.5, 0.1, 1.0), (0.01, 0.0, 0.02), "PASS"),
        ((0.5000001, 0.1, 1.0), (0.01, 0.0, 0.02), "WARN"),
        ((0.5, 0.1, 1.0000001), (0.01, 0.0, 0.02), "WARN"),
        ((0.5, 0.1, 1.0), (0.01, 0.0, 0.0200001), "WARN"),
        ((2.0, 1.0, 3.0), (0.1, 0.05, 0.2), "WARN"),
        ((2.0, 1.0000001, 3.0), (0.0, 0.0, 0.0), "FAIL"),
        ((0.1, 0.0, 0.2), (0.1, 0.0500001, 0.2), "FAIL"),
        ((None, 1.1, INF), (None, -INF, INF), "FAIL"),
        ((None, 0.0, 0.3), (0.0, 0.0, 0.0), "WARN"),
        ((0.0, 0.0, 0.0), (None, 0.0, 0.0), "WARN"),
        ((0.0, 0.0, math.nan), (0.0, 0.0, 0.0), "WARN"),
    ],
)
def test_each_threshold(
    drift: tuple[float | None, float, float],
    regret: tuple[float | None, float, float],
    verdict: str,
) -> None:
    found, reasons = judge(drift=Estimate(*drift), regret=Estimate(*regret), cautions=[])
    assert found == verdict
    assert reasons
    found, reasons = judge(drift=Estimate(*drift), regret=Estimate(*regret), cautions=["few seeds"])
    assert found == ("FAIL" if verdict == "FAIL" else "WARN")
    assert "few seeds" in reasons


@pytest.mark.parametrize(("seeds", "verdict"), [(1, "WARN"), (2, "WARN"), (3, "PASS")])
def test_fewer_than_three_seeds_are_at_best_a_warning(seeds: int, verdict: str) -> None:
    arm = only(make_runs([-6.0, -6.1], seeds=seeds))
    assert arm.verdict == verdict
    assert any("fewer than 3" in reason for reason in arm.reasons) == (seeds < 3)


def test_a_single_seed_has_the_grid_for_an_error() -> None:
    arm = only(make_runs([-6.0, -6.1], seeds=1))
    assert (arm.optima[0].low, arm.optima[0].high) == (-7, -5)
    assert arm.optima[0].note == "one seed: the interval is the two neighbours on the grid"
    assert (arm.drift, arm.drift_low, arm.drift_high) == (pytest.approx(0.1), 0, 2)
    assert (arm.regret_low, arm.regret_high) == (-INF, INF)
    assert arm.regret == pytest.approx(0.0005)


@pytest.mark.parametrize(("epochs", "verdict"), [(4.0, "PASS"), (4.01, "WARN")])
def test_text_seen_too_often_is_at_best_a_warning(epochs: float, verdict: str) -> None:
    runs = make_runs([-6.0, -6.1])
    by_argument = transfer_check(runs, max_epochs=epochs)
    runs["epochs"] = [1.0] * (len(runs) - 1) + [epochs]
    by_column = transfer_check(runs)
    assert by_argument.verdict == by_column.verdict == verdict
    assert by_argument.epochs == by_column.epochs == epochs
    assert not by_column.notes


def test_unknown_epochs_are_stated() -> None:
    assert "epochs are unknown" in transfer_check(make_runs([-6, -6])).notes[0]


def test_contrast_has_a_verdict_of_its_own_only() -> None:
    runs = pd.concat([make_runs([-6] * 4), make_runs([-7, -8, -9, -10], arm="sp")])
    result = transfer_check(runs)
    assert [(arm.arm, arm.verdict, arm.contrast) for arm in result.arms] == [
        ("completep-tied", "PASS", False),
        ("sp", "FAIL", True),
    ]
    assert result.verdict == "PASS"
    assert transfer_check(runs, contrast=()).verdict == "FAIL"  # the worst arm decides


def test_nothing_but_contrasts_is_refused() -> None:
    with pytest.raises(UserError, match="every arm is a contrast"):
        transfer_check(make_runs([-6, -6], arm="sp"))


def test_single_width_is_a_warning() -> None:
    arm = only(make_runs([-6]))
    assert arm.verdict == "WARN"
    assert "a single width: nothing to compare it with" in arm.reasons
    assert arm.drift is arm.regret is None


def test_proxy_width_chooses_the_home_of_the_optimum() -> None:
    runs = make_runs([-5.7, -6.0, -6.1])
    assert only(runs, proxy_width=64).drift == pytest.approx(0.3)
    assert only(runs, proxy_width=64).regret == pytest.approx(0.05 * 0.01)
    largest = only(runs, proxy_width=128)
    assert largest.regret is None
    assert largest.verdict == "WARN"
    with pytest.raises(UserError, match=r"'completep-tied'.*not run; got 48.*32, 64, 128"):
        transfer_check(runs, proxy_width=48)


def test_missing_runs_are_stated_and_do_not_move_the_optimum() -> None:
    runs = make_runs([-6.0, -6.1], seeds=4)
    gone = (runs["width"] == 64) & (runs["lr"] == 2**-6) & (runs["seed"] == 3)
    result = transfer_check(runs[~gone], max_epochs=1)
    assert result.verdict == "PASS"
    assert result.arms[0].optima[1].log2_lr == pytest.approx(-6.1)
    assert result.arms[0].optima[1].seeds == 3
    assert "1 runs are missing (width 64: 2^-6)" in result.notes[0]


def test_order_of_rows_and_rounding_of_rates_do_not_matter() -> None:
    runs = make_runs([-6.0, -6.2, -6.1], noise=0.01)
    shuffled = runs.sample(frac=1, random_state=0)
    shuffled["lr"] *= 1 + 1e-9 * np.arange(len(runs)) / len(runs)
    assert transfer_check(runs).to_json() == transfer_check(shuffled).to_json()


def test_json_is_strict_and_starts_with_the_verdict() -> None:
    runs = pd.concat([make_runs([-6, -6]), make_runs([-7, -11], arm="sp")])
    record = transfer_check(runs, bootstrap=50).to_json()
    assert list(record)[:2] == ["verdict", "schema_version"]
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    good, bad = record["arms"]
    assert good["drift"] == pytest.approx(0)
    assert (bad["drift"], bad["drift_high"]) == (None, None)
    assert bad["drift_low"] == pytest.approx(2.5)
    assert [optimum["interior"] for optimum in bad["optima"]] == [True, False]


def test_summary_says_what_was_found() -> None:
    runs = pd.concat([make_runs([-6, -6]), make_runs([-7, -11], arm="sp")])
    text = transfer_check(runs, bootstrap=50).summary()
    assert text.startswith("transfer check: PASS\n")
    assert "sp: FAIL (contrast, outside the overall verdict)\n  drift ≥ 2.50 octaves" in text
    assert "64       none" in text
    assert "extend it downwards" in text
    assert "drift 0.00 [0.00, 0.00] octaves" in text
