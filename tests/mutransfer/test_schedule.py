"""Learning-rate shapes: closed forms, boundaries, and ratios between groups that never move."""

from __future__ import annotations

import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mutransfer.errors import UserError
from mutransfer.optimizers import Optimizers
from mutransfer.rules import PARAMETRIZATIONS, BaseParams
from mutransfer.schedule import WSD, Shape, coefficient, interpolate, set_lr
from proxies.decoder import Decoder, DecoderConfig
from proxies.tables import decoder_table

SHAPES: tuple[Shape, ...] = get_args(Shape)
FALLING: tuple[Shape, ...] = ("linear", "cosine", "wsd_exponential", "one_minus_sqrt")
TINY = DecoderConfig(
    d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, d_ff=80, vocab_size=64
)


@pytest.mark.parametrize(
    ("shape", "quarter", "half"),
    [
        ("constant", 1.0, 1.0),
        ("linear", 0.75, 0.5),
        ("cosine", 0.8535533905932737, 0.5),
        ("wsd_exponential", 0.681792830507429, 0.4142135623730951),
        ("one_minus_sqrt", 0.5, 0.2928932188134524),
    ],
)
def test_closed_forms(shape: Shape, quarter: float, half: float) -> None:
    assert coefficient(shape, 0.25) == pytest.approx(quarter, rel=1e-15)
    assert coefficient(shape, 0.5) == pytest.approx(half, rel=1e-15)


@pytest.mark.parametrize("shape", FALLING)
def test_shapes_fall_from_one_to_zero_exactly(shape: Shape) -> None:
    values = [coefficient(shape, i / 64) for i in range(65)]
    assert values[0] == 1.0
    assert values[-1] == 0.0
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == 65


@pytest.mark.parametrize("shape", FALLING)
def test_a_phase_reaches_its_end_exactly(shape: Shape) -> None:
    assert interpolate(shape, 0.0, 1.0, 0.0625) == 1.0
    assert interpolate(shape, 1.0, 1.0, 0.0625) == 0.0625


def test_wsd_exponential_of_the_xmodel_decay() -> None:
    """From 1/600 to a sixteenth of it: half-way at min + (max - min) * 0.4142."""
    peak = 0.01 / 6
    half = peak * interpolate("wsd_exponential", 0.5, 1.0, 1 / 16)
    assert half == pytest.approx(1.0416666667e-4 + (1.6666666667e-3 - 1.0416666667e-4) * 0.41421356,
                                 rel=1e-8)  # fmt: skip


def test_wsd_boundaries() -> None:
    schedule = WSD(warmup=0.1, decay=0.2, final=0.0625)
    factors = [schedule.factor(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1, rel=1e-15)
    assert factors[8] == pytest.approx(0.9, rel=1e-15)
    assert factors[9:80] == [1.0] * 71
    assert schedule.decay_start(100) == 80
    assert factors[80] == pytest.approx(0.0625 + 0.9375 * (2 * 2 ** (-1 / 20) - 1), rel=1e-14)
    assert factors[89] == pytest.approx(0.0625 + 0.9375 * 0.4142135623730951, rel=1e-14)
    assert factors[99] == 0.0625


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (WSD(warmup=0, decay=0), [1.0, 1.0, 1.0, 1.0]),
        (WSD(warmup=1, decay=0), [0.25, 0.5, 0.75, 1.0]),
        (WSD(warmup=0, decay=1, shape="linear"), [0.75, 0.5, 0.25, 0.0]),
        (WSD(warmup=0.5, decay=0.5, shape="linear", final=0.5), [0.5, 1.0, 0.75, 0.5]),
        (WSD(warmup=0, decay=0.5, shape="constant"), [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_wsd_corners(schedule: WSD, expected: list[float]) -> None:
    assert [schedule.factor(step, 4) for step in range(4)] == expected


def test_a_single_step_is_a_run() -> None:
    assert WSD().factor(0, 1) == 1.0


@given(
    st.integers(1, 400), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.sampled_from(SHAPES)
)
def test_wsd_rises_then_falls_and_stays_in_range(
    steps: int, warmup: float, share: float, final: float, shape: Shape
) -> None:
    schedule = WSD(warmup=warmup, decay=share * (1 - warmup), final=final, shape=shape)
    factors = [schedule.factor(step, steps) for step in range(steps)]
    assert all(0 <= factor <= 1 for factor in factors)
    top = factors.index(max(factors))
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert all(b <= a + 1e-12 for a, b in zip(factors[top:], factors[top + 1 :], strict=False))


@pytest.mark.parametrize("step", [-1, 100, 101])
def test_steps_outside_the_run_are_refused(step: int) -> None:
    with pytest.raises(UserError, match=rf"got {step}; expected 0 … 99"):
        WSD().factor(step, 100)


@pytest.mark.parametrize("field", ["warmup", "decay", "final"])
@pytest.mark.parametrize("value", [-1e-9, 1 + 1e-9, math.nan, math.inf])
def test_fractions_are_fractions(field: str, value: float) -> None:
    with pytest.raises(UserError, match=f"^{field}: not a fraction"):
        WSD(**{"warmup": 0.0, "decay": 0.0, field: value})


def test_overlap_is_refused_and_touching_is_not() -> None:
    assert WSD(warmup=0.5, decay=0.5).decay_start(10) == 5
    with pytest.raises(UserError, match="overlap"):
        WSD(warmup=0.5, decay=0.500001)


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(UserError, match=r"got exponential; expected one of constant, linear"):
        WSD(shape="exponential")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_schedule_keeps_the_ratios_between_all_groups(name: str, shape: Shape) -> None:
    params = BaseParams(lr=0.01, embedding_lr_ratio=3.0, weight_decay=0.1, muon_factor=0.7)
    model = Decoder(TINY)
    table = decoder_table(TINY, TINY, params, name, base_width=8)
    optimizers = Optimizers(model, table)
    schedule = WSD(warmup=0.2, decay=0.4, final=0.1, shape=shape)
    for step in range(10):
        if step == schedule.decay_start(10):
            optimizers.hand_over()
        factor = schedule.factor(step, 10)
        optimizers.set_lr(factor)
        for group in optimizers.groups:
            assert group["lr"] == pytest.approx(group["peak_lr"] * factor, rel=1e-15)
    assert len(optimizers.groups) >= 2


def test_set_lr_multiplies_the_peak_not_the_current_rate() -> None:
    groups = [{"lr": 9.0, "peak_lr": 0.02}, {"lr": 9.0, "peak_lr": 0.005}]
    set_lr(groups, 0.5)
    set_lr(groups, 0.5)
    assert [group["lr"] for group in groups] == [0.01, 0.0025]
