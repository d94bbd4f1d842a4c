"""The picture of a coordinate check: flat is right.

Every curve is divided by its own value at the narrowest width and by the power of the width
that it should follow, so that a right curve is flat whatever it measures, and one dashed line
and one green fan (what passes) serve all curves of a panel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from mutransfer.coord_result import CoordCheckResult
from mutransfer.coord_verdict import Quantity

if TYPE_CHECKING:
    pass

PANELS = {
    "activation": "activations\nat init",
    "residual": "activations\nat init",
    "delta_activation": "change of\nactivations",
    "delta_residual": "change of\nactivations",
    "attention_logits": "attention logits",
    "delta_attention_logits": "attention logits",
    "logits": "logits",
    "delta_logits": "logits",
    "update": "first update\n(RMS)",
    "update_norm": "updates\n(operator norm)",
    "loss": "loss\n(nats)",
}
"""Panel by kind; several kinds may share one."""

COLOURS = {"PASS": "#1a7f37", "WARN": "#b35900", "FAIL": "#c4162a"}
LINES = ("embedding", "q", "k", "v", "o", "gate", "up", "down", "norm")
"""Curves with a colour of their own, by what their name contains; any other is black."""


def coord_check_data(result: CoordCheckResult) -> pd.DataFrame:
    """What the picture shows, one row per curve and width.

    Returns:
        Columns panel, kind, name, label, width; mid, low, high (geometric mean and extremes
        over seeds, relative to the narrowest width and to the right power of the width; plain
        nats for the loss); slope_low, slope_high (what passes, infinite where not judged);
        verdict (empty for the loss after training). Curves without a slope are left out.
    """
    rows = []
    for q in result.quantities:
        if q.kind not in PANELS or q.slope is None or q.kind == "loss":
            continue
        points = _points(result.frame, q.kind, q.name, q.times)
        points -= points.loc[min(result.widths)].mean()
        right = q.expected * np.log2(points.index.get_level_values("width") / min(result.widths))
        rows += _rows(q, _label(q), points - right)
    for t in sorted(result.frame["t"].unique()):
        points = _points(result.frame, "loss", "loss", (int(t),))
        rows += [
            {"panel": PANELS["loss"], "kind": "loss", "name": "loss", "label": f"step {t}",
             **row, "slope_low": -np.inf, "slope_high": np.inf, "verdict": ""}
            for row in _spread(points)
        ]  # fmt: skip
    return pd.DataFrame(rows)


def _points(frame: pd.DataFrame, kind: str, name: str, times: tuple[int, ...]) -> Any:
    """log2 of the values by (width, seed), averaged over `times`."""
    found = frame[(frame["kind"] == kind) & (frame["name"] == name) & frame["t"].isin(times)]
    return np.log2(found["value"]).groupby([found["width"], found["seed"]]).mean()


def _rows(q: Quantity, label: str, points: Any) -> list[dict[str, Any]]:
    fixed = {
        "panel": PANELS[q.kind],
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
    table = pd.DataFrame({"mid": by_width.mean(), "low": by_width.min(), "high": by_width.max()})
    return [{"width": width, **np.exp2(row).to_dict()} for width, row in table.iterrows()]


def _label(q: Quantity) -> str:
    """A curve's name in the legend: the last part that tells it apart."""
    if q.kind.endswith("residual"):
        return "residual stream"
    if q.kind.endswith("logits"):
        words = {"attention_logits": "at init", "delta_attention_logits": "change",
                 "delta_logits": "change"}  # fmt: skip
        return words.get(q.kind, f"{q.name.removesuffix(' logits')} at init")
    parts = [part for part in q.name.split(".") if part not in ("layers", "*", "weight")]
    return parts[-1]
