"""The picture of a preflight: every value of the target over what it should be."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pandas as pd

from mutransfer.coord_plot import COLOURS
from mutransfer.preflight_result import KINDS, LABELS, PreflightResult, ratio
from mutransfer.verdict import SEVERITY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_EDGE = 8.0


def preflight_data(result: PreflightResult) -> pd.DataFrame:
    """What the picture shows, one row per judged value.

    Returns:
        Columns stage, kind, name, t, row (from the top); ratio, low, high (found over expected,
        and the ratios beyond which it fails); verdict. Ratios end at 8 and 1/8, where those
        that are not finite are put too.
    """
    rows = []
    for held in result.held:
        at = ratio(held)
        at = _EDGE if not math.isfinite(at) else min(max(at, 1 / _EDGE), _EDGE)
        low, high = (1.0, 1.0) if not held.expected > 0 else (
            held.low / held.expected, held.high / held.expected
        )  # fmt: skip
        rows.append(
            {"stage": held.stage, "kind": held.kind, "name": held.name, "t": held.t,
             "row": list(KINDS).index(held.kind), "ratio": at,
             "low": max(low, 1 / _EDGE / 2), "high": min(high, _EDGE * 2),
             "verdict": held.verdict}
        )  # fmt: skip
    return pd.DataFrame(rows)


def preflight_figure(result: PreflightResult) -> Figure:
    """Draws the replay and the target side by side, a row per kind, a dot per value."""
    from matplotlib.figure import Figure

    data = preflight_data(result)
    figure = Figure(figsize=(15, 8), dpi=120, layout="constrained")
    axes: list[Axes] = list(figure.subplots(1, 2, sharey=True))
    titles = {
        "replay": f"replay: width {result.replayed} against what the coordinate check recorded",
        "target": f"target: width {result.target} against what widths "
        f"{' and '.join(map(str, result.widths))} lead to",
    }
    for axis, (stage, title) in zip(axes, titles.items(), strict=True):
        _panel(axis, data[data["stage"] == stage])
        axis.set_title(title, fontsize=12, loc="left")
    axes[0].set_yticks(range(len(KINDS)), [LABELS[kind] for kind in KINDS], fontsize=11)
    axes[0].invert_yaxis()
    optimizer = {"adamw": "AdamW", "muon": "Muon"}[result.optimizer]
    reason = next(iter(result.culprits), "everything has the size that it should have")
    figure.suptitle(f"preflight, {optimizer}, {result.precision}: {result.verdict}\n{reason}",
                    x=0.01, ha="left", fontsize=13, color=COLOURS[result.verdict])  # fmt: skip
    figure.legend(handles=_legend(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _panel(axis: Axes, data: pd.DataFrame) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xlim(1 / _EDGE / 1.1, _EDGE * 1.1)
    ticks = [2.0**n for n in range(-3, 4)]
    axis.set_xticks(ticks, ["≤ 1/8", "1/4", "1/2", "1", "2", "4", "≥ 8"])
    axis.set_xlabel("found over expected", fontsize=11)
    axis.axvline(1, ls="--", color="black", lw=1.2, zorder=1)
    axis.grid(axis="y", alpha=0.2)
    for row, kind in data.groupby("row"):
        assert isinstance(row, int)
        axis.fill_betweenx([row - 0.38, row + 0.38], kind["low"].min(), kind["high"].max(),
                           color=COLOURS["PASS"], alpha=0.12, lw=0)  # fmt: skip
    for verdict in SEVERITY:
        some = data[data["verdict"] == verdict]
        axis.scatter(some["ratio"], some["row"], s=34, color=COLOURS[verdict], alpha=0.7, zorder=3)


def _legend() -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    dots = [
        Line2D([], [], ls="", marker="o", color=COLOURS[verdict], label=f"a value: {verdict}")
        for verdict in SEVERITY
    ]
    return [*dots, Patch(color=COLOURS["PASS"], alpha=0.15, label="passes or warns")]
