"""Learning-rate shapes: pure functions of progress, multiplied onto each group's peak.

A schedule never assigns a learning rate: it multiplies the peak of every group, so ratios
between groups, which are what the parametrization is about, survive any schedule.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from mutransfer.errors import UserError

Shape = Literal["constant", "linear", "cosine", "wsd_exponential", "one_minus_sqrt"]


def coefficient(shape: Shape, x: float) -> float:
    """How much of the way from `start` to `end` is left at progress `x` in [0, 1]: 1 to 0.

    `wsd_exponential` is Megatron-LM's: 2 * 2^-x - 1, which is 0.414 half-way and reaches 0.
    `one_minus_sqrt` is 1 - sqrt(x) (2405.18392, eq. 5). `constant` stays at 1.
    """
    match shape:
        case "constant":
            return 1.0
        case "linear":
            return 1 - x
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * x))
        case "wsd_exponential":
            return 2 * math.pow(0.5, x) - 1
        case "one_minus_sqrt":
            return 1 - math.sqrt(x)


def interpolate(shape: Shape, x: float, start: float, end: float) -> float:
    """The fraction of the peak at progress `x` of a phase that goes from `start` to `end`."""
    return end + (start - end) * coefficient(shape, x)


@dataclass(frozen=True, kw_only=True)
class WSD:
    """Warmup-Stable-Decay (MiniCPM, 2404.06395 section 4) in fractions of the run.

    Attributes:
        warmup: Fraction of the steps with a linear rise.
        decay: Fraction of the steps, at the end, that fall to `final`.
        final: Last learning rate over the peak.
        shape: Shape of the decay.

    Raises:
        UserError: A fraction is outside [0, 1], or warmup and decay overlap.
    """

    warmup: float = 0.1
    decay: float = 0.2
    final: float = 0.0
    shape: Shape = "wsd_exponential"

    def __post_init__(self) -> None:
        for name in ("warmup", "decay", "final"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError("not a fraction", where=name, got=getattr(self, name),
                                expected="0 … 1")  # fmt: skip
        if self.warmup + self.decay > 1:
            raise UserError("warmup and decay overlap", got=f"{self.warmup} + {self.decay}",
                            expected="a sum of at most 1")  # fmt: skip
        if self.shape not in get_args(Shape):
            raise UserError("unknown shape", where="shape", got=self.shape,
                            expected=f"one of {', '.join(get_args(Shape))}")  # fmt: skip

    def decay_start(self, steps: int) -> int:
        """The first step of the decay in a run of `steps`."""
        return steps - round(self.decay * steps)

    def factor(self, step: int, steps: int) -> float:
        """Fraction of the peak at `step` (0-based) of `steps`; the last step has `final`.

        Raises:
            UserError: `step` is not one of the run's.
        """
        if not 0 <= step < steps:
            raise UserError("step is outside the run", got=step, expected=f"0 … {steps - 1}")
        warmup, start = round(self.warmup * steps), self.decay_start(steps)
        if step < warmup:
            return interpolate("linear", (step + 1) / warmup, 0.0, 1.0)
        if step < start:
            return 1.0
        return interpolate(self.shape, (step + 1 - start) / (steps - start), 1.0, self.final)


def set_lr(groups: Iterable[dict[str, Any]], factor: float) -> None:
    """Sets every group's learning rate to `factor` times its own peak."""
    for group in groups:
        group["lr"] = group["peak_lr"] * factor
