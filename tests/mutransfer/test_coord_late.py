"""The check late in a run: what is judged then, what drifts, and a bug that only shows late."""

from __future__ import annotations

import functools
import importlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from mutransfer.coord_check import CoordCheckResult, Trainable, coord_check
from mutransfer.coord_depth import LOSS_SHIFTS
from mutransfer.coord_expect import Expectation, Ladder, Thresholds, Tolerance
from mutransfer.coord_late import FADE, LEARNED, UNTOLD, drifts, late_expectation
from mutransfer.coord_verdict import INITIAL, Quantity, judge
from mutransfer.errors import UserError
from mutransfer.schedule import set_lr
from mutransfer.symbolic import check_groups

sys.path.insert(0, str(Path(__file__).parents[1]))
zoo: Any = importlib.import_module("coord_zoo")

STEPS = 64
FADES = 1 / (STEPS * zoo.PARAMS.lr)
"""Weight decay of the base width by which weights fade within `STEPS`."""

Injector = Callable[[Any], object]


def strong_decay(built: Any) -> None:
    """Right: at every width alike."""
    for group in built.groups(*zoo.HIDDEN):
        group["weight_decay"] *= FADES / zoo.PARAMS.weight_decay


def decay_not_compensated(built: Any) -> None:
    """The learning rate falls with the width, and the decay is that of the base width."""
    strong_decay(built)
    for group in built.groups(*zoo.HIDDEN):
        group["weight_decay"] /= math.sqrt(built.m) if "momentum" in group else built.m


def trained(
    variant: Any, size: int, seed: int, inject: Injector = lambda built: None, steps: int = STEPS,
    lr: float = 1.0,
) -> Trainable:  # fmt: skip
    """A model that has learned to count in steps of 5 for a while, then another batch."""
    fresh: Trainable = zoo.make(variant, size, seed, inject)
    draw = torch.Generator().manual_seed(1000 + seed)
    ramp = 5 * torch.arange(zoo.SMALL.seq + 1)
    for _ in range(steps):
        start = torch.randint(zoo.SMALL.vocab, (zoo.SMALL.batch, 1), generator=draw)
        noise = torch.randint(3, (zoo.SMALL.batch, zoo.SMALL.seq + 1), generator=draw)
        fresh.optimizer.zero_grad()
        fresh.model.loss((start + ramp + noise) % zoo.SMALL.vocab).backward()  # type: ignore[operator]
        fresh.optimizer.step()
    set_lr(fresh.groups, lr)  # type: ignore[arg-type]
    return replace(fresh, trained=steps)


@functools.cache
def late_check(variant: Any = zoo.ADAMW, inject: Injector | None = None) -> CoordCheckResult:
    def factory(size: int, seed: int) -> Trainable:
        return trained(variant, size, seed, inject or (lambda built: None))

    sizes = zoo.SMALL.widths if variant.axis == "width" else zoo.SMALL.depths
    return coord_check(factory, sizes, seeds=2, steps=4, axis=variant.axis)


def faults(result: CoordCheckResult) -> list[str]:
    return [q.sentence for q in result.quantities if q.verdict == "FAIL"]


@pytest.mark.parametrize("variant", [zoo.ADAMW, zoo.MUON], ids=lambda variant: variant.name)
def test_a_correct_model_does_not_fail_late(variant: Any) -> None:
    result = late_check(variant)
    assert faults(result) == []
    assert result.symbolic == ()
    assert result.trained == STEPS
    assert {q.trained for q in result.quantities} == {STEPS}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "inject"),
    [*((each, None) for each in zoo.CORRECT),
     *((each, strong_decay) for each in (zoo.ADAMW, zoo.MUON, zoo.UNTIED))],
)  # fmt: skip
def test_no_correct_model_fails_late(variant: Any, inject: Injector | None) -> None:
    assert faults(late_check(variant, inject)) == []


@pytest.mark.parametrize("variant", [zoo.ADAMW, zoo.MUON], ids=lambda variant: variant.name)
def test_decay_that_is_not_compensated_shows_late(variant: Any) -> None:
    early = zoo.check(variant, decay_not_compensated)
    if variant == zoo.ADAMW:  # such decay is no small part of Muon's first step
        assert early.measured_verdict != "FAIL"
    late = late_check(variant, decay_not_compensated)
    assert late.measured_verdict == "FAIL"
    told = zoo.measured(late)[0]
    assert told.startswith("weights of ")
    assert told.endswith(FADE)
    assert "right is at most width^-0.50" in told
    assert faults(late_check(variant, strong_decay)) == []
    drift = {(d.kind, d.name): d for d in late.since(early).drifts}
    for name in ("layers.*.attention.o.weight", "layers.*.attention.v.weight"):
        assert drift["weight", name].low > 0.05


