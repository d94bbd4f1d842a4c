"""What the transfer check accepts as runs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mutransfer.errors import UserError
from mutransfer.transfer_frame import curves_of, read_runs


@pytest.fixture
def frame() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "arm": ["mup"] * 4,
            "width": [64, 32, 32, 32],
            "lr": [0.25, 0.5, 0.25, 0.25],
            "seed": [7, 7, 7, 8],
            "loss": [1.0, 2.0, 3.0, 4.0],
        }
    )


def test_runs_are_sorted_and_in_log2(frame: pd.DataFrame) -> None:
    runs = read_runs(frame)
    assert runs["loss"].tolist() == [3, 4, 2, 1]
    assert runs["log2_lr"].tolist() == [-2, -2, -1, -2]
    assert list(runs) == ["arm", "width", "log2_lr", "seed", "loss"]


def test_curves_have_the_same_seeds_at_every_width(frame: pd.DataFrame) -> None:
    narrow, wide = curves_of(read_runs(frame))
    assert (narrow.width, wide.width) == (32, 64)
    assert narrow.log2_lr.tolist() == [-2, -1]
    np.testing.assert_equal(narrow.loss, [[3, 2], [4, math.nan]])
    np.testing.assert_equal(wide.loss, [[1], [math.nan]])


def test_numbers_may_be_text_as_in_a_csv(frame: pd.DataFrame) -> None:
    text = frame.astype(str)
    text["loss"] = ["inf", "NaN", " 3.0", "-inf"]
    runs = read_runs(text)
    assert sorted(runs["loss"]) == [3, math.inf, math.inf, math.inf]
    assert runs["width"].tolist() == [32, 32, 32, 64]


@pytest.mark.parametrize("diverged", [math.nan, math.inf, -math.inf, None])
def test_a_loss_that_is_no_number_is_a_divergence(frame: pd.DataFrame, diverged: object) -> None:
    frame["loss"] = frame["loss"].astype(object)
    frame.loc[0, "loss"] = diverged
    assert read_runs(frame)["loss"].tolist() == [3, 4, 2, math.inf]


@pytest.mark.parametrize("column", ["arm", "width", "lr", "seed", "loss"])
def test_missing_column(frame: pd.DataFrame, column: str) -> None:
    with pytest.raises(UserError, match=f"no column '{column}'"):
        read_runs(frame.drop(columns=column))


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("lr", 0.0), ("lr", -0.1), ("lr", math.nan), ("lr", math.inf), ("lr", "fast"),
        ("width", 0), ("width", 32.5), ("width", math.nan), ("width", "wide"),
        ("seed", None), ("arm", None), ("loss", "exploded"),
    ],
)  # fmt: skip
def test_bad_value_is_named_with_its_row(frame: pd.DataFrame, column: str, value: Any) -> None:
    frame[column] = frame[column].astype(object)
    frame.index = pd.Index([10, 11, 12, 13])
    frame.loc[12, column] = value
    with pytest.raises(UserError, match=rf"row 12: .*{column}"):
        read_runs(frame)


def test_no_runs(frame: pd.DataFrame) -> None:
    with pytest.raises(UserError, match="no runs"):
        read_runs(frame.iloc[:0])


def test_the_same_run_twice_is_refused_and_named(frame: pd.DataFrame) -> None:
    frame.loc[3, "seed"] = 7
    with pytest.raises(UserError, match=r"twice.*arm 'mup', width 32, lr 2\^-2, seed 7"):
        read_runs(frame)
    frame.loc[3, "lr"] = 0.25 * (1 + 1e-10)
    with pytest.raises(UserError, match="twice"):
        read_runs(frame)
