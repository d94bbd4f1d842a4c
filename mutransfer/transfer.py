"""Transfer check: does the best learning rate stay where it is when the model gets wider?

The optimum of each width is the vertex of a parabola in log2 learning rate through the best grid
point and its neighbours, on means over seeds. Drift is how far it moves from the proxy's; regret
is what carrying the proxy's optimum to the largest width costs there.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import pandas as pd

from mutransfer.errors import UserError
from mutransfer.transfer_fit import Curve
from mutransfer.transfer_frame import curves_of, gaps, read_runs
from mutransfer.transfer_measure import Arm, Estimate, drift, optima, regret, trend
from mutransfer.transfer_result import ArmResult, Optimum, TransferResult, power
from mutransfer.verdict import Verdict

DRIFT_PASS, DRIFT_PASS_BOUND, DRIFT_FAIL = 0.5, 1.0, 1.0  # octaves
REGRET_PASS_BOUND, REGRET_FAIL = 0.02, 0.05  # nats
MIN_SEEDS = 3
MAX_EPOCHS = 4.0
_WHERE = "transfer check"


def transfer_check(
    frame: pd.DataFrame,
    *,
    proxy_width: int | None = None,
    contrast: Collection[str] = ("sp",),
    bootstrap: int = 2000,
    seed: int = 0,
    max_epochs: float | None = None,
) -> TransferResult:
    """Judges whether the optimal learning rate transfers over width.

    Args:
        frame: One row per run: `arm`, `width`, `lr` (the base learning rate), `seed`, `loss`
            (nats; infinite or NaN where the run diverged), and optionally `epochs` (passes over
            the training text).
        proxy_width: The width that the optimum is carried over from; `None` is each arm's
            smallest.
        contrast: Arms that get a verdict of their own and do not enter the overall one.
        bootstrap: Number of bootstrap draws.
        seed: Seed of the bootstrap.
        max_epochs: Most passes over the training text of any run, for frames without `epochs`.

    Raises:
        UserError: The frame is unusable (see `read_runs`), an arm lacks the proxy's width, or
            every arm is a contrast.
    """
    if bootstrap < 1:
        raise UserError("bad number of bootstrap draws", where=_WHERE, got=bootstrap,
                        expected="at least 1")  # fmt: skip
    runs = read_runs(frame)
    names = sorted(runs["arm"].unique(), key=lambda name: (name in contrast, name))
    if all(name in contrast for name in names):
        raise UserError("every arm is a contrast, so there is nothing to judge", where=_WHERE,
                        got=names, cure="Name fewer contrasts.")  # fmt: skip
    epochs = [] if max_epochs is None else [max_epochs]
    if "epochs" in runs and runs["epochs"].notna().any():
        epochs.append(float(runs["epochs"].max()))
    notes, cautions = [], []
    if not epochs:
        notes.append("epochs are unknown: not checked that no text was used too often")
    elif max(epochs) > MAX_EPOCHS:
        cautions.append(f"{max(epochs):g} passes over the training text, more than {MAX_EPOCHS:g}")
    arms = []
    for name in names:
        curves = curves_of(runs[runs["arm"] == name])
        notes += gaps(name, curves)
        arm = Arm.of(curves, _proxy(name, curves, proxy_width), bootstrap, seed)
        arms.append(_judge_arm(name, name in contrast, arm, cautions))
    return TransferResult(
        arms=tuple(arms),
        notes=tuple(notes),
        bootstrap=bootstrap,
        epochs=max(epochs, default=None),
    )


def _proxy(name: str, curves: Sequence[Curve], width: int | None) -> int:
    """Index of the proxy's curve."""
    widths = [curve.width for curve in curves]
    if width is None:
        return 0
    if width not in widths:
        raise UserError("the proxy's width was not run", where=f"{_WHERE}, arm {name!r}",
                        got=width, expected=f"one of {widths}")  # fmt: skip
    return widths.index(width)


def _judge_arm(name: str, contrast: bool, arm: Arm, cautions: Sequence[str]) -> ArmResult:
    records = optima(arm)
    moved, tilt, cost = drift(arm), trend(arm), regret(arm)
    verdict, reasons = judge(
        drift=moved, regret=cost, cautions=[*cautions, *_cautions(records, arm.proxy, cost)]
    )
    return ArmResult(
        arm=name,
        verdict=verdict,
        contrast=contrast,
        reasons=tuple(reasons),
        proxy_width=records[arm.proxy].width,
        optima=tuple(records),
        drift=moved.value,
        drift_low=moved.low,
        drift_high=moved.high,
        drift_per_doubling=tilt.value,
        drift_per_doubling_low=tilt.low,
        drift_per_doubling_high=tilt.high,
        regret=cost.value,
        regret_low=cost.low,
        regret_high=cost.high,
    )


def _cautions(records: Sequence[Optimum], proxy: int, cost: Estimate) -> list[str]:
    """What keeps an arm from PASS whatever its figures."""
    if len(records) == 1:
        return ["a single width: nothing to compare it with"]
    found = [f"no optimum at width {o.width}: {o.note}" for o in records if not o.interior]
    fewest = min(records, key=lambda record: record.seeds)
    if fewest.seeds < MIN_SEEDS:
        plural = "" if fewest.seeds == 1 else "s"
        found.append(f"{fewest.seeds} seed{plural} behind the optimum at width {fewest.width}, "
                     f"fewer than {MIN_SEEDS}")  # fmt: skip
    if proxy == len(records) - 1:
        found.append("the proxy is the largest width: no regret to measure")
    elif cost.value is None and records[proxy].interior and records[-1].interior:
        found.append(f"the proxy's optimum {power(records[proxy].log2_lr)} was not run at width "
                     f"{records[-1].width}: extend the grid there")  # fmt: skip
    return found


def judge(
    *, drift: Estimate, regret: Estimate, cautions: Sequence[str]
) -> tuple[Verdict, list[str]]:
    """The verdict on one arm and what decided it.

    Args:
        drift: In octaves.
        regret: In nats.
        cautions: What keeps the arm from PASS whatever its figures.
    """
    failures, doubts = [], []
    if drift.low > DRIFT_FAIL:
        failures.append(f"drift is at least {drift.low:.2f} octaves, beyond {DRIFT_FAIL:g}")
    if regret.low > REGRET_FAIL:
        failures.append(f"regret is at least {regret.low:.4f} nats, beyond {REGRET_FAIL:g}")
    if failures:
        return "FAIL", [*failures, *cautions]
    if drift.value is not None and drift.value > DRIFT_PASS:
        doubts.append(f"drift {drift.value:.2f} octaves is above {DRIFT_PASS:g}")
    if drift.value is None or not drift.high <= DRIFT_PASS_BOUND:
        doubts.append(f"drift is not shown to be within {DRIFT_PASS_BOUND:g} octave")
    if regret.value is None or not regret.high <= REGRET_PASS_BOUND:
        doubts.append(f"regret is not shown to be within {REGRET_PASS_BOUND:g} nats")
    if doubts or cautions:
        return "WARN", [*doubts, *cautions]
    return "PASS", [
        f"drift within {DRIFT_PASS:g} and shown to be within {DRIFT_PASS_BOUND:g} octave",
        f"regret shown to be within {REGRET_PASS_BOUND:g} nats",
    ]