def lost_after(steps: int) -> Injector:
    """The hidden learning rates' factors are lost, as by a checkpoint without groups."""

    def inject(built: Any) -> None:
        done = []

        def act() -> None:
            done.append(1)
            if len(done) == steps:
                built.lr(built.m, *zoo.HIDDEN)

        built.after_steps(act)

    return inject


def test_learning_rates_lost_on_the_way_fail_late() -> None:
    bug = lost_after(20)
    assert zoo.check(zoo.ADAMW, bug).verdict != "FAIL"
    late = late_check(zoo.ADAMW, bug)
    assert late.measured_verdict == "FAIL"
    found = {(q.kind, q.name): q for q in late.quantities}
    assert found["update", "layers.*.mlp.up.weight"].slope == pytest.approx(0, abs=0.2)
    assert any(line.startswith(f"updates of {zoo.ALL} scale") for line in late.culprits)


def test_nothing_that_is_true_at_init_alone_is_judged() -> None:
    """Gains and weights have moved, and the learning rate stands at half its peak."""
    half = trained(zoo.ADAMW, 64, 0, lr=0.5)
    late = check_groups(half.groups, half.table, half.model, trained=True)
    assert late == []
    fresh = {finding.field for finding in check_groups(half.groups, half.table, half.model)}
    assert fresh == {"init", "init_std", "learning rate"}
    with torch.no_grad():
        half.groups[0]["peak_lr"] *= 2  # type: ignore[index]
    wrong = check_groups(half.groups, half.table, half.model, trained=True)
    assert {finding.field for finding in wrong} == {"learning rate", "peak learning rate"}


def test_logits_and_loss_are_excepted_and_said_so() -> None:
    result = late_check()
    excepted = {each.kind for each in result.exceptions if each.reason == LEARNED}
    assert excepted == UNTOLD
    assert not {q.kind for q in result.quantities} & UNTOLD
    (line,) = [line for line in result.summary().splitlines() if LEARNED in line]
    assert line.startswith("  not judged: ")
    assert "the loss" in line
    assert "at init" not in result.summary()
    assert LOSS_SHIFTS not in result.summary()


def test_the_model_is_held_against_itself_as_it_was_trained() -> None:
    """At t = 0 nothing has changed, and weights are those after the training."""
    frame = late_check().frame
    changes = frame[frame["kind"].str.startswith("delta_")]
    assert changes["t"].min() == 1
    one = frame.query("kind == 'weight' and name == 'norm.weight' and width == 64 and seed == 1")
    model = trained(zoo.ADAMW, 64, 1).model
    norm = dict(model.named_parameters())["norm.weight"].detach()
    assert one["value"].item() == pytest.approx(float(norm.square().mean().sqrt()), rel=1e-6)


def test_drift_is_the_difference_with_both_errors() -> None:
    def one(kind: str, slope: float | None, half: float, name: str = "a") -> Quantity:
        ends = {"low": None, "high": None} if slope is None else {
            "low": slope - half, "high": slope + half}  # fmt: skip
        return Quantity(
            kind=kind, name=name, t=1, times=(1,), slope=slope, slope_wide=slope, expected=0.0,
            two_sided=True, warn=0.1, fail=0.2, warn_below=0.1, fail_below=0.2, verdict="PASS",
            cause="", sentence="", **ends,
        )  # fmt: skip

    result = late_check()
    early = replace(result, quantities=(
        one("update", -1.0, 0.03), one("eps_share", 0.01, 0.01), one("weight", None, 0.0),
        one("residual", 0.1, 0.0),
    ))  # fmt: skip
    late = replace(result, quantities=(
        one("update", -0.9, 0.04), one("eps_share", 0.02, 0.01), one("weight", 0.2, 0.01),
        one("update", 0.0, 0.1, name="b"),
    ))  # fmt: skip
    (drift,) = drifts(early, late)
    assert (drift.kind, drift.name, drift.early, drift.late) == ("update", "a", -1.0, -0.9)
    assert (drift.drift, drift.low, drift.high) == pytest.approx((0.1, 0.05, 0.15))
    both = late.since(early)
    assert both.to_json()["drifts"] == [
        {"kind": "update", "name": "a", "early": -1.0, "late": -0.9, "drift": drift.drift,
         "low": drift.low, "high": drift.high}
    ]  # fmt: skip
    line = next(line for line in both.summary().splitlines() if "[+0.05, +0.15]" in line)
    assert line.split() == ["updates", "-1.00", "-0.90", "+0.10", "[+0.05,", "+0.15]"]
    assert late.drifts == ()
    assert "drift" not in late.summary()


