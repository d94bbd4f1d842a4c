"""Preflight: the coordinates of the real target, held against what narrow models lead to.

A coordinate check judges slopes, so what is wrong by one factor at every width escapes it. Here
sizes are judged. A *replay* of the check's narrowest model must measure what the check recorded:
whatever was changed since, a base width or a hyperparameter, shows. Then the target's values must
continue those of two narrow models, along the right power of the width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from mutransfer.coord_check import Trainable, measure
from mutransfer.coord_expect import Ladder, Thresholds, expectation
from mutransfer.coord_ladder import Rung, make_ladder
from mutransfer.coord_measure import Recorder, hooked
from mutransfer.errors import UserError
from mutransfer.preflight_result import Held, Stage
from mutransfer.progress import Report, quiet
from mutransfer.symbolic import Finding, check_groups, optimizer_kind
from mutransfer.verdict import Verdict

Key = tuple[str, str, int]
"""(kind, name, t)."""


@dataclass(frozen=True, kw_only=True)
class Margin:
    """How far a value may be off, in octaves, before it fails; half as far is a warning.

    Attributes:
        fixed: Whatever the distance.
        per_octave: For each doubling of the width between the narrow models and the target.
        drift: Whether the slope between the two narrow models may go on to the target where it
            is not the right one: small models' deviations fade with the width, so that the
            truth lies between going on and stopping. At most `MOST_DRIFT` per octave.
    """

    fixed: float
    per_octave: float = 0.0
    drift: bool = False


EXACT = Margin(fixed=0.2, per_octave=0.03)
INITIAL = Margin(fixed=0.3, per_octave=0.05, drift=True)
BRANCH = Margin(fixed=0.5, per_octave=0.05, drift=True)
CHANGE = Margin(fixed=0.8, per_octave=0.1, drift=True)
PRODUCT = Margin(fixed=1.6, per_octave=0.2, drift=True)
REPLAYED = Margin(fixed=0.2)
REPLAYED_CHANGE = Margin(fixed=0.5)
MOST_DRIFT = 0.1

MARGINS = {
    "weight": EXACT,
    "update": EXACT,
    "entry": EXACT,
    "attention_logits": INITIAL,
    "branch": BRANCH,
    "activation": INITIAL,
    "residual": INITIAL,
    "logits": INITIAL,
    "later_update": CHANGE,
    "delta_activation": CHANGE,
    "delta_attention_logits": PRODUCT,
    "delta_residual": PRODUCT,
    "delta_branch": PRODUCT,
    "delta_logits": CHANGE,
}
"""How each of `preflight_result.KINDS` is judged; the rest of what is measured is not.

