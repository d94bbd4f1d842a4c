"""The recipes that ship: the reference's borders and rates, and what a small team can pay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from full_scale.recipe import Phase, Recipe, load_recipe
from mutransfer.rules import DEFAULT
from proxies.presets import get_preset

REFERENCE = Path(__file__).parents[3] / "shared" / "reference" / "xmodel_recipe.json"
PEAK = 1 / 600  # of the reference's hidden matrices
BORDERS = {"W": 2_000, "S1": 270_000, "S2": 530_000, "D": 550_000, "L8k": 553_000, "L16k": 560_000}
XMODEL = ["xmodel-2.5", "xmodel-2.5-fixed"]


def ends(recipe: Recipe) -> dict[str, int]:
    """The last step of each phase, a warmup of a stage being part of the stage."""
    found, step = {}, 0
    for phase in recipe.phases:
        step += phase.steps
        found[phase.name.removesuffix("-warmup")] = step
    return found


@pytest.mark.parametrize("name", XMODEL)
def test_borders_of_xmodel(name: str) -> None:
    recipe = load_recipe(name)
    assert ends(recipe) == BORDERS
    assert recipe.steps == 560_000
    assert recipe.model == get_preset("xmodel-2.5")
    assert recipe.model.n_parameters == 1_350_059_520
    assert recipe.model.max_seq_len == 131_072
    assert {p.name for p in recipe.phases if p.optimizer == "adamw"} == {"W", "S1", "S2"}
    assert recipe.phases[3].name == "D"
    assert recipe.at(530_000)[0].optimizer == "muon"
    assert recipe.at(529_999)[0].optimizer == "adamw"


def test_xmodel_takes_the_scripts_numbers() -> None:
    recipe = load_recipe("xmodel-2.5")
    assert recipe.parametrization == "xmodel"
    sizes = [(p.name, p.seq_len, p.batch_size, p.micro_batch) for p in recipe.phases]
    assert sizes == [
        ("W", 3712, 480, 4), ("S1", 3712, 480, 4), ("S2", 3712, 960, 4), ("D", 3776, 960, 4),
        ("L8k-warmup", 8192, 960, 2), ("L8k", 8192, 960, 2), ("L16k-warmup", 16384, 240, 1),
        ("L16k", 16384, 240, 1),
    ]  # fmt: skip
    assert recipe.horizon_tokens == 1_531_207_680_000
    # hidden lr after the given number of steps
    rates = {1: PEAK / 2000, 2000: PEAK, 530_000: PEAK, 550_000: PEAK / 16,
             550_500: PEAK / 16, 553_000: 7.938598947368422e-05, 553_500: PEAK / 16,
             560_000: 3.973685263157895e-05}  # fmt: skip
    for step, rate in rates.items():
        phase, index = recipe.at(step - 1)
        assert PEAK * phase.factor(index) == pytest.approx(rate, rel=1e-6), step
    # half-way through the decay: 0.4142 of the way from 1 to 1/16 is left
    phase, index = recipe.at(539_999)
    assert phase.factor(index) == pytest.approx(1 / 16 + 15 / 16 * (2**0.5 - 1), rel=1e-12)
    assert [phase.name for phase in recipe.phases if phase.recompute] == [
        "L8k-warmup", "L8k", "L16k-warmup", "L16k",
    ]  # fmt: skip
    # the only jumps are the scripts' restarts from 1e-6
    assert [line.rpartition(" as ")[2] for line in recipe.jumps] == [
        "L8k-warmup starts", "L16k-warmup starts",
    ]  # fmt: skip
    assert recipe.phases[4].lr_start * PEAK == pytest.approx(1e-6)


@pytest.mark.skipif(not REFERENCE.is_file(), reason="the reference's facts are not beside us")
def test_xmodel_against_the_facts_of_the_reference() -> None:
    facts: dict[str, Any] = json.loads(REFERENCE.read_text(encoding="utf-8"))
    recipe = load_recipe("xmodel-2.5")
    ours: dict[str, list[Phase]] = {}
    names = {"W": "warmup+S1", "S1": "warmup+S1", "S2": "S2", "D": "decay_muon",
             "L8k": "LCR_8k", "L16k": "LCR_16k"}  # fmt: skip
    for phase in recipe.phases:
        ours.setdefault(names[phase.name.removesuffix("-warmup")], []).append(phase)
    theirs = {phase["name"]: phase for phase in facts["phases"]}
    step = 0
    for name, phases in ours.items():
        fact = theirs[name]
        assert [step, step + sum(p.steps for p in phases)] == fact["iters"], name
        step = fact["iters"][1]
        for phase in phases:
            assert (phase.seq_len, phase.batch_size) == (fact["seq_len"], fact["global_batch"])
        assert sum(p.tokens for p in phases) == fact["tokens"]
        if "lr_hidden" in fact:
            last = phases[-1].factor(phases[-1].steps - 1)
            peak = facts["mup_bundle"]["lr_hidden"]
            assert peak * last == pytest.approx(fact["lr_hidden"][1], rel=1e-5), name
    assert recipe.horizon_tokens == facts["token_totals"]["all_incl_LCR"]
    assert recipe.clip_norm == facts["common_optim"]["clip_grad"]


def test_the_fixed_run_has_no_jump_and_the_default_rules() -> None:
    recipe = load_recipe("xmodel-2.5-fixed")
    assert recipe.parametrization == DEFAULT
    assert recipe.jumps == ()
    assert recipe.phases[3].momentum == "fresh"
    assert recipe.phases[-1].lr_end * PEAK == pytest.approx(1e-5)
    # one line from 550k to 560k
    slopes = [(p.lr_start - p.lr_end) / p.steps for p in recipe.phases[-2:]]
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-9)


def test_one_billion_on_100_billion_tokens() -> None:
    recipe = load_recipe("1b-100b")
    assert recipe.horizon_tokens == pytest.approx(100e9, rel=0.005)
    assert recipe.model.n_parameters == pytest.approx(1.06e9, rel=0.005)
    assert recipe.jumps == ()
    tokens = {phase.name: phase.tokens / recipe.horizon_tokens for phase in recipe.phases}
    assert tokens["decay"] == pytest.approx(0.2, abs=0.005)
    assert tokens["long-context"] == pytest.approx(0.015, abs=0.001)


@pytest.mark.parametrize("name", XMODEL)
def test_mixtures_of_xmodel(name: str) -> None:
    """Thirteen sources up to the decay; from there eleven, two thirds of it instructions."""
    recipe = load_recipe(name)
    mixtures = {p.name: recipe.mixture_of(p) or {} for p in recipe.phases}
    for phase in ("W", "S1", "S2"):
        assert len(mixtures[phase]) == 13
        assert mixtures[phase]["ultrafineweb-en"] == 0.41
    for phase in mixtures.keys() - {"W", "S1", "S2"}:
        assert len(mixtures[phase]) == 11
        assert mixtures[phase]["sft_mixed_v2_deduped_v4"] == 0.6687
    assert all(abs(sum(each.values()) - 1) < 1e-3 for each in mixtures.values())
    assert set(recipe.sources) == set(mixtures["S1"]) | set(mixtures["D"])


@pytest.mark.skipif(not REFERENCE.exists(), reason="needs the reference's numbers")
def test_mixtures_are_the_reference_s() -> None:
    phases = {phase["name"]: phase for phase in json.loads(REFERENCE.read_text())["phases"]}
    recipe = load_recipe("xmodel-2.5")
    for ours, theirs in (("S1", "warmup+S1"), ("S2", "S2"), ("D", "decay_muon"),
                         ("L8k", "LCR_8k"), ("L16k", "LCR_16k")):  # fmt: skip
        (phase,) = (p for p in recipe.phases if p.name == ours)
        assert recipe.mixture_of(phase) == phases[theirs]["data"]