def test_json_of_a_late_check_is_strict() -> None:
    """Tolerances that never fail are infinite, which JSON does not have."""
    record = late_check().to_json()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["trained"] == STEPS
    assert None in {entry["fail"] for entry in record["quantities"]}


ROLES: Any = {"embedding.weight": "embedding", "layers.*.q.weight": "hidden", "layers.*.o.weight":
              "hidden_out", "norm.weight": "final_gain"}  # fmt: skip
LADDER = Ladder(optimizer="adamw", roles=ROLES, fan_in=dict.fromkeys(ROLES, 1.0),
                fan_out=dict.fromkeys(ROLES, 1.0), tokens=True, trained=100)  # fmt: skip
SOME = Tolerance(warn=0.1, fail=0.2)
RIGHT = Expectation(slope=-0.5, above=SOME, below=SOME, cause_above="up", cause_below="down")


@pytest.mark.parametrize(
    ("kind", "name", "may_fail", "warns"),
    [
        ("update", "norm.weight", True, 0.15),
        ("update", "layers.*.q.weight", True, 0.15),
        ("update_norm", "layers.*.q.weight", True, 0.1),
        ("eps_share", "norm.weight", True, 0.1),
        ("overflow_inputs", "layers.*.q", True, 0.1),
        ("weight", "layers.*.q.weight", True, 0.05),
        ("weight", "norm.weight", False, 0.35),
        ("later_update", "layers.*.q.weight", False, 0.35),
        ("activation", "layers.*.q", False, 0.35),
        ("activation", "layers.*.o", False, 0.7),
        ("delta_activation", "layers.*.q", False, 0.35),
        ("delta_activation", "layers.*.o", False, 0.7),
        ("residual", "layers.*", False, 0.7),
        ("delta_attention_logits", "layers.*.attend", False, 0.7),
        ("delta_logits", "logits", False, 0.35),
    ],
)
def test_what_may_fail_late_and_what_only_warns(
    kind: str, name: str, may_fail: bool, warns: float
) -> None:
    late = late_expectation(kind, name, LADDER, Thresholds(), RIGHT)
    assert late is not None
    assert late.slope == -0.5
    assert late.above.warn == pytest.approx(warns)
    assert math.isfinite(late.above.fail) == may_fail
    assert (late.below is None) == (kind == "weight" and may_fail)
    one_sided = late_expectation(kind, name, LADDER, Thresholds(), replace(RIGHT, below=None))
    assert one_sided is not None
    assert one_sided.below is None


@pytest.mark.parametrize("kind", sorted(UNTOLD))
def test_what_the_loss_decides_has_no_right_slope(kind: str) -> None:
    assert late_expectation(kind, "logits", LADDER, Thresholds(), RIGHT) is None
    assert late_expectation("amax_inputs", "q", LADDER, Thresholds(), None) is None


def judged(kind: str, name: str, slope: float) -> Quantity:
    times = (0,) if kind in INITIAL else (1, 2, 4)
    rows = [(kind, name, t, width, seed, width**slope * (1 + 0.01 * seed))
            for t in times for width in (32, 64, 128) for seed in (0, 1)]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["kind", "name", "t", "width", "seed", "value"])
    (found,), _ = judge(frame, LADDER, Thresholds())
    return found


@pytest.mark.parametrize(
    ("kind", "name", "slope", "verdict"),
    [
        ("weight", "layers.*.q.weight", -0.47, "PASS"),
        ("weight", "layers.*.q.weight", -0.85, "PASS"),
        ("weight", "layers.*.q.weight", -0.42, "WARN"),
        ("weight", "layers.*.q.weight", -0.35, "FAIL"),
        ("activation", "layers.*.q", 0.3, "PASS"),
        ("activation", "layers.*.q", 2.0, "WARN"),
        ("delta_activation", "layers.*.q", -2.0, "WARN"),
        ("update", "layers.*.q.weight", -0.9, "PASS"),
        ("update", "layers.*.q.weight", -0.8, "WARN"),
        ("update", "layers.*.q.weight", -0.6, "WARN"),
        ("update", "layers.*.q.weight", -0.4, "FAIL"),
        ("update", "layers.*.q.weight", -1.3, "FAIL"),
        ("update", "norm.weight", 0.3, "FAIL"),
    ],
)
def test_verdicts_of_clean_slopes(kind: str, name: str, slope: float, verdict: str) -> None:
    assert judged(kind, name, slope).verdict == verdict


def test_models_trained_for_different_times_are_refused() -> None:
    def factory(width: int, seed: int) -> Trainable:
        return trained(zoo.ADAMW, width, seed, steps=width // 32)

    with pytest.raises(UserError, match="trained: the factory's models differ in more than width"):
        coord_check(factory, (32, 64, 128), seeds=1, steps=2)