Weights, first updates and what enters the first block scatter by a percent, other initial values
by a few. Branches scatter most, as attention averages one random table's few tokens. Changes
depend on how steady the first gradients' signs are, twice so where two changed factors meet
(`PRODUCT`, as in a coordinate check); what they are there for is a forward pass that is not the
one it was at init.
"""


def hold_replay(
    recorded: Mapping[Key, float], trainable: Trainable, *, steps: int
) -> tuple[Held, ...]:
    """Trains the check's narrowest model once more, and holds it against the record.

    Args:
        recorded: What the check measured at one width and seed, by (kind, name, t).
        trainable: That model, built anew, on that batch.
        steps: As many as the check took.

    Raises:
        UserError: Something recorded is not measured any more.
    """
    recorder = Recorder(trainable.model, trainable.table, trainable.tokens)
    found = {(kind, name, t): value for t, values in measure(trainable, recorder, steps)
             for (kind, name), value in values.items()}  # fmt: skip
    held = []
    for (kind, name, t), right in recorded.items():
        if kind not in MARGINS or not right > 0:
            continue
        if (kind, name, t) not in found:
            raise UserError("the record of the coordinate check does not fit this model",
                            where=f"{kind} {name}, step {t}",
                            cure="Run coord-check and export again.")  # fmt: skip
        margin = REPLAYED if t <= 1 else REPLAYED_CHANGE
        held.append(_hold("replay", (kind, name, t), (right,), right, (0.0, 0.0),
                          margin.fixed, found[kind, name, t]))  # fmt: skip
    return tuple(held)


def hold_target(
    factory: Callable[[int, int], Trainable],
    widths: Sequence[int],
    target: int,
    *,
    seeds: int,
    steps: int,
    progress: Report = quiet,
) -> tuple[tuple[Held, ...], tuple[Finding, ...], str]:
    """Trains narrow models and the target for a few steps and holds the one against the others.

    Args:
        factory: (width, seed) -> a fresh model with its optimizer, the same batch for all.
        widths: Two narrow widths.
        target: The target's width.
        seeds: Models per narrow width; the target is built once, from seed 0.
        steps: Optimizer steps; measured at 0 and every power of two up to this.
        progress: Takes one line per model.

    Returns:
        The values, the differences of the built target from its table, and the optimizer.

    Raises:
        UserError: The target is not wider than both, or the models do not fit each other.
    """
    narrow = sorted(set(widths))
    if len(narrow) != 2 or narrow[-1] >= target:
        raise UserError("two narrow widths are held against a wider target", where="widths",
                        got=list(widths), expected=f"two widths below {target}")  # fmt: skip
    values: dict[int, dict[Key, list[float]]] = {}
    rungs: dict[int, Rung] = {}
    findings: list[Finding] = []
    jobs = [(width, seed) for width in narrow for seed in range(seeds)] + [(target, 0)]
    for place, (width, seed) in enumerate(jobs):
        trainable = factory(width, seed)
        if width == target:
            findings = check_groups(trainable.groups, trainable.table, trainable.model)
        recorder = Recorder(trainable.model, trainable.table, trainable.tokens, depth=True)
        found = values.setdefault(width, {})
        for block, rms in _entries(trainable, recorder):
            found.setdefault(("entry", block, 0), []).append(rms)
        for t, measured in measure(trainable, recorder, steps, sizes_only=True):
            for (kind, name), value in measured.items():
                if kind == "update" and t > 1:
                    kind = "later_update"
                found.setdefault((kind, name, t), []).append(value)
            if width == target:
                progress(f"width {width}, step {t} of {steps}")
        rungs[width] = Rung(trainable.model, trainable.table, optimizer_kind(trainable.groups),
                            trainable.tokens is not None, recorder.head_dim)  # fmt: skip
        del trainable, recorder  # the target's memory is wanted once
        progress(f"width {width}, seed {seed + 1}", (place + 1) / len(jobs))
    ladder = make_ladder(rungs, "width")
    held = []
    judged = {width: _judged(found) for width, found in values.items()}
    for key, (one_found,) in judged[target].items():
        at = [judged[width].get(key, []) for width in narrow]
        if (one := _extrapolate(key, at, one_found, narrow, target, ladder)) is not None:
            held.append(one)
    return tuple(held), tuple(findings), ladder.optimizer


@torch.no_grad()
def _entries(trainable: Trainable, recorder: Recorder) -> list[tuple[str, float]]:
    """RMS of what enters the first block of each stack: the embedding times its multiplier."""
    found: list[tuple[str, float]] = []

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: object, inputs: tuple[torch.Tensor, ...], output: object) -> None:
            found.append((name, float(inputs[0].float().square().mean().sqrt())))

        return hook

    first = [stack[0] for stack in recorder.stacks if stack]
    model = trainable.model
    with hooked((model.get_submodule(name), hook_of(name)) for name in first):
        trainable.loss()
    return found


def _judged(values: Mapping[Key, list[float]]) -> dict[Key, list[float]]:
    """What is judged, by (kind, name, last step), a value per seed.

    Initial values at step 0, updates at step 1, changes as their geometric mean over all steps;
    `later_update` is here the weights' whole way after more than one.
    """
    chosen: dict[Key, list[tuple[int, list[float]]]] = {}
    for (kind, name, t), found in values.items():
        changes = kind.startswith("delta_") or kind == "later_update"
        if kind in MARGINS and (t > 0 if changes else t == (kind == "update")):
            chosen.setdefault((kind, name, 0), []).append((t, found))
    pooled = {}
    for (kind, name, _), entries in chosen.items():
        logs = [[_log2(v) for v in found] for _, found in entries]
        mean = [2 ** (math.fsum(seed) / len(seed)) for seed in zip(*logs, strict=True)]
        pooled[kind, name, max(t for t, _ in entries)] = mean
    return pooled


def _log2(value: float) -> float:
    if math.isnan(value):
        return math.inf
    return math.log2(value) if value > 0 else -math.inf


def _extrapolate(
    key: Key, at: Sequence[list[float]], found: float, narrow: Sequence[int], target: int,
    ladder: Ladder,
) -> Held | None:  # fmt: skip
    """Holds one value; `None` where no power of the width is right, or nothing has moved yet."""
    kind, name, _ = key
    right = expectation(kind, name, ladder, Thresholds())
    slope = 0.0 if kind in ("entry", "branch") else right.slope if right is not None else None
    if slope is None or not all(at) or not all(0 < v < math.inf for one in at for v in one):
        return None
    margin = MARGINS[kind]
    if kind.endswith("activation") and ladder.module_role(name) == "hidden_out":
        margin = PRODUCT
    small, large = (math.fsum(map(math.log2, one)) / len(one) for one in at)
    octaves = math.log2(target / narrow[-1])
    drift = 0.0
    if margin.drift:
        between = (large - small) / math.log2(narrow[1] / narrow[0]) - slope
        drift = max(-MOST_DRIFT, min(MOST_DRIFT, between)) * octaves
    expected = large + slope * octaves
    return _hold("target", key, tuple(2**x for x in (small, large)), 2**expected,
                 (min(0.0, drift), max(0.0, drift)), margin.fixed + margin.per_octave * octaves,
                 found)  # fmt: skip


def _hold(
    stage: Stage, key: Key, narrow: tuple[float, ...], expected: float,
    range_: tuple[float, float], margin: float, found: float,
) -> Held:  # fmt: skip
    """The verdict: FAIL more than `margin` octaves outside the range, WARN half of that."""
    octaves = math.inf
    if found > 0 and math.isfinite(found):
        ratio = math.log2(found / expected)
        octaves = max(0.0, ratio - range_[1]) + min(0.0, ratio - range_[0])
    verdict: Verdict = "PASS" if abs(octaves) <= margin / 2 else "WARN"
    if abs(octaves) > margin:
        verdict = "FAIL"
    return Held(
        stage=stage, kind=key[0], name=key[1], t=key[2], narrow=narrow, expected=expected,
        low=expected * 2 ** (range_[0] - margin), high=expected * 2 ** (range_[1] + margin),
        found=found, octaves=octaves, verdict=verdict,
    )  # fmt: skip
