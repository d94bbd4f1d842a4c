"""The verdicts of every check, and how what a check found becomes JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

Verdict = Literal["PASS", "WARN", "FAIL"]
SEVERITY: tuple[Verdict, ...] = ("PASS", "WARN", "FAIL")


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The worst of some verdicts; PASS where there are none."""
    return max(verdicts, key=SEVERITY.index, default="PASS")


def plain(value: Any) -> Any:
    """`value` with tuples as lists and numbers that JSON lacks as `None`."""
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
