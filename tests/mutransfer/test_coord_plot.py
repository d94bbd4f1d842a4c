"""The picture of the check: its data in closed form, and what must be seen on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mutransfer.coord_expect import Ladder, Thresholds
from mutransfer.coord_plot import COLOURS, PANELS, coord_check_data, coord_check_figure
from mutransfer.coord_result import CoordCheckResult
from mutransfer.coord_verdict import judge
from mutransfer.roles import Role
from mutransfer.symbolic import Finding

WIDTHS, SEEDS, STEPS = (32, 64, 256), 3, 4
ROLES: dict[str, Role] = {
    "embedding.weight": "embedding", "layers.*.q.weight": "hidden", "layers.*.o.weight":
    "hidden_out", "layers.*.norm.weight": "gain",
}  # fmt: skip
LADDER = Ladder(
    optimizer="adamw",
    roles=ROLES,
    fan_in=dict.fromkeys(ROLES, 1.0),
    fan_out=dict.fromkeys(ROLES, 1.0) | {"embedding.weight": 0.0},
    tokens=True,
)
RIGHT = {
    **{("activation", name): 0.0 for name in ("embedding", "layers.*.q", "layers.*.o")},
    ("residual", "layers.*"): 0.0,
    ("attention_logits", "layers.*.attend"): 0.0,
    ("logits", "logits"): -0.3,
    ("logits", "self-token logits"): 0.0,
    ("logits", "other-token logits"): -0.5,
    **{("weight", name): -0.5 if ROLES[name].startswith("hidden") else 0.0 for name in ROLES},
    ("delta_activation", "layers.*.q"): 0.0,
    ("delta_residual", "layers.*"): 0.0,
    ("delta_attention_logits", "layers.*.attend"): 0.0,
    ("delta_logits", "logits"): 0.0,
    **{("update", name): -1.0 if ROLES[name].startswith("hidden") else 0.0 for name in ROLES},
    ("update_norm", "layers.*.q.weight"): 0.0,
    ("update_norm", "layers.*.o.weight"): 0.0,
    ("update_ratio", "layers.*.q.weight"): -0.5,
    ("loss", "loss"): 0.0,
}
"""Everything that a check of a decoder measures, and its right slope."""


def make_result(
    slopes: dict[tuple[str, str], float] | None = None,
    *,
    spread: float = 0.0,
    value: Callable[[str, int, int], float | None] = lambda kind, width, t: None,
    symbolic: tuple[Finding, ...] = (),
    optimizer: str = "adamw",
    skip: tuple[str, ...] = (),
) -> CoordCheckResult:
    """A check whose every value is 3 * width^slope * 2^(spread * (seed - 1))."""
    rows: list[tuple[Any, ...]] = []
    for (kind, name), slope in (RIGHT | (slopes or {})).items():
        if kind in skip:
            continue
        later = kind.startswith(("delta_", "update"))
        for t in (0,) if kind == "weight" else (1, 2, 4) if later else (0, 1, 2, 4):
            for width in WIDTHS:
                for seed in range(SEEDS):
                    usual = 3 * width**slope * 2 ** (spread * (seed - 1))
                    given = value(kind, width, t)
                    rows.append((kind, name, t, width, seed, usual if given is None else given))
    frame = pd.DataFrame(rows, columns=["kind", "name", "t", "width", "seed", "value"])
    quantities, exceptions = judge(frame, LADDER, Thresholds())
    return CoordCheckResult(
        parametrization="completep-tied", optimizer=optimizer, widths=WIDTHS, seeds=SEEDS,
        steps=STEPS, frame=frame, quantities=quantities, exceptions=exceptions,
        symbolic=symbolic,
    )  # fmt: skip


BROKEN = {("update", "layers.*.q.weight"): 0.0, ("delta_activation", "layers.*.q"): 1.0}


def curve(data: pd.DataFrame, kind: str, name: str) -> pd.DataFrame:
    return data[(data["kind"] == kind) & (data["name"] == name)]


def test_a_curve_that_is_exactly_right_is_flat_at_one() -> None:
    result = make_result()
    assert result.verdict == "PASS"
    data = coord_check_data(result)
    curves = data[data["kind"] != "loss"]
    expected = {key for key in RIGHT if key[0] not in ("weight", "update_ratio", "loss")}
    shown = set(zip(curves["kind"], curves["name"], strict=True))
    assert shown == expected - {("logits", "logits")}
    assert len(curves) == len(shown) * len(WIDTHS)
    for column in ("mid", "low", "high"):
        np.testing.assert_allclose(curves[column], 1, rtol=1e-12)
    assert set(curves["verdict"]) == {"PASS"}


@pytest.mark.parametrize("off", [-1.0, 0.5, 1.0])
def test_a_curve_that_is_off_follows_its_error(off: float) -> None:
    key = ("update", "layers.*.o.weight")
    data = coord_check_data(make_result({key: RIGHT[key] + off}))
    wrong = curve(data, *key)
    np.testing.assert_allclose(wrong["mid"], [1, 2**off, 8**off], rtol=1e-12)
    assert wrong["width"].tolist() == [32, 64, 256]
    assert set(wrong["verdict"]) == {"FAIL"}


def test_low_and_high_are_the_extremes_over_seeds() -> None:
    data = coord_check_data(make_result(spread=0.03))
    curves = data[data["kind"] != "loss"]
    np.testing.assert_allclose(curves["mid"], 1, rtol=1e-12)
    np.testing.assert_allclose(curves["low"], 2**-0.03, rtol=1e-12)
    np.testing.assert_allclose(curves["high"], 2**0.03, rtol=1e-12)


def test_changes_are_averaged_over_the_steps_that_are_judged() -> None:
    """At step t the change is t * width^t: steps 2 and 4 are judged, on width^3."""
    key = ("delta_activation", "layers.*.q")
    data = coord_check_data(
        make_result(value=lambda kind, w, t: t * float(w) ** t if kind == key[0] else None)
    )
    np.testing.assert_allclose(curve(data, *key)["mid"], [1, 2**3, 8**3], rtol=1e-12)


def test_what_passes_stands_beside_every_curve() -> None:
    limits = Thresholds()
    data = coord_check_data(make_result())
    update = curve(data, "update", "layers.*.q.weight").iloc[0]
    assert (update["slope_low"], update["slope_high"]) == (-0.1, 0.1)
    logits = curve(data, "delta_logits", "logits").iloc[0]
    assert logits["slope_low"] == -limits.logits_change_below.warn
    assert logits["slope_high"] == limits.change.warn
    own = curve(data, "logits", "self-token logits").iloc[0]
    assert (own["slope_low"], own["slope_high"]) == (-math.inf, limits.self_logits.warn)


def test_the_loss_is_in_nats_at_every_step() -> None:
    data = coord_check_data(
        make_result(
            spread=0.1, value=lambda kind, w, t: 5.5 - t - w / 256 if kind == "loss" else None
        )
    )
    loss = data[data["kind"] == "loss"]
    assert loss["label"].unique().tolist() == ["step 0", "step 1", "step 2", "step 4"]
    first = loss[loss["label"] == "step 0"]
    np.testing.assert_allclose(first["mid"], [5.375, 5.25, 4.5])
    assert set(loss["verdict"]) == {""}
    assert set(loss["slope_high"]) == {math.inf}


def test_curves_are_labelled_by_what_tells_them_apart() -> None:
    data = coord_check_data(make_result())
    labels = {(kind, name): label for kind, name, label in
              zip(data["kind"], data["name"], data["label"], strict=True)}  # fmt: skip
    assert labels["activation", "layers.*.q"] == labels["update", "layers.*.q.weight"] == "q"
    assert labels["residual", "layers.*"] == "residual stream"
    assert labels["logits", "self-token logits"] == "self-token at init"
    assert labels["delta_logits", "logits"] == "change"
    assert labels["attention_logits", "layers.*.attend"] == "at init"


def test_curves_without_a_slope_are_left_out() -> None:
    result = make_result(
        value=lambda kind, w, t: 0.0 if kind == "residual" and w == 64 else
        math.inf if kind == "delta_logits" and w == 256 else None
    )  # fmt: skip
    data = coord_check_data(result)
    kinds = set(data["kind"])
    assert not kinds & {"residual", "delta_logits"}
    assert "delta_residual" in kinds
    assert result.verdict == "FAIL"


def save(figure: Figure) -> None:
    """Lays the figure out and renders it; any complaint on the way is an error."""
    figure.savefig(BytesIO(), format="png", dpi=40)


def panels(figure: Figure) -> list[Axes]:
    """Every panel that is drawn, row by row."""
    return [axis for axis in figure.axes if axis.axison]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for band in figure.subfigs for text in band.texts]


def test_figure_has_a_labelled_panel_per_kind_with_its_verdict() -> None:
    result = make_result(BROKEN)
    figure = coord_check_figure(result)
    save(figure)
    width, height = figure.get_size_inches() * figure.dpi
    assert (width, height) == (1800, 1000)
    axes = panels(figure)
    assert [axis.get_title(loc="left") for axis in axes] == list(dict.fromkeys(PANELS.values()))
    verdicts = {axis.get_title(loc="left"): axis.get_title(loc="right") for axis in axes}
    failed = {PANELS["update"], PANELS["delta_activation"]}
    assert verdicts == {panel: "FAIL" if panel in failed else "PASS" for panel in verdicts}
    for axis in axes:
        assert axis.get_xlabel() == "width"
        assert [tick.get_text() for tick in axis.get_xticklabels()] == ["32", "64", "256"]
        assert axis.get_xscale() == "log"
        loss = axis.get_title(loc="left") == PANELS["loss"]
        assert axis.get_yscale() == ("linear" if loss else "log")
    assert "size over the right size" in axes[0].get_ylabel()
    assert "size over the right size" in axes[4].get_ylabel()
    head, reason = texts(figure)[:2]
    assert head == "completep-tied, AdamW: FAIL"
    assert reason.startswith("first updates of layers.*.q scale as width^+0.00, right is")


def test_figure_of_a_check_that_passes_says_so() -> None:
    figure = coord_check_figure(make_result(optimizer="muon"))
    head, reason = texts(figure)[:2]
    assert head == "completep-tied, Muon: PASS"
    assert reason.startswith("all ")
    assert reason.endswith("from width 32 to 256: the curves are flat")
    (colour,) = {axis.spines["left"].get_edgecolor() for axis in panels(figure)}
    assert colour == pytest.approx(
        [int(COLOURS["PASS"][i : i + 2], 16) / 255 for i in (1, 3, 5)] + [1.0]
    )


def test_the_lines_drawn_are_the_data() -> None:
    result = make_result(BROKEN)
    data = coord_check_data(result)
    for axis in panels(coord_check_figure(result)):
        panel = axis.get_title(loc="left")
        expected = data[data["panel"] == panel].groupby(["kind", "name", "label"], sort=False)
        lines = [line for line in axis.lines if line.get_marker() == "o"]
        assert len(lines) == len(expected)
        for line, (_, points) in zip(lines, expected, strict=True):
            assert list(line.get_xdata()) == points["width"].tolist()
            assert list(line.get_ydata()) == points["mid"].tolist()
            low, high = axis.get_ylim()
            assert low <= min(line.get_ydata()) <= max(line.get_ydata()) <= high
        dashed = [line for line in axis.lines if line.get_linestyle() == "--"]
        assert [list(line.get_ydata()) for line in dashed] == (
            [] if panel == PANELS["loss"] else [[1, 1]]
        )


def test_a_contrast_is_a_second_row_on_the_same_scales() -> None:
    figure = coord_check_figure(make_result(), make_result(BROKEN))
    save(figure)
    axes = panels(figure)
    names = list(dict.fromkeys(PANELS.values()))
    assert [axis.get_title(loc="left") for axis in axes] == names * 2
    top, bottom = axes[: len(names)], axes[len(names) :]
    assert {axis.get_title(loc="right") for axis in top} == {"PASS"}
    wrong = [axis.get_title(loc="left") for axis in bottom if axis.get_title(loc="right") == "FAIL"]
    assert wrong == [PANELS["delta_activation"], PANELS["update"]]
    for upper, lower in zip(top, bottom, strict=True):
        assert upper.get_ylim() == lower.get_ylim()
    told = texts(figure)
    assert told[0] == "completep-tied, AdamW: PASS"
    assert told[2] == "completep-tied, AdamW: FAIL"


def test_symbolic_findings_head_the_figure() -> None:
    finding = Finding(name="norm.weight", field="lr", got=1.0, expected=2.0, sentence="lr is off")
    figure = coord_check_figure(make_result(symbolic=(finding,)))
    assert texts(figure)[:2] == ["completep-tied, AdamW: FAIL", "lr is off"]


def test_figure_of_a_model_without_attention() -> None:
    skipped = ("residual", "delta_residual", "attention_logits", "delta_attention_logits")
    figure = coord_check_figure(make_result(skip=skipped))
    save(figure)
    titles = [axis.get_title(loc="left") for axis in panels(figure)]
    assert PANELS["attention_logits"] not in titles
    assert PANELS["logits"] in titles


def test_curves_of_any_model_are_named_in_the_legend_in_colours_of_their_own() -> None:
    def renamed(name: str) -> str:
        return name.replace("layers.*.q", "blocks.*.mix_proj")

    result = make_result()
    foreign = replace(
        result,
        frame=result.frame.assign(name=result.frame["name"].map(renamed)),
        quantities=tuple(replace(q, name=renamed(q.name)) for q in result.quantities),
    )
    figure = coord_check_figure(foreign)
    save(figure)
    (legend,) = figure.subfigs[-1].legends
    colours = {
        text.get_text(): handle.get_color()  # type: ignore[attr-defined]
        for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True)
        if text.get_text() not in ("right", "slopes that pass")
    }
    assert colours.keys() == {"embedding", "mix", "o", "norm", "residual stream"}
    assert len(set(map(str, colours.values()))) == len(colours)
    activations = panels(figure)[0]
    drawn = {str(line.get_color()) for line in activations.lines if line.get_marker() == "o"}
    assert str(colours["mix"]) in drawn


@pytest.mark.parametrize("bad", [math.inf, math.nan, 0.0])
def test_figure_of_a_run_that_diverges_or_learns_by_heart(bad: float) -> None:
    figure = coord_check_figure(
        make_result(value=lambda kind, w, t: bad if kind == "loss" and t == 4 and w > 32 else None)
    )
    save(figure)
    (loss,) = [axis for axis in panels(figure) if axis.get_title(loc="left") == PANELS["loss"]]
    assert np.isfinite(loss.get_ylim()).all()
    assert loss.get_title(loc="right") == "PASS"  # it is the loss at init that is judged
    last = next(line for line in loss.lines if line.get_label() == "step 4").get_ydata()
    assert last[0] == pytest.approx(3)
    assert last[1] == pytest.approx(bad, nan_ok=True)
