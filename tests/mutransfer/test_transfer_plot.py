"""The picture of a transfer check: its data, and that what must be seen is on it."""

from __future__ import annotations

import math
from io import BytesIO

import numpy as np
import pandas as pd
import pytest

from mutransfer.transfer import transfer_check
from mutransfer.transfer_plot import loss_ceiling, transfer_data, transfer_figure


@pytest.fixture
def frame() -> pd.DataFrame:
    """`mup` is best at 2^-6; `sp` at 2^-6, then beyond the grid, and diverges at 2^-4."""
    rows = []
    for arm, optima in (("mup", (-6, -6)), ("sp", (-6, -9))):
        for width, optimum in zip((32, 64), optima, strict=True):
            for x in range(-8, -3):
                for seed in range(3):
                    loss = 3 + 0.1 * (x - optimum) ** 2 + 0.01 * seed
                    diverged = arm == "sp" and width == 64 and x == -4 and seed < 2
                    rows.append((arm, width, 2.0**x, seed, math.nan if diverged else loss))
    return pd.DataFrame(rows, columns=["arm", "width", "lr", "seed", "loss"])


def test_data_are_means_and_errors_over_the_seeds_that_held(frame: pd.DataFrame) -> None:
    data = transfer_data(frame, transfer_check(frame, bootstrap=50))
    assert list(data) == ["arm", "width", "lr", "loss", "error", "seeds", "diverged"]
    assert len(data) == 2 * 2 * 5
    assert data["arm"].tolist() == ["mup"] * 10 + ["sp"] * 10
    first, last = data.iloc[0], data.iloc[-1]
    assert (first["width"], first["lr"], first["seeds"], first["diverged"]) == (32, 2**-8, 3, 0)
    assert first["loss"] == pytest.approx(3.41)
    assert first["error"] == pytest.approx(0.01 / math.sqrt(3))
    assert (last["seeds"], last["diverged"], last["error"]) == (3, 2, 0)
    assert last["loss"] == pytest.approx(3 + 0.1 * 25 + 0.02)


def test_arms_are_in_the_order_of_the_result(frame: pd.DataFrame) -> None:
    result = transfer_check(frame, contrast=("mup",), bootstrap=50)
    assert transfer_data(frame, result)["arm"].unique().tolist() == ["sp", "mup"]


def test_ceiling_cuts_outliers_only() -> None:
    assert loss_ceiling(np.array([2.0, 2.5, 3.0])) == 3
    assert loss_ceiling(np.array([2.0, 2.1, 2.2, 2.3, 90.0])) == pytest.approx(2.8)
    assert loss_ceiling(np.array([2.0])) == 2


def test_figure_has_a_titled_panel_per_arm_and_marks_what_it_should(frame: pd.DataFrame) -> None:
    frame.loc[(frame["arm"] == "mup") & (frame["lr"] == 2**-4), "loss"] += 50
    result = transfer_check(frame, bootstrap=50)
    figure = transfer_figure(frame, result)
    figure.savefig(BytesIO(), format="png", dpi=50)
    good, bad = figure.axes
    assert good.get_title().startswith("mup: PASS\ndrift 0.00 [0.00, 0.00] octaves\nregret 0.0000")
    assert bad.get_title().startswith("sp (contrast): FAIL\ndrift ≥ ")
    assert good.get_ylim()[1] < 10
    assert _points(good, "^") == [2**-4, 2**-4]  # both widths are above the axis
    assert _points(good, "*") == pytest.approx([2**-6, 2**-6])
    assert _points(bad, "x") == [2**-4]
    assert _points(bad, "*") == pytest.approx([2**-6])
    legend = [text.get_text() for text in bad.get_legend().get_texts()]
    assert legend == [
        "width 32", "width 64", "optimum, 95% interval", "best point, no optimum",
        "a seed diverged", "above the axis",
    ]  # fmt: skip
    assert good.get_xaxis().get_major_formatter()(2**-6) == r"$\mathdefault{2^{-6}}$"


def test_figure_of_nothing_but_divergence(frame: pd.DataFrame) -> None:
    frame["loss"] = math.nan
    figure = transfer_figure(frame, transfer_check(frame, bootstrap=50))
    figure.savefig(BytesIO(), format="png", dpi=50)
    assert _points(figure.axes[0], "x") == [2.0**x for _ in range(2) for x in range(-8, -3)]


def _points(axes: object, marker: str) -> list[float]:
    lines = [line for line in axes.lines if line.get_marker() == marker]  # type: ignore[attr-defined]
    return [float(x) for line in lines for x in line.get_xdata()]
