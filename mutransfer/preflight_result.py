"""What a preflight found, as data, as JSON and as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mutransfer.coord_text import subject
from mutransfer.symbolic import Finding
from mutransfer.verdict import SEVERITY, Verdict, plain, worst

SCHEMA_VERSION = 1

LABELS = {
    "weight": "initial weights",
    "update": "first updates",
    "entry": "entry of the first block",
    "eps_share": "eps over Adam's √v",
    "attention_logits": "attention logits at init",
    "branch": "what a block adds",
    "activation": "activations at init",
    "residual": "residual stream at init",
    "logits": "logits at init",
    "later_update": "later updates",
    "delta_activation": "change of activations",
    "delta_attention_logits": "change of attention logits",
    "delta_residual": "change of the residual stream",
    "delta_branch": "change of what a block adds",
    "delta_logits": "change of logits",
}
"""What is judged, causes before their consequences, and what it is called."""

KINDS = tuple(LABELS)

CULPRITS = {
    "weight": "its init std",
    "update": "its learning rate",
    "later_update": "its learning rate after the first step",
    "entry": "the embedding multiplier",
    "eps_share": "its eps",
    "branch": "the residual multiplier",
    "attention_logits": "the attention multiplier",
    "logits": "the output multiplier",
}
"""What sets a size, where nothing before it in `KINDS` is off."""

Stage = Literal["replay", "target"]


@dataclass(frozen=True, kw_only=True)
class Held:
    """One value held against what it should be.

    Attributes:
        stage: `replay` or `target`.
        kind, name, t: What was measured, as in a coordinate check.
        narrow: Geometric mean over seeds at each narrow width; what was recorded, in a replay.
        expected: What the target should have.
        low, high: Beyond which it fails.
        found: What it has; infinite or NaN where the run broke.
        octaves: How far outside the expected range, in doublings; 0 inside.
        verdict: PASS, WARN or FAIL.
    """

    stage: Stage
    kind: str
    name: str
    t: int
    narrow: tuple[float, ...]
    expected: float
    low: float
    high: float
    found: float
    octaves: float
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class PreflightResult:
    """What a preflight found.

    Attributes:
        optimizer: Of the hidden matrices.
        precision: Of the weights and both passes.
        widths: The two narrow widths.
        target: The target's width.
        seeds, steps: Models per narrow width, and steps of each.
        held: Every judged value.
        symbolic: Differences between the built target and its table.
        replayed: Width of the replayed model.
    """

    optimizer: str
    precision: str
    widths: tuple[int, ...]
    target: int
    seeds: int
    steps: int
    held: tuple[Held, ...]
    symbolic: tuple[Finding, ...]
    replayed: int

    @property
    def verdict(self) -> Verdict:
        """The worst of all; any difference from the table is a FAIL."""
        return "FAIL" if self.symbolic else worst(held.verdict for held in self.held)

    @property
    def culprits(self) -> tuple[str, ...]:
        """What is off, in sentences: the table, the replay, then causes before consequences."""
        told = [finding.sentence for finding in self.symbolic]
        for stage in ("replay", "target"):
            told += self._told([held for held in self.held if held.stage == stage])
        return tuple(told)

    def _told(self, held: Sequence[Held]) -> list[str]:
        """A sentence per kind that is off; where a cause fails, its consequences are counted."""
        merged: dict[tuple[str, str, int], list[Held]] = {}
        for one in held:
            if one.verdict != "PASS":
                merged.setdefault((one.verdict, one.kind, one.t), []).append(one)
        kinds = list(KINDS)
        order = sorted(merged, key=lambda k: (-SEVERITY.index(k[0]), kinds.index(k[1]), k[2]))
        if not order or order[0][0] != "FAIL" or order[0][1] not in CULPRITS:
            return [self._sentence(merged[key], "") for key in order]
        causes = [key for key in order if key[0] == "FAIL" and key[1] in ("weight", "update")]
        told = causes or order[:1]
        found = [self._sentence(merged[key], CULPRITS[key[1]]) for key in told]
        if rest := dict.fromkeys(
            kind for _, kind, _ in order if kind not in {k for _, k, _ in told}
        ):
            names = ", ".join(LABELS[kind] for kind in rest)
            found.append(f"what may follow from it is off too: {names}")
        return found

    def _sentence(self, held: Sequence[Held], cause: str) -> str:
        first = held[0]
        about = "what enters the first block"
        if first.kind != "entry":
            about = subject(first.kind, list(dict.fromkeys(one.name for one in held)))
        ratios = sorted(map(ratio, held))
        times = "…".join(dict.fromkeys(f"{end:.3g}" for end in (ratios[0], ratios[-1])))
        where = f"at width {self.replayed} (replay)" if first.stage == "replay" else (
            f"at width {self.target}"
        )  # fmt: skip
        right = "what the coordinate check recorded" if first.stage == "replay" else (
            f"what widths {' and '.join(map(str, self.widths))} lead to"
        )  # fmt: skip
        text = f"{about}, step {first.t}, {where}: {times} times {right}"
        return f"{text}: {cause} is off" if cause else text

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON file; what is not finite is null."""
        record: dict[str, Any] = plain(
            {
                "verdict": self.verdict,
                "schema_version": SCHEMA_VERSION,
                "optimizer": self.optimizer,
                "precision": self.precision,
                "widths": self.widths,
                "target": self.target,
                "replayed": self.replayed,
                "seeds": self.seeds,
                "steps": self.steps,
                "culprits": self.culprits,
                "held": [asdict(held) for held in self.held],
                "symbolic": [asdict(finding) for finding in self.symbolic],
            }
        )
        return record

    def summary(self) -> str:
        """A short table and the culprits, for a terminal."""
        lines = [
            f"preflight under {self.optimizer}, {self.precision}: {self.verdict}",
            f"  width {self.target} against {', '.join(map(str, self.widths))} ({self.seeds} "
            f"seeds, {self.steps} steps); replay of width {self.replayed}",
            f"  {'quantity':<36}{'values':>7}  verdict  found / expected, furthest off",
        ]
        for stage in ("replay", "target"):
            for kind in KINDS:
                found = [h for h in self.held if h.stage == stage and h.kind == kind]
                if not found:
                    continue
                off = max(found, key=lambda h: (SEVERITY.index(h.verdict), _distance(h)))
                label = f"{stage}: {LABELS[kind]}"
                at = f"{ratio(off):.3f}  {off.name}, step {off.t}"
                lines.append(f"  {label:<36}{len(found):>7}  {off.verdict:<7}  {at}")
        return "\n".join([*lines, *(f"  - {line}" for line in self.culprits)])


def ratio(held: Held) -> float:
    """Found over expected; not a number where it has none."""
    if held.found == held.expected:
        return 1.0
    return held.found / held.expected if held.expected else math.nan


def _distance(held: Held) -> float:
    return abs(math.log2(ratio(held))) if ratio(held) > 0 else math.inf
