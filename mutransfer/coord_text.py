"""What a coordinate check says: one sentence per quantity, culprits merged, a short table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from mutransfer.verdict import SEVERITY

if TYPE_CHECKING:
    from mutransfer.coord_late import Drift
    from mutransfer.coord_verdict import Quantity, Unjudged
    from mutransfer.symbolic import Finding

SUBJECTS = {
    "weight": "initial weights of {}",
    "eps_share": "steps of {}",
    "update": "first updates of {}",
    "later_update": "later updates of {}",
    "update_norm": "operator norms of the updates of {}",
    "logits": "{} at init",
    "activation": "activations of {} at init",
    "branch": "what a block adds at init",
    "residual": "the residual stream at init",
    "attention_logits": "attention logits at init",
    "loss": "the loss at init",
    "delta_branch": "changes in what a block adds",
    "delta_activation": "changes in the activations of {}",
    "delta_residual": "changes in the residual stream",
    "delta_attention_logits": "changes in the attention logits",
    "delta_logits": "changes in the {}",
    "overflow_inputs": "inputs of {}",
    "overflow_weights": "weights of {}",
    "overflow_gradients": "output gradients of {}",
}
"""What each kind is called, causes before their consequences: culprits are told in this order."""

SATURATED = (
    "the softmax saturates in wide models, so that gradients vanish against eps: a consequence "
    "of the logits at init"
)
"""A cause that is a consequence itself: told last."""


def join_names(names: Sequence[str]) -> str:
    """Patterns on one line, without `.weight`, those with one parent in braces: `a.{b,c}, d`."""
    parents: dict[str, list[str]] = {}
    for name in names:
        parent, _, leaf = name.removesuffix(".weight").rpartition(".")
        parents.setdefault(parent, []).append(leaf)
    joined = []
    for parent, leaves in parents.items():
        leaf = leaves[0] if len(leaves) == 1 else "{" + ",".join(leaves) + "}"
        joined.append(f"{parent}.{leaf}" if parent else ", ".join(leaves))
    return ", ".join(joined)


def power(slopes: Iterable[float], axis: str = "width") -> str:
    """`width^-0.98`, or `width^-0.98…+0.02` for several."""
    found = sorted(slopes)
    ends = [f"{round(end, 2) + 0.0:+.2f}" for end in (found[0], found[-1])]
    return f"{axis}^" + "…".join(dict.fromkeys(ends))


def subject(kind: str, names: Sequence[str], trained: bool = False) -> str:
    """What a sentence about these patterns is about; nothing of a trained model is initial."""
    text = SUBJECTS[kind]
    if trained:
        text = text.removeprefix("initial ").replace("first ", "").removesuffix(" at init")
    return text.format(join_names(names))


def label(kind: str, trained: bool = False) -> str:
    """What a kind is called in a table."""
    if kind == "eps_share":
        return "share of the steps that eps takes"
    text = subject(kind, ["{}"], trained).replace(" of {}", "").replace("{}", "logits")
    return f"share of {text} beyond FP8" if kind.startswith("overflow") else text


def sentence(quantities: Sequence[Quantity]) -> str:
    """One sentence about quantities of one kind, cause and right slope."""
    first = quantities[0]
    names = [quantity.name for quantity in quantities]
    about = subject(first.kind, names, first.trained > 0)
    slopes = [quantity.slope for quantity in quantities if quantity.slope is not None]
    if not slopes:
        return f"{about}: {first.cause}"
    if first.kind == "eps_share":
        text = f"eps takes up to {max(slopes):.0%} off the {about}, right is at most "
        text += f"{first.warn:.0%}"
    elif first.kind.startswith("overflow"):
        text = f"up to {max(slopes):.1%} of the entries of the {about} leave FP8's range, over what"
        text += f" does in the smallest models, right is at most {first.warn:.1%}"
    else:
        verb = "scales" if about.startswith(("the ", "what ")) else "scale"
        most = "" if first.two_sided else "at most "
        right = f"{most}{power([first.expected], first.axis)}"
        text = f"{about} {verb} as {power(slopes, first.axis)}, right is {right}"
    return f"{text}: {first.cause}" if first.cause else text


def culprits(quantities: Iterable[Quantity], findings: Iterable[Finding]) -> tuple[str, ...]:
    """All that is wrong, worst first: the symbolic check, then causes, then consequences.

    Among causes of one kind the one that is furthest off comes first: under a large deviation
    smaller ones follow, as gradients that vanish against eps where the softmax saturates.
    Later updates are told only where the first was right; first updates under Muon, whose RMS
    is judged on one side, only where their operator norm does not tell the same.
    """
    by_field: dict[str, list[Finding]] = {}
    for finding in findings:
        by_field.setdefault(finding.field, []).append(finding)
    told = []
    for found in by_field.values():
        more = len({finding.name for finding in found}) - 1
        told.append(found[0].sentence + (f" (and {more} more like it)" if more else ""))
    merged: dict[tuple[str, str, str, float], list[Quantity]] = {}
    quantities = list(quantities)
    first = {q.name for q in quantities if q.kind == "update" and q.verdict != "PASS"}
    norms = {(q.name, q.cause, q.verdict) for q in quantities if q.kind == "update_norm"}
    for quantity in quantities:
        if quantity.kind == "later_update" and quantity.name in first:
            continue
        same = (quantity.name, quantity.cause, quantity.verdict)
        one_sided = quantity.slope is not None and not quantity.two_sided
        if quantity.kind == "update" and one_sided and same in norms:
            continue
        if quantity.verdict != "PASS":
            key = (quantity.verdict, quantity.kind, quantity.cause, quantity.expected)
            merged.setdefault(key, []).append(quantity)
    kinds = list(SUBJECTS)

    def place(key: tuple[str, str, str, float]) -> tuple[int, bool, int, float]:
        farthest = max(excess(quantity) for quantity in merged[key])
        return -SEVERITY.index(key[0]), key[2] == SATURATED, kinds.index(key[1]), -farthest

    order = sorted(merged, key=place)
    return (*told, *(sentence(merged[key]) for key in order))


def table(quantities: Sequence[Quantity]) -> list[str]:
    """One line per kind: how many curves, the one furthest off, and the worst verdict."""
    lines = [f"  {'quantity':<38}{'curves':>7}  {'slope, furthest off':<30}{'right':>7}  verdict"]
    for kind in SUBJECTS:
        curves = [quantity for quantity in quantities if quantity.kind == kind]
        if not curves:
            continue
        worst = max(curves, key=lambda q: (SEVERITY.index(q.verdict), excess(q)))
        name = label(kind, worst.trained > 0)
        if worst.slope is None or worst.low is None or worst.high is None:
            slope = "none"
        else:
            slope = f"{worst.slope:+.2f} [{worst.low:+.2f}, {worst.high:+.2f}]"
        right = f"{'' if worst.two_sided else '≤ '}{worst.expected + 0.0:+.1f}"
        lines.append(f"  {name:<38}{len(curves):>7}  {slope:<30}{right:>7}  {worst.verdict}")
    return lines


def excess(quantity: Quantity) -> float:
    """How far off a slope is, in units of what would fail."""
    if quantity.slope is None:
        return float("inf")
    deviation = quantity.slope - quantity.expected
    warn, fail = quantity.warn, quantity.fail
    if deviation <= 0:
        if quantity.warn_below is None or quantity.fail_below is None:
            return 0.0
        warn, fail = quantity.warn_below, quantity.fail_below
    return abs(deviation) / (fail if math.isfinite(fail) else warn)


def drift_table(drifts: Sequence[Drift]) -> list[str]:
    """One line per kind: the curve whose slope drifted farthest."""
    head = f"  {'drift of slopes, farthest curve':<38}{'early':>7}{'late':>8}  drift"
    lines = [head]
    for kind in SUBJECTS:
        curves = [drift for drift in drifts if drift.kind == kind]
        if not curves:
            continue
        far = max(curves, key=lambda drift: abs(drift.drift))
        change = f"{far.drift:+.2f} [{far.low:+.2f}, {far.high:+.2f}]"
        named = "{}" in SUBJECTS[kind] and len(curves) > 1
        several = f"  {join_names([far.name])}" if named else ""
        lines.append(
            f"  {label(kind, True):<38}{far.early:>+7.2f}{far.late:>+8.2f}  {change:<22}{several}"
        )
    return lines


def exceptions_text(exceptions: Iterable[Unjudged], trained: bool = False) -> list[str]:
    """What is measured and not judged: a line per reason."""
    by_reason: dict[str, dict[str, list[str]]] = {}
    for each in exceptions:
        by_reason.setdefault(each.reason, {}).setdefault(each.kind, []).append(each.name)
    return [
        f"  not judged: {'; '.join(subject(k, names, trained) for k, names in kinds.items())}"
        f" ({reason})"
        for reason, kinds in by_reason.items()
    ]
