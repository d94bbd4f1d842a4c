"""The picture of a transfer check: loss over learning rate, a panel per arm, a curve per width."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from mutransfer.transfer_fit import Floats
from mutransfer.transfer_frame import read_runs
from mutransfer.transfer_result import ArmResult, TransferResult, drift_text, regret_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 3


def transfer_data(frame: pd.DataFrame, result: TransferResult) -> pd.DataFrame:
    """What the picture shows, apart from the optima that `result` holds.

    Args:
        frame: The runs that were given to `transfer_check`.
        result: What it made of them; gives the order of the arms.

    Returns:
        One row per arm, width and learning rate: `arm`, `width`, `lr`, `loss` (mean over the
        seeds that did not diverge, NaN without any), `error` (standard error of it over seeds,
        zero with fewer than two), `seeds` (runs) and `diverged` (how many of them did).
    """
    runs = read_runs(frame)
    runs["diverged"] = np.isinf(runs["loss"])
    runs["finite"] = runs["loss"].where(~runs["diverged"])
    cells = runs.groupby(["arm", "width", "log2_lr"])
    data = pd.DataFrame(
        {
            "loss": cells["finite"].mean(),
            "error": cells["finite"].sem().fillna(0.0),
            "seeds": cells.size(),
            "diverged": cells["diverged"].sum(),
        }
    ).reset_index()
    data.insert(2, "lr", np.exp2(data.pop("log2_lr")))
    order = {arm.arm: place for place, arm in enumerate(result.arms)}
    return data.sort_values(
        ["arm", "width", "lr"],
        key=lambda column: column.map(order) if column.name == "arm" else column,
        ignore_index=True,
    )


def loss_ceiling(losses: Floats) -> float:
    """Upper end of the loss axis: one run that nearly diverged must not flatten the minima.

    Four times as far above the lowest loss as the median is, or the highest loss if that is
    lower.
    """
    lowest = float(losses.min())
    return min(float(losses.max()), lowest + 4 * (float(np.median(losses)) - lowest))


def transfer_figure(frame: pd.DataFrame, result: TransferResult) -> Figure:
    """Draws the runs with the optima found.

    Losses share one axis over all arms. Points above it, and learning rates at which a seed
    diverged, are marked at its upper edge.

    Args:
        frame: The runs that were given to `transfer_check`.
        result: What it made of them.
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_hex
    from matplotlib.figure import Figure

    data = transfer_data(frame, result)
    columns = min(len(result.arms), _COLUMNS)
    rows = math.ceil(len(result.arms) / columns)
    figure = Figure(figsize=(max(6.0, 5.2 * columns), 4.9 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    widths = sorted(data["width"].unique())
    shades = np.linspace(0.0, 0.88, len(widths))
    colours = {
        width: to_hex(colormaps["viridis"](x)) for width, x in zip(widths, shades, strict=True)
    }
    finite = data["loss"].dropna().to_numpy()
    if finite.size:
        low, high = float(finite.min()), loss_ceiling(finite)
        margin = max(high - low, 1e-3)
        grid[0, 0].set_ylim(low - 0.06 * margin, high + 0.12 * margin)
    for place, axes in enumerate(grid.flat):
        if place >= len(result.arms):
            axes.set_visible(False)
            continue
        arm = result.arms[place]
        axes.set_xscale("log", base=2)
        axes.set_xlim(data["lr"].min() / 2**0.5, data["lr"].max() * 2**0.5)
        for width, cells in data[data["arm"] == arm.arm].groupby("width"):
            _draw_curve(axes, cells, colours[width], 0.98 - 0.025 * widths.index(width))
        _draw_optima(axes, arm, colours)
        axes.grid(alpha=0.25, lw=0.6)
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("base learning rate")
        axes.set_title(_title(arm), fontsize=10)
    for row in grid:
        row[0].set_ylabel("held-out loss (nats per token)")
    shown = {
        "best point, no optimum": any(not o.interior for arm in result.arms for o in arm.optima),
        "a seed diverged": bool(data["diverged"].any()),
        "above the axis": bool((data["loss"] > grid[0, 0].get_ylim()[1]).any()),
    }
    _legend(grid[0, -1], colours, shown={label for label, there in shown.items() if there})
    return figure


def _draw_curve(axes: Axes, cells: pd.DataFrame, colour: str, edge: float) -> None:
    """One curve; what lies above the axis goes to the height `edge`, a fraction of the axis."""
    top = axes.get_ylim()[1]
    held = cells["diverged"] == 0
    axes.errorbar(
        cells["lr"].where(held), cells["loss"].where(held), yerr=cells["error"],
        color=colour, marker="o", ms=3.5, lw=1.3, capsize=2, elinewidth=0.9,
    )  # fmt: skip
    for marker, size, where in (("x", 6, ~held), ("^", 4.5, held & (cells["loss"] > top))):
        axes.plot(cells["lr"][where], np.full(where.sum(), edge), marker, color=colour, ms=size,
                  transform=axes.get_xaxis_transform())  # fmt: skip


def _draw_optima(axes: Axes, arm: ArmResult, colours: dict[int, str]) -> None:
    bottom, top = axes.get_ylim()
    left, right = axes.get_xlim()
    for optimum in arm.optima:
        if optimum.best_log2_lr is None or optimum.best_loss > top:
            continue
        colour, y = colours[optimum.width], optimum.best_loss - 0.012 * (top - bottom)
        if optimum.log2_lr is not None:
            ends = np.exp2(np.clip([optimum.low, optimum.high], -1000, 1000))
            axes.hlines(y, max(ends[0], left), min(ends[1], right), color=colour, lw=5, alpha=0.45)
            axes.plot(2.0**optimum.log2_lr, y, "*", color=colour, ms=13, mec="black", mew=0.7,
                      zorder=5)  # fmt: skip
        else:
            axes.plot(2.0**optimum.best_log2_lr, y, "o", mfc="none", mec="crimson", ms=11, mew=1.4,
                      zorder=5)  # fmt: skip


def _title(arm: ArmResult) -> str:
    kind = " (contrast)" if arm.contrast else ""
    return f"{arm.arm}{kind}: {arm.verdict}\n{drift_text(arm)}\n{regret_text(arm)}"


def _legend(axes: Axes, colours: dict[int, str], *, shown: set[str]) -> None:
    """A legend of the widths, the optima and those other markers that are `shown`."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, marker="o", ms=4, label=f"width {width}")
        for width, colour in colours.items()
    ]
    handles += [
        Line2D([], [], color="0.4", marker="*", ms=12, mec="black", lw=5, alpha=0.6,
               label="optimum, 95% interval"),
    ]  # fmt: skip
    others = {
        "best point, no optimum": {"marker": "o", "mfc": "none", "mec": "crimson", "ms": 10},
        "a seed diverged": {"marker": "x", "color": "0.3"},
        "above the axis": {"marker": "^", "color": "0.3", "ms": 4.5},
    }
    handles += [
        Line2D([], [], ls="", label=label, **style)  # type: ignore[arg-type]
        for label, style in others.items()
        if label in shown
    ]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=9,
                frameon=False)  # fmt: skip
