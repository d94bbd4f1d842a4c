"""The picture of a coordinate check: flat is right.

Every curve is divided by its own value at the narrowest width and by the power of the width
that it should follow, so that a right curve is flat whatever it measures, and one dashed line
and one green fan (what passes) serve all curves of a panel.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from mutransfer.coord_result import CoordCheckResult
from mutransfer.coord_verdict import Quantity
from mutransfer.verdict import SEVERITY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = {
    "activation": "activations\nat init",
    "residual": "activations\nat init",
    "branch": "activations\nat init",
    "delta_activation": "change of\nactivations",
    "delta_residual": "change of\nactivations",
    "delta_branch": "change of\nactivations",
    "attention_logits": "attention logits",
    "delta_attention_logits": "attention logits",
    "logits": "logits",
    "delta_logits": "logits",
    "update": "updates\n(RMS)",
    "later_update": "updates\n(RMS)",
    "update_norm": "updates\n(operator norm)",
    "loss": "loss\n(nats)",
}
"""Panel by kind; several kinds may share one."""

LATE_PANELS = PANELS | {"weight": "weights\n(RMS)"}
"""The same where models were trained before the check: what is left of the init shows."""

OVERFLOW = "out of FP8's\nrange (share)"
LINEAR = (PANELS["loss"], OVERFLOW)
"""Panels that show plain values and no slopes."""

COLOURS = {"PASS": "#1a7f37", "WARN": "#b35900", "FAIL": "#c4162a"}
LINES = ("embedding", "q", "k", "v", "o", "gate", "up", "down", "norm", "block's share")
"""Curves with a colour of their own, by their name; other models' get what is left."""


def coord_check_data(result: CoordCheckResult) -> pd.DataFrame:
    """What the picture shows, one row per curve and width.

    Returns:
        Columns panel, kind, name, label, width; mid, low, high (geometric mean and extremes
        over seeds, relative to the narrowest width and to the right power of the width; plain
        nats for the loss, plain shares for FP8's overflow); slope_low, slope_high (what passes,
        infinite where not judged); verdict (empty for the loss after training). Curves without
        a slope are left out.
    """
    rows = []
    panels = _panels(result)
    for q in result.quantities:
        if q.kind not in panels or q.slope is None or q.kind == "loss":
            continue
        if q.kind.startswith("overflow"):
            rows += _overflow(q, result.frame)
            continue
        points = _points(result.frame, q.kind, q.name, q.times)
        points -= points.loc[min(result.widths)].mean()
        right = q.expected * np.log2(points.index.get_level_values("width") / min(result.widths))
        rows += _rows(q, panels[q.kind], _label(q), points - right)
    for t in sorted(result.frame["t"].unique()):
        points = _points(result.frame, "loss", "loss", (int(t),))
        label = f"step {'+' if result.trained else ''}{t}"
        rows += [
            {"panel": PANELS["loss"], "kind": "loss", "name": "loss", "label": label,
             **row, "slope_low": -np.inf, "slope_high": np.inf, "verdict": ""}
            for row in _spread(points)
        ]  # fmt: skip
    return pd.DataFrame(rows)


def _points(frame: pd.DataFrame, kind: str, name: str, times: tuple[int, ...]) -> Any:
    """log2 of the values by (width, seed), averaged over `times`."""
    found = frame[(frame["kind"] == kind) & (frame["name"] == name) & frame["t"].isin(times)]
    with np.errstate(divide="ignore"):  # the loss of a batch learned by heart is zero
        log = np.log2(found["value"])
    return log.groupby([found["width"], found["seed"]]).mean()


