"""Plots of a sweep: parallel coordinates, slices and importance of the hyperparameters."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import optuna
import pandas as pd

from mutransfer.transfer_plot import loss_ceiling
from sweeps.plot_data import STATES, SweepData, importance_data, parallel_data, sweep_data

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {"PRUNED": "0.6", "FAIL": "tab:orange", "best": "crimson"}


def sweep_figures(study: optuna.Study, best: int | None = None) -> dict[str, Figure]:
    """All plots of a sweep, by file name without extension.

    Args:
        study: The study.
        best: Number of the trial to mark; `None` is that with the lowest loss.
    """
    data = sweep_data(study, best)
    return {
        "parallel": parallel_figure(data),
        "slices": slice_figure(data),
        "importance": importance_figure(*importance_data(study)),
    }


def parallel_figure(data: SweepData) -> Figure:
    """One line per trial over axes of its hyperparameters and its loss, coloured by loss."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    heights, ends = parallel_data(data)
    names, places = [*data.parameters, "loss"], np.arange(heights.shape[1])
    figure = Figure(figsize=(max(7.0, 1.6 * len(places)), 5), layout="constrained")
    axes = figure.subplots()
    for state, style in (("FAIL", ":"), ("PRUNED", "-")):
        rows = heights[data.trials["state"] == state]
        axes.plot(places, rows.T, style, color=_COLOURS[state], lw=0.8, alpha=0.6)
    for row in data.complete.index:
        axes.plot(places, heights[row], color=colormaps["viridis"](heights[row, -1]), lw=1,
                  alpha=0.75)  # fmt: skip
    for row in data.best_row.index:
        axes.plot(places, heights[row], color=_COLOURS["best"], lw=2.5)
    box = {"fc": "white", "ec": "none", "alpha": 0.7, "pad": 0.5}
    for place, name in enumerate(names):
        axes.axvline(place, color="black", lw=0.8)
        low, high = ends[place]
        for height in (0.0, 0.25, 0.5, 0.75, 1.0) if low < high else (0.5,):
            value = low + (high - low) * height
            if name in data.log:
                value = low * (high / low) ** height
            axes.annotate(f"{value:.3g}", (place, height), (3, 0), textcoords="offset points",
                          fontsize=7.5, va="center", bbox=box)  # fmt: skip
    axes.set_xticks(
        places, ["\n".join(name.rsplit("_", 1)) for name in (*names[:-1], "loss_(nats)")]
    )
    axes.set_xlim(-0.1, len(places) - 1 + 0.45)
    axes.set_ylim(-0.05, 1.05)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_title(_title(data))
    _legend(axes, data, lines=True)
    return figure


def slice_figure(data: SweepData) -> Figure:
    """Loss over each hyperparameter, cut off at `loss_ceiling`; trials without one on top."""
    from matplotlib.figure import Figure

    columns = min(3, len(data.parameters))
    rows = math.ceil(len(data.parameters) / columns)
    figure = Figure(figsize=(max(5.0, 4.0 * columns), 3.4 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    complete, best = data.complete, data.best_row
    losses = complete["loss"].to_numpy()
    if losses.size:
        low, high = float(losses.min()), loss_ceiling(losses)
        margin = max(high - low, 1e-3)
        grid[0, 0].set_ylim(low - 0.08 * margin, high + 0.2 * margin)
        losses = losses.clip(max=high)
    for place, axes in enumerate(grid.flat):
        if place >= len(data.parameters):
            axes.set_visible(False)
            continue
        name = data.parameters[place]
        if name in data.log:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda x, _: power_label(x))
        axes.plot(complete[name], losses, "o", color="tab:blue", ms=4, alpha=0.6)
        for state, marker, height in (("PRUNED", "v", 0.93), ("FAIL", "x", 0.98)):
            x = data.trials.loc[data.trials["state"] == state, name]
            axes.plot(x, np.full(len(x), height), marker, color=_COLOURS[state], ms=5, alpha=0.8,
                      transform=axes.get_xaxis_transform())  # fmt: skip
        axes.plot(best[name], best["loss"], "*", color=_COLOURS["best"], mec="black", mew=0.6,
                  ms=14, zorder=5)  # fmt: skip
        axes.set_xlabel(name)
        axes.grid(alpha=0.25, lw=0.6)
    for row in grid:
        row[0].set_ylabel("held-out loss (nats)")
    figure.suptitle(_title(data))
    _legend(grid[0, -1], data, lines=False)
    return figure


def power_label(value: float) -> str:
    """`8`, `0.5`, and below a quarter the power of two, as learning rates are quoted."""
    return f"{value:.3g}" if value >= 0.25 else f"$2^{{{round(math.log2(value))}}}$"


def importance_figure(shares: pd.Series[float], note: str) -> Figure:
    """Bars of `importance_data`, the largest on top; the note alone where there are none."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.4 + 0.42 * max(len(shares), 2)), layout="constrained")
    axes = figure.subplots()
    axes.set_title(f"importance of the hyperparameters\n{note}", fontsize=10)
    if shares.empty:
        axes.set_axis_off()
        return figure
    bars = axes.barh(list(shares.index), shares.to_numpy(), color="tab:blue")
    axes.bar_label(bars, [f"{share:.0%}" for share in shares], padding=3)
    axes.invert_yaxis()
    axes.set_xlim(0, float(shares.max()) * 1.15)
    axes.set_xlabel("share")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _title(data: SweepData) -> str:
    if data.best is None:
        return "no trial is complete"
    return f"best: trial {data.best}, loss {data.best_row['loss'].iloc[0]:.4f} nats"


def _legend(axes: Axes, data: SweepData, *, lines: bool) -> None:
    """A legend, beside the axes, of the states that occur, with their numbers of trials."""
    from matplotlib.lines import Line2D

    colours = {"COMPLETE": "tab:purple" if lines else "tab:blue", **_COLOURS}
    markers = {"COMPLETE": "o", "PRUNED": "v", "FAIL": "x", "best": "*"}
    words = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
    counts = data.trials["state"].value_counts()
    texts = {state: f"{words[state]} ({counts[state]})" for state in STATES if state in counts}
    if data.best is not None:
        texts["best"] = f"trial {data.best}"
    handles: list[Line2D] = []
    for key, text in texts.items():
        handle = Line2D([], [], color=colours[key], label=text)
        if lines:
            handle.set_linestyle(":" if key == "FAIL" else "-")
        else:
            handle.set(linestyle="", marker=markers[key])
        handles.append(handle)
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=9,
                frameon=False)  # fmt: skip
