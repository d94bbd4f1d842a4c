"""Pictures of a sweep's report: its history, and lines through the optimum."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from mutransfer.bundle_evidence import Study
from mutransfer.transfer_plot import loss_ceiling
from sweeps.plots import power_label
from sweeps.surface import Surface

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def history_data(record: Study) -> pd.DataFrame:
    """One row per trial: `number`, `state`, `loss` (nats, mean over seeds; NaN unless complete),
    `error` (its standard error, NaN with one seed) and `best`, the lowest loss so far."""
    rows = [
        {
            "number": t.number,
            "state": t.state,
            "loss": t.mean_loss if t.state == "COMPLETE" else math.nan,
            "error": t.standard_error,
        }
        for t in record.trials
        if t.state in ("COMPLETE", "PRUNED", "FAIL")
    ]
    frame = pd.DataFrame(rows).astype({"loss": float, "error": float}).sort_values("number")
    return frame.assign(best=frame["loss"].cummin().ffill())


def history_figure(record: Study) -> Figure:
    """Loss over the number of the trial, and the lowest so far."""
    from matplotlib.figure import Figure

    data = history_data(record)
    complete = data[data["state"] == "COMPLETE"]
    losses = complete["loss"].to_numpy()
    low, high = float(losses.min()), loss_ceiling(losses)
    margin = max(high - low, 1e-3)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_ylim(low - 0.08 * margin, high + 0.2 * margin)
    axes.errorbar(complete["number"], losses.clip(max=high), yerr=complete["error"], fmt="o", ms=4,
                  color="tab:blue", alpha=0.7, capsize=2,
                  label=f"complete ({len(complete)}), with standard error over seeds")  # fmt: skip
    for state, word, marker, colour, height in (
        ("PRUNED", "pruned", "v", "0.6", 0.93),
        ("FAIL", "diverged", "x", "tab:orange", 0.98),
    ):
        x = data.loc[data["state"] == state, "number"]
        if len(x):
            axes.plot(x, np.full(len(x), height), marker, color=colour, ms=5,
                      transform=axes.get_xaxis_transform(), label=f"{word} ({len(x)})")  # fmt: skip
    axes.step(data["number"], data["best"], where="post", color="crimson", label="lowest so far")
    winner = record.winner
    assert winner is not None
    assert winner.mean_loss is not None
    axes.plot(winner.number, winner.mean_loss, "*", color="crimson", mec="black",
              mew=0.6, ms=14, zorder=5, label=f"winner: trial {winner.number}")  # fmt: skip
    axes.set_xlabel("number of the trial")
    axes.set_ylabel("held-out loss (nats)")
    axes.grid(alpha=0.25, lw=0.6)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=9, frameon=False)
    return figure


def surface_figure(surface: Surface, record: Study) -> Figure:
    """The fitted loss along each hyperparameter, all else at the optimum, with its 95% band."""
    from matplotlib.figure import Figure

    columns = min(3, len(surface.axes))
    rows = math.ceil(len(surface.axes) / columns)
    figure = Figure(figsize=(max(6.0, 4.0 * columns + 2), 3.4 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    seen = [t.mean_loss for t in record.trials if t.state == "COMPLETE" and t.mean_loss is not None]
    low, high = min(surface.loss_low, *seen), float(np.median(seen))
    grid[0, 0].set_ylim(low - 0.1 * (high - low), high)
    assert record.winner is not None
    for axes, (name, axis) in zip(grid.flat, surface.axes.items(), strict=False):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: power_label(x))
        axes.fill_between(axis.values, axis.losses_low, axis.losses_high, color="tab:blue",
                          alpha=0.2, lw=0, label="its 95% band")  # fmt: skip
        axes.plot(axis.values, axis.losses, color="tab:blue", label="fitted loss")
        axes.axvspan(axis.low, axis.high, color="tab:green", alpha=0.15, lw=0,
                     label="optimum, 95% interval")  # fmt: skip
        axes.axvline(axis.optimum, color="tab:green", lw=1)
        axes.axvline(axis.default, color="0.4", ls="--", lw=1, label="default")
        axes.plot(record.winner.params[name], record.winner.mean_loss, "*", color="crimson",
                  mec="black", mew=0.6, ms=12, ls="", label="winner")  # fmt: skip
        axes.set_xlim(axis.values[0], axis.values[-1])
        axes.set_xlabel(name)
        axes.grid(alpha=0.25, lw=0.6)
    for axes in list(grid.flat)[len(surface.axes) :]:
        axes.set_visible(False)
    for row in grid:
        row[0].set_ylabel("held-out loss (nats)")
    figure.suptitle("loss along each hyperparameter, the others at the optimum")
    grid[0, -1].legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=9, frameon=False)
    return figure