def _overflow(q: Quantity, frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The share that FP8 casts clamp at its worst step, where any model has any."""
    found = frame[(frame["kind"] == q.kind) & (frame["name"] == q.name)]
    shares: Any = found.groupby(["width", "seed"])["value"].max().groupby(level="width")
    fixed = {"panel": OVERFLOW, "kind": q.kind, "name": q.name, "label": _label(q),
             "slope_low": -np.inf, "slope_high": np.inf, "verdict": q.verdict}  # fmt: skip
    ends = zip(shares.groups, shares.mean(), shares.min(), shares.max(), strict=True)
    return [
        fixed | {"width": float(width), "mid": mid, "low": low, "high": high}
        for width, mid, low, high in ends
        if found["value"].any()
    ]


def _panels(result: CoordCheckResult) -> dict[str, str]:
    panels = LATE_PANELS if result.trained else PANELS
    overflow = {q.kind: OVERFLOW for q in result.quantities if q.kind.startswith("overflow")}
    return panels | overflow


def _rows(q: Quantity, panel: str, label: str, points: Any) -> list[dict[str, Any]]:
    fixed = {
        "panel": panel,
        "kind": q.kind,
        "name": q.name,
        "label": label,
        "slope_low": -np.inf if q.warn_below is None else -q.warn_below,
        "slope_high": q.warn,
        "verdict": q.verdict,
    }
    return [fixed | row for row in _spread(points)]


def _spread(points: Any) -> list[dict[str, float]]:
    by_width = points.groupby(level="width")
    ends = zip(by_width.mean(), by_width.min(), by_width.max(), strict=True)
    return [
        {"width": float(width), "mid": 2.0**mid, "low": 2.0**low, "high": 2.0**high}
        for width, (mid, low, high) in zip(by_width.groups, ends, strict=True)
    ]


def _label(q: Quantity) -> str:
    """A curve's name in the legend: the last part that tells it apart."""
    if q.kind.endswith("residual"):
        return "residual stream"
    if q.kind.endswith("branch"):
        return "block's share"
    if q.kind.endswith("logits"):
        words = {"attention_logits": "at init", "delta_attention_logits": "change",
                 "delta_logits": "change"}  # fmt: skip
        text = words.get(q.kind, f"{q.name.removesuffix(' logits')} at init")
        return text.replace("at init", "size") if q.trained else text
    parts = [part for part in q.name.split(".") if part not in ("layers", "*", "weight")]
    last = parts[-1].removesuffix("_proj")  # Llama's names
    return "norm" if last.endswith("norm") else last


def coord_check_figure(
    result: CoordCheckResult, contrast: CoordCheckResult | None = None, *, precision: str = "fp32"
) -> Figure:
    """Draws the check as small multiples, 1800 x 1000 pixels; a contrast is a second row.

    Args:
        result: The check that counts.
        contrast: Another one to hold beside it, such as the standard parametrization's.
        precision: What the models computed in; named where it is not fp32.
    """
    from matplotlib.figure import Figure

    results = [result] if contrast is None else [result, contrast]
    data = [coord_check_data(each) for each in results]
    drawn = {panel for frame in data for panel in frame["panel"]}
    drawn |= {_panels(each).get(q.kind, "") for each in results for q in each.quantities}
    panels = [p for p in dict.fromkeys(_panels(result).values()) if p in drawn]
    columns = 4 if contrast is None else len(panels)
    colours = _colours(data)
    figure = Figure(figsize=(18, 10), dpi=100, layout="constrained")
    head = 0.15 if contrast is not None else 0.08
    bands: Any = figure.subfigures(2 * len(results) + 1, 1,
                              height_ratios=[*[head, 1] * len(results), 0.08])  # fmt: skip
    axes: list[list[Axes]] = []
    for index, (each, frame) in enumerate(zip(results, data, strict=True)):
        _headline(bands[2 * index], each, precision)
        band = bands[2 * index + 1]
        grid = band.subplots(-(-len(panels) // columns), columns, squeeze=False).flatten()
        axes.append(list(grid[: len(panels)]))
        for axis, panel in zip(axes[-1], panels, strict=True):
            _panel(axis, panel, each, frame[frame["panel"] == panel], colours)
        for axis in grid[::columns][: -(-len(panels) // columns)]:
            smallest = "narrowest" if each.axis == "width" else "shallowest"
            axis.set_ylabel(f"size over the right size\n({smallest} = 1)", fontsize=11)
        for spare in grid[len(panels) :]:
            spare.set_axis_off()
            told = [textwrap.fill(line, 46) for line in each.culprits[1:4]]
            spare.text(0, 1, "\n\n".join(told), va="top", fontsize=11, in_layout=False)
    for column in zip(*axes, strict=True):
        _same_scale(column)
    _legend(bands[-1], colours)
    return figure


def _headline(band: Any, result: CoordCheckResult, precision: str) -> None:
    """The verdict of one check and its first reason, over its row."""
    optimizer = {"adamw": "AdamW", "muon": "Muon"}[result.optimizer]
    reason = (
        f"all {len(result.quantities)} quantities keep their right size from {result.axis} "
        f"{min(result.widths)} to {max(result.widths)}: the curves are flat"
    )
    if result.trained or result.axis == "depth":
        reason = reason.replace("the curves are flat", "no curve leaves what passes")
    reason = textwrap.shorten(next(iter(result.culprits), reason), 210, placeholder=" …")
    which = f", after {result.trained} steps" if result.trained else ""
    which += f", {precision}" if precision != "fp32" else ""
    head = f"{result.parametrization}, {optimizer}{which}: {result.verdict}"
    band.text(0.01, 0.7, head, fontsize=18, fontweight="bold", va="center",
              color=COLOURS[result.verdict])  # fmt: skip
    band.text(0.01, 0.16, reason, fontsize=12, va="center")


def _panel(
    axis: Axes, panel: str, result: CoordCheckResult, frame: pd.DataFrame, colours: dict[str, Any]
) -> None:
    verdicts = [q.verdict for q in result.quantities if _panels(result).get(q.kind) == panel]
    verdict = max(verdicts, key=SEVERITY.index, default="")
    title = panel
    if len(set(_panels(result).values())) > 7:  # each is narrower
        title = title.replace("n logits", "n\nlogits").replace("operator ", "")
    if result.trained:
        title = title.replace("\nat init", "")
    axis.set_title(title, fontsize=12, loc="left")
    axis.set_xscale("log", base=2)
    axis.set_xticks(result.widths, [str(width) for width in result.widths], fontsize=10)
    axis.minorticks_off()
    axis.set_xlabel(result.axis, fontsize=11)
    if panel not in LINEAR:
        axis.set_yscale("log", base=2)
    for (_, _, label), curve in frame.groupby(["kind", "name", "label"], sort=False):
        style = _style(str(label), panel, colours)
        axis.plot(curve["width"], curve["mid"], marker="o", markersize=4, lw=1.8, **style)
        axis.fill_between(curve["width"], curve["low"], curve["high"], alpha=0.12, lw=0,
                          color=style["color"])  # fmt: skip
    if panel not in LINEAR:
        _fan(axis, result.widths, frame)
    if len(frame) and panel in (PANELS["logits"], PANELS["attention_logits"], PANELS["loss"]):
        axis.legend(fontsize=9, frameon=False, loc="upper left")
    if verdict:
        axis.set_title(verdict, fontsize=14, loc="right", fontweight="bold",
                       color=COLOURS[verdict])  # fmt: skip
        for spine in axis.spines.values():
            spine.set_color(COLOURS[verdict])
            spine.set_linewidth(2)


def _fan(axis: Axes, widths: tuple[int, ...], frame: pd.DataFrame) -> None:
    """The dashed line that is right, and the slopes that pass for the most lenient curve.

    Where a curve is judged upwards only, everything below is shaded too, more lightly.
    """
    ends, relative = [min(widths), max(widths)], np.array([1.0, max(widths) / min(widths)])
    axis.plot(ends, [1, 1], ls="--", lw=1.5, color="black", zorder=3)
    low, high = frame["slope_low"], frame["slope_high"]
    shades = [(np.zeros(2) + 1e-9, 0.05)] if np.isinf(low).any() else []
    if np.isfinite(low).any():
        shades.append((relative ** low[np.isfinite(low)].min(), 0.12))
    top = relative ** (high.max() if len(high) else 0.0)
    limits = axis.get_ylim()
    for bottom, alpha in shades:
        axis.fill_between(ends, bottom, top, color=COLOURS["PASS"], alpha=alpha, lw=0, zorder=0)
    axis.set_ylim(min(limits[0], relative[1] ** -0.1), max(limits[1], top[1]))


def _colours(data: list[pd.DataFrame]) -> dict[str, Any]:
    """Colour by label of all curves that have one in every panel, in the legend's order."""
    from matplotlib import colormaps

    own = (*LINEAR[:1], PANELS["logits"], PANELS["attention_logits"])
    found = [label for frame in data for label in frame[~frame["panel"].isin(own)]["label"]]
    labels = dict.fromkeys(map(str, found))
    colours = {
        line: colormaps["tab10"](index) for index, line in enumerate(LINES) if line in labels
    }
    others = [label for label in labels if label not in LINES and label != "residual stream"]
    strong = [colormaps["tab10"](index) for index in range(10)]
    spare = [colour for colour in strong if colour not in colours.values()]
    spare += [colormaps["tab20"](2 * index + 1) for index in range(10)]
    colours |= {label: spare[index % len(spare)] for index, label in enumerate(others)}
    return colours | {"residual stream": "black"} if "residual stream" in labels else colours


def _style(label: str, panel: str, colours: dict[str, Any]) -> dict[str, Any]:
    """Colour by module, the same in every panel; shades of one colour for steps of the loss."""
    from matplotlib import colormaps

    if panel == PANELS["loss"]:
        return {"color": colormaps["viridis"](min(0.9, np.log2(int(label.split()[1]) + 1) / 4)),
                "label": label}  # fmt: skip
    if panel in (PANELS["logits"], PANELS["attention_logits"]):
        order = ["at init", "self-token at init", "other-token at init", "change"]
        usual = label.replace("size", "at init")
        index = order.index(usual) if usual in order else 0
        return {"color": colormaps["Dark2"]((0, 1, 0, 2)[index]), "label": label}
    return {"color": colours[label]}


def _same_scale(column: tuple[Axes, ...]) -> None:
    """One scale for a panel in all rows, never narrower than a factor of four."""
    low = min(axis.get_ylim()[0] for axis in column)
    high = max(axis.get_ylim()[1] for axis in column)
    for axis in column:
        if axis.get_yscale() == "log":
            axis.set_ylim(min(low, 0.25), max(high, 4.0))
        else:
            axis.set_ylim(low, high + 0.4 * (high - low))  # room for the legend


def _legend(band: Any, colours: dict[str, Any]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Line2D([], [], color=colour, lw=2.5, label=label) for label, colour in colours.items()
    ]
    handles.append(Line2D([], [], color="black", ls="--", label="right"))
    handles.append(Patch(color=COLOURS["PASS"], alpha=0.15, label="slopes that pass"))
    band.legend(handles=handles, loc="center", ncols=len(handles), frameon=False, fontsize=12)
