"""The search space as a cube, linear in the logarithms, and designs that fill it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from optuna.distributions import FloatDistribution

from sweeps.surrogate import Floats

if TYPE_CHECKING:
    from sweeps.experiment import Range

Space = Mapping[str, FloatDistribution]
Design = Callable[[int], Floats]
"""Number of a point -> its place in the unit cube."""


def space_of(search: Mapping[str, Range]) -> dict[str, FloatDistribution]:
    """The search space in Optuna's words."""
    return {name: FloatDistribution(r.low, r.high, log=True) for name, r in search.items()}


def to_unit(space: Space, params: Mapping[str, float]) -> Floats:
    """Place of hyperparameters in the unit cube, linear in their logarithms."""
    return np.array(
        [math.log(params[name] / d.low) / math.log(d.high / d.low) for name, d in space.items()]
    )


def from_unit(space: Space, place: Floats) -> dict[str, float]:
    """Hyperparameters at a place of the unit cube."""
    values = {}
    for u, (name, d) in zip(place, space.items(), strict=True):
        values[name] = min(max(d.low * (d.high / d.low) ** float(u), d.low), d.high)
    return values


def sobol(dimensions: int, seed: int) -> Design:
    """Scrambled Sobol points: they fill the cube more evenly than chance does."""

    def point(index: int) -> Floats:
        engine = torch.quasirandom.SobolEngine(dimensions, scramble=True, seed=seed)
        place: Floats = engine.fast_forward(index).draw(1, dtype=torch.float64).numpy()[0]
        return place

    return point


def uniform(dimensions: int, seed: int) -> Design:
    """Points by chance alone."""
    return lambda index: np.random.default_rng((seed, index)).random(dimensions)


def grid(dimensions: int, trials: int, seed: int) -> Design:
    """The finest full grid, ends included, that so many trials can visit, in shuffled order.

    A trial beyond the last point starts over.
    """
    per_axis = max(2, int(trials ** (1 / dimensions) + 1e-9))
    total = per_axis**dimensions
    # total may be huge where there are many parameters: visit it by a stride prime to it
    stride = _coprime(total, seed)

    def point(index: int) -> Floats:
        rest, place = (seed + index * stride) % total, []
        for _ in range(dimensions):
            rest, digit = divmod(rest, per_axis)
            place.append(digit / (per_axis - 1))
        return np.array(place)

    return point


def _coprime(total: int, seed: int) -> int:
    stride = int(total * 0.618) + seed % total
    while math.gcd(stride, total) != 1:
        stride += 1
    return stride
