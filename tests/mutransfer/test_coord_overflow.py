"""What leaves FP8's range: read off any module, judged by its growth with the width."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import pytest
import torch
from torch import nn

from mutransfer.apply import initialize
from mutransfer.coord_check import CoordCheckResult, Trainable, coord_check
from mutransfer.coord_expect import Ladder, Thresholds
from mutransfer.coord_overflow import excess_over_smallest, fp8_values
from mutransfer.coord_plot import OVERFLOW, coord_check_data, coord_check_figure
from mutransfer.coord_verdict import Quantity, judge
from mutransfer.optimizers import Optimizers
from mutransfer.rules import BaseParams
from mutransfer.verdict import Verdict
from proxies.decoder import Decoder
from proxies.float8 import Float8, Scaling
from proxies.layers import LayerSet, Plain
from proxies.presets import TINY
from proxies.tables import decoder_table

PARAMS = BaseParams(
    lr=2**-7, embedding_lr_ratio=2.0, init_std=0.1, embedding_multiplier=3.0,
    output_multiplier=2.0, residual_multiplier=1.5,
)  # fmt: skip
BASE = TINY.narrow(32).model_copy(update={"vocab_size": 64})
LADDER = Ladder(optimizer="adamw", roles={}, fan_in={}, fan_out={})

Injector = Callable[[Decoder, float], object]
"""Breaks a model, given its width ratio."""


class Told(nn.Module):
    """A module that tells what it clamped, as any may."""

    def __init__(self, inputs: float, gradients: float) -> None:
        super().__init__()
        self.fp8_overflow = {"inputs": inputs, "gradients": torch.tensor(gradients)}
        self.fp8_amax = {"inputs": 10 * inputs}


def test_the_worst_layer_stands_for_its_pattern() -> None:
    model = nn.ModuleDict(
        {
            "layers": nn.ModuleList([Told(0.25, torch.nan), Told(0.5, torch.nan)]),
            "last": Told(0, 0.125),
        }
    )
    assert fp8_values(model) == {
        ("overflow_inputs", "layers.*"): 0.5,
        ("amax_inputs", "layers.*"): 5.0,
        ("overflow_inputs", "last"): 0.0,
        ("overflow_gradients", "last"): 0.125,
        ("amax_inputs", "last"): 0.0,
    }
    assert fp8_values(Decoder(BASE)) == {}


def make_frame(*shares: tuple[float, float], kind: str = "overflow_inputs") -> pd.DataFrame:
    """Shares at step 1 of two seeds, by width; half as much at step 2."""
    rows = [
        (kind, "layers.*.up", t, 32 * 2**place, seed, share / t)
        for place, pair in enumerate(shares)
        for seed, share in enumerate(pair)
        for t in (1, 2)
    ]
    return pd.DataFrame(rows, columns=["kind", "name", "t", "width", "seed", "value"])


def only(frame: pd.DataFrame) -> Quantity:
    (quantity,) = judge(frame, LADDER, Thresholds())[0]
    return quantity


def test_what_overflows_at_every_width_is_no_law_of_the_width() -> None:
    frame = make_frame((0.125, 0.25), (0.5, 0.25), (0.0, 0.125))
    points = frame.pivot(index=["width", "seed"], columns="t", values="value")
    assert excess_over_smallest(points).tolist() == [0, 0, 0.25, 0, 0, 0]


@pytest.mark.parametrize(
    ("shares", "verdict"),
    [
        ([(0, 0), (0, 0), (0, 0)], "PASS"),
        ([(0, 0), (0, 0), (0.0099, 0.0099)], "PASS"),
        ([(0, 0), (0, 0), (0.0101, 0.0101)], "WARN"),
        ([(0, 0), (0, 0), (0.0299, 0.0299)], "WARN"),
        ([(0, 0), (0, 0), (0.0301, 0.0301)], "FAIL"),
        ([(0, 0), (0, 0), (0.0099, 0.0599)], "WARN"),  # one of the seeds does not show it
        ([(0.2, 0.2), (0.2, 0.2), (0.2095, 0.2095)], "PASS"),
        ([(0.2, 0.2), (0.2, 0.2), (0.2305, 0.2305)], "FAIL"),
        ([(0.9, 0.9), (0.1, 0.1), (0, 0)], "PASS"),
    ],
)
def test_both_sides_of_the_thresholds(shares: list[tuple[float, float]], verdict: Verdict) -> None:
    assert only(make_frame(*shares)).verdict == verdict


def test_the_sentence_names_the_width_and_the_amax_is_shown_and_not_judged() -> None:
    assert only(make_frame((0, 0), (0.5, 0.5), (0.25, 0.25))).sentence == (
        "up to 50.0% of the entries of the inputs of layers.*.up leave FP8's range, over what does "
        "in the smallest models, right is at most 1.0%: amax grows with the width faster than the "
        "scale follows (width 64)"
    )
    assert judge(make_frame((1, 1), (2, 2), (4, 4), kind="amax_inputs"), LADDER, Thresholds()) == (
        (), ()
    )  # fmt: skip


def check(
    layers: LayerSet, *, rules: str = "completep-tied",
    widths: tuple[int, ...] = (32, 64, 128, 256),
    inject: Injector = lambda model, ratio: None, steps: int = 2,
) -> CoordCheckResult:  # fmt: skip
    def factory(width: int, seed: int) -> Trainable:
        config = BASE.narrow(width)
        table = decoder_table(config, BASE, PARAMS, rules, base_width=32)
        model = Decoder(config, layers)
        initialize(model, table, seed=seed)
        inject(model, width / 32)
        generator = torch.Generator().manual_seed(seed)
        batch = torch.randint(64, (4, 17), generator=generator)
        return Trainable(model=model, optimizer=Optimizers(model, table), table=table,
                         loss=lambda: model.loss(batch), tokens=batch[:, :-1])  # fmt: skip

    return coord_check(factory, widths, seeds=2, steps=steps)


def overflows(result: CoordCheckResult) -> dict[tuple[str, str], Verdict]:
    """Verdicts on overflow that are not a PASS."""
    judged = [q for q in result.quantities if q.kind.startswith("overflow")]
    assert len(judged) == 3 * 7
    return {(q.kind, q.name): q.verdict for q in judged if q.verdict != "PASS"}


def by_width(result: CoordCheckResult, name: str) -> list[float]:
    """The largest share of a layer's inputs that overflowed, from narrow to wide."""
    frame = result.frame[
        (result.frame["kind"] == "overflow_inputs") & (result.frame["name"] == name)
    ]
    return [float(value) for value in frame.groupby("width")["value"].max()]


