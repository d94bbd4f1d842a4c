"""What a transfer check found, as data, as JSON and as text."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from mutransfer.verdict import Verdict, plain, worst

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """The best learning rate of one arm at one width.

    Attributes:
        width: The model's width.
        log2_lr: log2 of the optimum; `None` where the grid does not contain it.
        low: Lower end of its interval, log2; minus infinity where the grid sets no limit.
        high: Upper end.
        interior: Whether there is an optimum.
        note: Why there is none and what to run, or how little stands behind it; else empty.
        best_log2_lr: log2 of the best grid point; `None` where every learning rate diverged.
        best_loss: Its loss in nats, the mean over seeds; infinite without a best grid point.
        loss_se: Standard error of `best_loss` over seeds; `None` with fewer than two.
        seeds: Seeds that ran at the best grid point and at both its neighbours.
    """

    width: int
    log2_lr: float | None
    low: float
    high: float
    interior: bool
    note: str
    best_log2_lr: float | None
    best_loss: float
    loss_se: float | None
    seeds: int


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """The verdict on one arm.

    Of each figure, the value is `None` where the runs leave it open; bounds are of its 95%
    interval and infinite where there is none, so that an open value can still be bounded below.

    Attributes:
        arm: Its name, as a rule a parametrization's.
        verdict: PASS, WARN or FAIL.
        contrast: Whether it is there for comparison and stays out of the overall verdict.
        reasons: What decided the verdict.
        proxy_width: The width that the optimum is carried over from.
        optima: One record per width, ascending.
        drift: Largest distance of an optimum from the proxy's, in octaves.
        drift_low: Its lower bound.
        drift_high: Its upper bound.
        drift_per_doubling: Octaves that the optimum moves when the width doubles, with its sign.
        drift_per_doubling_low: Its lower bound.
        drift_per_doubling_high: Its upper bound.
        regret: What the proxy's optimum costs at the largest width, in nats; infinite where a
            run diverged.
        regret_low: Its lower bound.
        regret_high: Its upper bound.
    """

    arm: str
    verdict: Verdict
    contrast: bool
    reasons: tuple[str, ...]
    proxy_width: int
    optima: tuple[Optimum, ...]
    drift: float | None
    drift_low: float
    drift_high: float
    drift_per_doubling: float | None
    drift_per_doubling_low: float
    drift_per_doubling_high: float
    regret: float | None
    regret_low: float
    regret_high: float

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths that were run, ascending."""
        return tuple(optimum.width for optimum in self.optima)


@dataclass(frozen=True, kw_only=True)
class TransferResult:
    """Everything a transfer check found.

    Attributes:
        arms: One result per arm; contrasts last.
        notes: What was missing, diverged or taken for granted.
        bootstrap: Number of bootstrap draws.
        epochs: Most passes over the training text of any run; `None` if unknown.
    """

    arms: tuple[ArmResult, ...]
    notes: tuple[str, ...]
    bootstrap: int
    epochs: float | None

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of the arms that are no contrasts."""
        return worst(arm.verdict for arm in self.arms if not arm.contrast)

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON file; what is unknown, unbounded or diverged is null.

        Drifts are in octaves, regrets and losses in nats, learning rates in log2.
        """
        head = {"verdict": self.verdict, "schema_version": SCHEMA_VERSION}
        return head | {name: plain(value) for name, value in asdict(self).items()}

    def summary(self) -> str:
        """A table for the terminal: one block per arm, one line per width."""
        blocks = [f"transfer check: {self.verdict}"]
        for arm in self.arms:
            kind = " (contrast, outside the overall verdict)" if arm.contrast else ""
            lines = [
                f"{arm.arm}: {arm.verdict}{kind}",
                f"  {drift_text(arm)}, {_per_doubling_text(arm)}",
                f"  {regret_text(arm)} at width {arm.widths[-1]}",
                f"  {'width':>7}  {'optimum':>9}  {'interval':^19}  {'best loss':>16}",
            ]
            lines += [f"  {_optimum_line(optimum)}".rstrip() for optimum in arm.optima]
            lines += [f"  - {reason}" for reason in arm.reasons]
            blocks.append("\n".join(lines))
        if self.notes:
            blocks.append("\n".join(f"note: {note}" for note in self.notes))
        return "\n\n".join(blocks)


def power(log2_lr: float | None) -> str:
    """A learning rate as a power of two: `2^-6`, `2^-6.32`, or `-` for none."""
    if log2_lr is None:
        return "-"
    if not math.isfinite(log2_lr):
        return "…"
    return f"2^{log2_lr:.0f}" if abs(log2_lr - round(log2_lr)) < 5e-3 else f"2^{log2_lr:.2f}"


def drift_text(arm: ArmResult) -> str:
    """`drift 0.12 [0.03, 0.31] octaves`; `≥` where the value is open."""
    return f"drift {_interval(arm.drift, arm.drift_low, arm.drift_high, 2)} octaves"


def regret_text(arm: ArmResult) -> str:
    """`regret 0.0012 [0.0003, 0.0031] nats`."""
    return f"regret {_interval(arm.regret, arm.regret_low, arm.regret_high, 4)} nats"


def _per_doubling_text(arm: ArmResult) -> str:
    low, high = arm.drift_per_doubling_low, arm.drift_per_doubling_high
    if arm.drift_per_doubling is None and math.isfinite(high) and math.isinf(low):
        return f"≤ {_number(high, 2)} per doubling of width"
    return f"{_interval(arm.drift_per_doubling, low, high, 2)} per doubling of width"


def _interval(value: float | None, low: float, high: float, digits: int) -> str:
    if value is None:
        return f"≥ {_number(low, digits)}" if math.isfinite(low) else "unknown"
    ends = math.isfinite(low) or math.isfinite(high)
    return _number(value, digits) + (
        f" [{_number(low, digits)}, {_number(high, digits)}]" if ends else ""
    )


def _number(value: float, digits: int) -> str:
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{round(value, digits) + 0.0:.{digits}f}"


def _optimum_line(optimum: Optimum) -> str:
    interval = f"[{power(optimum.low)}, {power(optimum.high)}]"
    error = "" if optimum.loss_se is None else f" ± {optimum.loss_se:.4f}"
    loss = "diverged" if math.isinf(optimum.best_loss) else f"{optimum.best_loss:.4f}{error}"
    place = power(optimum.log2_lr) if optimum.interior else "none"
    return f"{optimum.width:>7}  {place:>9}  {interval:^19}  {loss:>16}  {optimum.note}"
