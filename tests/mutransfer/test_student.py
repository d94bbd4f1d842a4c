"""Quantiles of Student's t against the printed tables."""

from __future__ import annotations

import math

import pytest

from mutransfer.student import student_t


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (5, 2.57058), (6, 2.44691),
     (8, 2.30600), (10, 2.22814), (15, 2.13145), (20, 2.08596), (30, 2.04227), (120, 1.97993)],
)  # fmt: skip
def test_quantiles_of_student_s_t(degrees: int, quantile: float) -> None:
    rel = {3: 1.5e-3, 4: 4e-4, 5: 2e-4}.get(degrees, 1e-4)
    assert student_t(degrees) == pytest.approx(quantile, rel=rel)


def test_no_degree_of_freedom_knows_nothing_and_many_are_normal() -> None:
    assert student_t(0) == math.inf
    assert student_t(10**9) == pytest.approx(1.959964, rel=1e-6)


@pytest.mark.parametrize(
    ("degrees", "tail", "quantile"),
    [(1, 0.05, 6.31375), (2, 0.05, 2.91999), (9, 0.05, 1.83311), (2, 0.005, 9.92484)],
)
def test_other_tails(degrees: int, tail: float, quantile: float) -> None:
    assert student_t(degrees, tail) == pytest.approx(quantile, rel=1e-4)
