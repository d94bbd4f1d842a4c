"""Reads the frame of a transfer check: one row per run, checked, and laid out as curves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mutransfer.errors import UserError
from mutransfer.transfer_fit import Curve
from mutransfer.transfer_result import power

COLUMNS = ("arm", "width", "lr", "seed", "loss")
CELL = ["arm", "width", "log2_lr", "seed"]
_WHERE = "transfer check"


def read_runs(frame: pd.DataFrame) -> pd.DataFrame:
    """Checks the runs and brings them into one form.

    Args:
        frame: One row per run: `arm`, `width`, `lr` (the base learning rate), `seed`, `loss`
            (nats; infinite or NaN where the run diverged), and optionally `epochs`.

    Returns:
        `arm` (text), `width`, `log2_lr` (rounded to a millionth of an octave, so that 0.1 and
        0.1000000001 are one grid point), `seed`, `loss` (infinite where diverged) and, if
        given, `epochs`; sorted by the first four.

    Raises:
        UserError: A column is missing, a value is no number where one is needed, a learning
            rate or a width is not positive, or two rows are the same run.
    """
    missing = [column for column in COLUMNS if column not in frame.columns]
    if missing:
        raise UserError(f"no column {', '.join(map(repr, missing))}", where=_WHERE,
                        got=list(frame.columns), expected=list(COLUMNS))  # fmt: skip
    if frame.empty:
        raise UserError("no runs", where=_WHERE, got="0 rows")
    for column in ("arm", "seed"):
        if frame[column].isna().any():
            row = frame.index[frame[column].isna()][0]
            raise UserError(f"{column} is missing", where=f"{_WHERE}, row {row}")
    width, lr = _numbers(frame, "width"), _numbers(frame, "lr")
    _require(frame, "width", np.isfinite(width) & (width > 0) & (width == np.floor(width)),
             "a positive integer")  # fmt: skip
    _require(frame, "lr", np.isfinite(lr) & (lr > 0), "a positive number")
    loss = _numbers(frame, "loss")
    runs = pd.DataFrame(
        {
            "arm": frame["arm"].astype(str).to_numpy(),
            "width": width.astype(np.int64),
            "log2_lr": np.round(np.log2(lr), 6),
            "seed": frame["seed"].to_numpy(),
            "loss": np.where(np.isfinite(loss), loss, math.inf),
        }
    )
    if "epochs" in frame.columns:
        runs["epochs"] = _numbers(frame, "epochs")
    twice = runs[runs.duplicated(CELL)]
    if len(twice):
        cell = twice.iloc[0]
        raise UserError(
            f"{len(twice)} runs are there twice", where=_WHERE,
            got=f"arm {cell.arm!r}, width {cell.width}, lr {power(cell.log2_lr)}, "
            f"seed {cell.seed} again",
            expected="one row for each arm, width, lr and seed",
            cure="Give each run its own seed, or drop all but one.",
        )  # fmt: skip
    return runs.sort_values(CELL, ignore_index=True)


def _numbers(frame: pd.DataFrame, column: str) -> NDArray[np.float64]:
    values = pd.to_numeric(frame[column], errors="coerce").to_numpy(dtype=float, na_value=math.nan)
    text = frame[column].notna().to_numpy() & np.isnan(values)
    text &= frame[column].astype(str).str.strip().str.lower().to_numpy() != "nan"
    _require(frame, column, ~text, "a number")
    return values


def _require(
    frame: pd.DataFrame,
    column: str,
    good: NDArray[np.bool_],
    expected: str,
) -> None:
    if not good.all():
        at = int(np.argmin(good))
        raise UserError(f"bad {column}", where=f"{_WHERE}, row {frame.index[at]}",
                        got=frame[column].iloc[at], expected=expected)  # fmt: skip


def curves_of(runs: pd.DataFrame) -> list[Curve]:
    """The runs of one arm as one curve per width, ascending, with the same rows of seeds."""
    seeds = sorted(runs["seed"].unique())
    result = []
    for width, rows in runs.groupby("width"):
        grid = rows.pivot(index="seed", columns="log2_lr", values="loss").reindex(seeds)
        result.append(
            Curve(
                width=int(str(width)),
                log2_lr=grid.columns.to_numpy(dtype=float),
                loss=grid.to_numpy(dtype=float),
            )
        )
    return result


def gaps(arm: str, curves: Sequence[Curve]) -> list[str]:
    """What is missing or diverged in the curves of one arm, in words."""
    notes = []
    absent = [(curve, np.isnan(curve.loss)) for curve in curves]
    if places := _places(absent):
        total = sum(int(cells.sum()) for _, cells in absent)
        notes.append(f"{arm}: {total} runs are missing ({places}); means are over those that ran, "
                     "less what their seeds add")  # fmt: skip
    diverged = [(curve, np.isinf(curve.loss)) for curve in curves]
    if places := _places(diverged):
        notes.append(f"{arm}: some seeds diverged ({places}); such learning rates are no optimum")
    return notes


def _places(cells: Iterable[tuple[Curve, NDArray[np.bool_]]]) -> str:
    """`width 64: 2^-4, 2^-3; width 128: 2^-4`."""
    return "; ".join(
        f"width {curve.width}: {', '.join(power(x) for x in curve.log2_lr[marked.any(axis=0)])}"
        for curve, marked in cells
        if marked.any()
    )
