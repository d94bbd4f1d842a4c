"""Preflight: the coordinates of the real target, held against what narrow models lead to.

A coordinate check judges slopes, so what is wrong by one factor at every width escapes it. Here
sizes are judged. A *replay* of the check's narrowest model must measure what the check recorded:
whatever was changed since, a base width or a hyperparameter, shows. Then the target's values must
continue those of two narrow models, along the right power of the width.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from mutransfer.coord_check import Trainable, measure
from mutransfer.coord_expect import Ladder, Thresholds, expectation
from mutransfer.coord_ladder import Rung, make_ladder
from mutransfer.coord_measure import Recorder, geometric_mean, hooked
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
REPLAYED = Margin(fixed=0.05)
REPLAYED_CHANGE = Margin(fixed=0.15)
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

A replay is the same arithmetic on the same numbers, perhaps on another machine: 3.5%, and 11% for
changes, which amplify rounding. It holds the share of eps too.
"""


def sizes(
    trainable: Trainable, steps: int, *, eps: bool = False, tick: Callable[[int], object] = id
) -> dict[Key, float]:
    """Trains a model for some steps; returns what is judged of it, by (kind, name, last step).

    Initial values at step 0, updates at step 1, changes as their geometric mean over all later
    steps: zero or not finite where one of them is. `entry` is what enters the first block of each
    stack, the embedding times its multiplier; `later_update` the weights' way after more than
    one step. Of the blocks the middle one stands for all.

    Args:
        trainable: The model.
        steps: Optimizer steps; measured at 0 and every power of two up to this.
        eps: Whether to see the share of eps as well.
        tick: Takes each measured step.

    Raises:
        UserError: The model cannot be measured; see `Recorder`.
    """
    recorder = Recorder(trainable.model, trainable.table, trainable.tokens, depth=True)
    found: dict[Key, list[float]] = {}
    for block, rms in _entries(trainable, recorder):
        found["entry", block, 0] = [rms]
    last: dict[tuple[str, str], int] = {}
    for t, values in measure(trainable, recorder, steps, sizes_only=not eps):
        for (kind, name), value in values.items():
            if kind == "later_update":
                continue
            if kind == "update" and t > 1:
                kind = "later_update"
            changes = kind.startswith("delta_") or kind == "later_update"
            judged = kind in MARGINS or kind == "eps_share"
            if judged and (t > 0 if changes else t == (kind in ("update", "eps_share"))):
                found.setdefault((kind, name, 0 if changes else t), []).append(value)
                last[kind, name] = t
        tick(t)
    return {(kind, name, last.get((kind, name), t)): geometric_mean(values)
            for (kind, name, t), values in found.items()}  # fmt: skip


def hold_replay(recorded: Mapping[Key, float], found: Mapping[Key, float]) -> tuple[Held, ...]:
    """Holds a model that was built and trained anew against what a check recorded of it.

    Args:
        recorded: The `sizes` that the check recorded, share of eps included.
        found: Those of the new model.

    Raises:
        UserError: One of the two has what the other has not.
    """
    if odd := sorted(recorded.keys() ^ found.keys()):
        kind, name, t = odd[0]
        raise UserError("the record of the coordinate check is not of this model",
                        where=f"evidence.coord_check.replay: {kind} {name}, step {t}",
                        got="missing" if odd[0] in found else "never measured",
                        expected=f"{len(found)} values",
                        cure="Run `mutransfer coord-check` and export again.")  # fmt: skip
    held = []
    for key, right in recorded.items():
        margin = REPLAYED if key[2] <= 1 else REPLAYED_CHANGE
        held.append(_hold("replay", key, (right,), right, (0.0, 0.0), margin.fixed, found[key]))
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
    values: dict[int, list[dict[Key, float]]] = {}
    rungs: dict[int, Rung] = {}
    findings: list[Finding] = []
    jobs = [(width, seed) for width in narrow for seed in range(seeds)] + [(target, 0)]
    for place, (width, seed) in enumerate(jobs):
        trainable = factory(width, seed)
        if width == target:
            findings = check_groups(trainable.groups, trainable.table, trainable.model)

        def tick(t: int, width: int = width) -> None:
            if width == target:
                progress(f"width {width}, step {t} of {steps}")

        values.setdefault(width, []).append(sizes(trainable, steps, tick=tick))
        rungs[width] = Rung(trainable.model, trainable.table, optimizer_kind(trainable.groups),
                            trainable.tokens is not None, None)  # fmt: skip
        del trainable
        gc.collect()  # optimizers are in cycles, and the target's memory is wanted once
        progress(f"width {width}, seed {seed + 1}", (place + 1) / len(jobs))
    ladder = make_ladder(rungs, "width")
    keys = dict.fromkeys(key for found in values.values() for one in found for key in one)
    held = [
        one
        for key in keys
        if (one := _extrapolate(key, values, narrow, target, ladder)) is not None
    ]
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


def _extrapolate(
    key: Key, values: Mapping[int, Sequence[Mapping[Key, float]]], narrow: Sequence[int],
    target: int, ladder: Ladder,
) -> Held | None:  # fmt: skip
    """Holds one value; `None` where no power of the width is right, or nothing moves anywhere."""
    kind, name, _ = key
    right = expectation(kind, name, ladder, Thresholds())
    slope = 0.0 if kind in ("entry", "branch") else right.slope if right is not None else None
    at = [[one.get(key, math.nan) for one in values[width]] for width in (*narrow, target)]
    if slope is None or not any(value for one in at for value in one):
        return None
    margin = MARGINS[kind]
    if kind.endswith("activation") and ladder.module_role(name) == "hidden_out":
        margin = PRODUCT
    small, large, (found,) = geometric_mean(at[0]), geometric_mean(at[1]), at[2]
    octaves = math.log2(target / narrow[-1])
    low = high = 0.0
    if 0 < small < math.inf and 0 < large < math.inf and margin.drift:
        between = math.log2(large / small) / math.log2(narrow[1] / narrow[0]) - slope
        drift = max(-MOST_DRIFT, min(MOST_DRIFT, between)) * octaves
        low, high = min(0.0, drift), max(0.0, drift)
    if kind == "logits" and right is not None and right.below is None:
        low = -math.inf  # how fast it may fall depends on what else is in it, as in a check
    return _hold("target", key, (small, large), large * 2 ** (slope * octaves), (low, high),
                 margin.fixed + margin.per_octave * octaves, found)  # fmt: skip


def _hold(
    stage: Stage, key: Key, narrow: tuple[float, ...], expected: float,
    range_: tuple[float, float], margin: float, found: float,
) -> Held:  # fmt: skip
    """The verdict: FAIL more than `margin` octaves outside the range, WARN half of that.

    What is zero, or no number, on one side alone is a FAIL.
    """
    octaves = 0.0 if found == expected == 0 else math.inf
    if 0 < found < math.inf and 0 < expected < math.inf:
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
