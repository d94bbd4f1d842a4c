"""What is right late in a run: the slopes of a model that was trained before it is checked.

What is true of initial values is over by then, and a correct model's slopes have drifted: on a
finite ladder wide models have learned another thing than narrow ones. So only what the rules
themselves hold fixed may fail. Which slopes correct models have late, and what follows, is in
docs/decisions/0003-coordinate-check.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mutransfer.coord_expect import Expectation, Ladder, Thresholds, Tolerance
from mutransfer.roles import MATRIX_ROLES

if TYPE_CHECKING:
    from mutransfer.coord_result import CoordCheckResult

UNTOLD = frozenset({"logits", "loss"})
LEARNED = "after training it is what the loss makes of it, at every width another"
"""Kinds that have no right slope late, and why."""

FADE = (
    "the initial weights fade at another rate in wide models: weight decay is not scaled so "
    "that learning rate times decay knows no width, or updates grow with the width"
)


GROWN = "since the start it has grown {} in wide or deep models"
STEADY = "its steadiest entries move {} in wide or deep models than the learning rate does"


def late_expectation(
    kind: str, name: str, ladder: Ladder, limits: Thresholds, right: Expectation | None
) -> Expectation | None:
    """The right slope late in a run, or `None` where there is no right or wrong.

    Updates, operator norms and eps may still fail, as a rule sets them at every step, and so may
    the RMS of hidden weights, upwards: the init fades by one factor, where the learning rate
    times the weight decay knows no width, and updates add no larger a power of the width than
    it has. The rest only ever warns.

    AdamW's step holds a part that is the weight itself, times the decay. It is small, or else
    takes the slope of the whole at most to that of the weights: up to there it only warns.

    Args:
        kind, name: As in the result's frame.
        ladder: The models of the check.
        limits: The tolerances.
        right: What is right of a fresh model.
    """
    if right is None or kind in UNTOLD:
        return None
    if kind == "update_norm" or is_share(kind):
        return right
    if kind == "update":
        decay = -ladder.fan_in[name] / 2 - right.slope if ladder.roles[name] in MATRIX_ROLES else 0
        above = replace(limits.change, fail=max(limits.change.fail, decay))
        return replace(right, above=above, below=right.below and limits.change)
    if kind == "weight" and ladder.roles[name] in MATRIX_ROLES:
        return replace(right, above=limits.weight, below=None, cause_above=FADE)
    single = kind in ("weight", "later_update", "delta_logits") or (
        kind.endswith("activation") and ladder.module_role(name) != "hidden_out"
    )
    warns = Tolerance(warn=limits.late * (1 if single else limits.product), fail=math.inf)
    late = replace(right, above=warns, below=right.below and warns)
    if kind.startswith("delta_"):
        return late
    told = STEADY if kind == "later_update" else GROWN
    return replace(late, cause_above=told.format("more"), cause_below=told.format("less"))


def is_share(kind: str) -> bool:
    """Whether what is judged is no slope, but a share."""
    return kind == "eps_share" or kind.startswith("overflow")


@dataclass(frozen=True, kw_only=True)
class Drift:
    """By how much a slope differs late from early: late - early, and its 95% interval."""

    kind: str
    name: str
    early: float
    late: float
    drift: float
    low: float
    high: float


def drifts(early: CoordCheckResult, late: CoordCheckResult) -> tuple[Drift, ...]:
    """The drift of every slope that both checks judge, in the late one's order.

    The two fits have equally many points; their errors are taken for independent.
    """
    before = {(q.kind, q.name): q for q in early.quantities if not is_share(q.kind)}
    found = []
    for q in late.quantities:
        p = before.get((q.kind, q.name))
        if p is None or p.slope is None or q.slope is None:
            continue
        half = math.hypot(*((x.high - x.low) / 2 for x in (p, q)))  # type: ignore[operator]
        drift = q.slope - p.slope
        found.append(Drift(kind=q.kind, name=q.name, early=p.slope, late=q.slope, drift=drift,
                           low=drift - half, high=drift + half))  # fmt: skip
    return tuple(found)