@torch.no_grad()
def outgrow(model: Decoder, ratio: float) -> None:
    """Multiplies the SwiGLU's branches by four times the width ratio."""
    for block in model.layers:
        for name in ("mlp.gate.weight", "mlp.up.weight"):
            block.get_parameter(name).mul_(4 * ratio)


@pytest.mark.parametrize("scaling", ["delayed", "none"])
def test_the_right_parametrization_stays_within_range(scaling: Scaling) -> None:
    result = check(Float8(scaling=scaling), steps=8, widths=(32, 64, 128))
    assert (result.verdict, result.culprits) == ("PASS", ())
    assert overflows(result) == {}
    measured = set(result.frame["kind"])
    plain = set(check(Plain(), widths=(32, 64, 128)).frame["kind"])
    assert measured - plain == {
        f"{kind}_{part}"
        for kind in ("overflow", "amax")
        for part in ("inputs", "weights", "gradients")
    }


@pytest.mark.slow
@pytest.mark.parametrize("log_lr", [-10, -4])
def test_no_learning_rate_makes_the_right_parametrization_overflow_in_wide_models(
    log_lr: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(check.__globals__, "PARAMS", PARAMS.model_copy(update={"lr": 2.0**log_lr}))
    assert overflows(check(Float8(), steps=8)) == {}


def test_delayed_scales_are_outgrown_by_wide_models_that_learn_too_fast() -> None:
    result = check(Float8(), rules="sp")
    assert overflows(result)["overflow_inputs", "layers.*.attention.o"] == "FAIL"
    narrow, *_, wide = by_width(result, "layers.*.attention.o")
    assert wide > 0.1 > 0.03 > narrow
    assert any("leave FP8's range" in line for line in result.culprits)


def test_a_current_scale_hides_it() -> None:
    result = check(Float8(scaling="current"), rules="sp", widths=(32, 64, 128))
    assert overflows(result) == {}
    assert result.verdict == "FAIL"  # by what it does to activations


def test_without_scales_values_overflow_that_grow_with_the_width() -> None:
    name = "layers.*.mlp.down"
    result = check(Float8(scaling="none"), inject=outgrow)
    assert overflows(result) == {("overflow_inputs", name): "FAIL"}
    assert by_width(result, name)[:2] == [0, 0]
    assert by_width(result, name)[-1] > 0.03
    drawn = coord_check_data(result)
    curve = drawn[(drawn["panel"] == OVERFLOW) & (drawn["label"] == "down")]
    assert list(curve["width"]) == [32, 64, 128, 256]
    assert list(curve["high"]) == pytest.approx(by_width(result, name))
    assert set(curve["verdict"]) == {"FAIL"}
    (panel,) = [
        axis for axis in coord_check_figure(result).axes if axis.get_title(loc="left") == OVERFLOW
    ]
    assert panel.get_yscale() == "linear"
    assert panel.get_title(loc="right") == "FAIL"


def test_models_without_fp8_have_no_panel_for_it() -> None:
    drawn = coord_check_data(check(Plain(), widths=(32, 64, 128)))
    assert OVERFLOW not in set(drawn["panel"])
