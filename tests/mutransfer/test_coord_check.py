"""The whole check on the real decoder: what it measures, what it says, what it refuses.

That it catches bugs is examined in `test_coord_zoo.py`; here a few of them serve as examples.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mutransfer
from mutransfer.coord_check import CoordCheckResult, Thresholds, Trainable, coord_check
from mutransfer.coord_expect import Tolerance
from mutransfer.errors import UserError
from mutransfer.groups import param_groups
from mutransfer.optimizers import Matrix
from mutransfer.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))
zoo: Any = importlib.import_module("coord_zoo")

STEPS, SEQ = zoo.SMALL.steps, zoo.SMALL.seq
WIDTHS, FEW = (32, 64, 128, 256), (32, 64, 128)

Bug = Callable[[Any], object]
hidden_lr_not_scaled: Bug = zoo.bug("hidden lr not scaled").inject
frozen_keys: Bug = zoo.bug("a frozen group").inject
decay_not_compensated: Bug = zoo.bug("weight decay not compensated").inject


def make(
    width: int,
    seed: int,
    *,
    name: str = "completep-tied",
    matrix: Matrix = "adamw",
    bug: Bug = lambda built: None,
) -> Trainable:
    variant = zoo.Variant(name=name, rules=name, matrix=matrix)
    trainable: Trainable = zoo.make(variant, width, seed, bug)
    return trainable


def check(
    name: str = "completep-tied", matrix: Matrix = "adamw", bug: Bug | None = None
) -> CoordCheckResult:
    return run_once(name, matrix, bug)


@functools.cache
def run_once(name: str, matrix: Matrix, bug: Bug | None) -> CoordCheckResult:
    def factory(width: int, seed: int) -> Trainable:
        return make(width, seed, name=name, matrix=matrix, bug=bug or (lambda built: None))

    return coord_check(factory, WIDTHS if bug is None else FEW, seeds=2, steps=STEPS)


@pytest.mark.parametrize("matrix", ["adamw", "muon"])
def test_the_default_has_no_fault(matrix: Matrix) -> None:
    result = check("completep-tied", matrix)
    assert [q.sentence for q in result.quantities if q.verdict == "FAIL"] == []
    assert result.verdict != "FAIL"
    assert result.symbolic == ()
    assert (result.parametrization, result.optimizer) == ("completep-tied", matrix)
    assert (result.widths, result.seeds, result.steps) == (WIDTHS, 2, STEPS)


@pytest.mark.parametrize("matrix", ["adamw", "muon"])
def test_slopes_that_are_exact_by_construction(matrix: Matrix) -> None:
    """Adam's first step is lr * sign; Muon's has the RMS-operator norm lr * c, one for all."""
    found = {(q.kind, q.name): q.slope for q in check("completep-tied", matrix).quantities}
    assert found["update", "embedding.weight"] == pytest.approx(0, abs=0.01)
    assert found["update", "norm.weight"] == pytest.approx(0, abs=0.01)
    assert found["weight", "layers.*.mlp.down.weight"] == pytest.approx(-0.5, abs=0.02)
    assert found["weight", "embedding.weight"] == pytest.approx(0, abs=0.02)
    down = ("update", "layers.*.mlp.down.weight")
    if matrix == "adamw":
        assert found[down] == pytest.approx(-1, abs=0.01)
    else:
        assert found["update_norm", down[1]] == pytest.approx(0, abs=0.06)


def test_everything_that_the_reference_lists_is_measured() -> None:
    result = check()
    frame = result.frame
    assert list(frame) == ["kind", "name", "t", "width", "seed", "value"]
    assert sorted(frame["t"].unique()) == [0, 1, 2, 4]
    assert not frame.duplicated(["kind", "name", "t", "width", "seed"]).any()
    assert len(frame) % (len(WIDTHS) * 2) == 0
    later = ("activation", "residual", "attention_logits", "logits")
    kinds = {*later, *(f"delta_{kind}" for kind in later), "weight", "update", "update_norm",
             "later_update", "update_ratio", "alignment", "eps_share", "loss"}  # fmt: skip
    assert set(frame["kind"]) == kinds
    judged = {(q.kind, q.name) for q in result.quantities}
    excused = {(each.kind, each.name) for each in result.exceptions}
    measured_at_all = set(zip(frame["kind"], frame["name"], strict=True))
    shown = {key for key in measured_at_all if key[0] in ("update_ratio", "alignment")}
    assert judged | excused == measured_at_all - shown
    assert not judged & excused
    loss = frame[(frame["kind"] == "loss") & (frame["t"] == 0)]
    trainable = make(64, 1)
    expected = loss[(loss["width"] == 64) & (loss["seed"] == 1)]["value"].item()
    assert float(trainable.loss().detach()) == pytest.approx(expected, rel=1e-6)


def test_the_check_trains_as_a_plain_loop_does() -> None:
    """Bit for bit: hooks and measurements touch neither weights nor gradients."""
    kept: dict[tuple[int, int], Trainable] = {}

    def factory(width: int, seed: int) -> Trainable:
        return kept.setdefault((width, seed), make(width, seed))

    coord_check(factory, (32, 64, 96), seeds=1, steps=3)
    alone = make(64, 0)
    for _ in range(3):
        alone.optimizer.zero_grad()
        alone.loss().backward()  # type: ignore[no-untyped-call]
        alone.optimizer.step()
    trained = dict(kept[64, 0].model.named_parameters())
    for fqn, parameter in alone.model.named_parameters():
        assert torch.equal(parameter, trained[fqn]), fqn


def test_widths_may_come_in_any_order_and_twice() -> None:
    made: list[tuple[int, int]] = []

    def factory(width: int, seed: int) -> Trainable:
        made.append((width, seed))
        return make(width, seed)

    shares: list[float | None] = []
    result = coord_check(
        factory, [96, 32, 64, 32], seeds=2, steps=2,
        progress=lambda line, share=None: shares.append(share),
    )  # fmt: skip
    assert result.widths == (32, 64, 96)
    assert made == [(width, seed) for width in (32, 64, 96) for seed in (0, 1)]
    assert shares == pytest.approx([i / 6 for i in range(1, 7)])


@pytest.mark.parametrize(
    ("matrix", "what", "cause"),
    [
        ("adamw", "first updates", "the learning rate is not divided by the width"),
        ("muon", "operator norms", "Muon's step is not divided by the square root of the width"),
    ],
)
def test_the_standard_parametrization_fails_and_says_why(
    matrix: Matrix, what: str, cause: str
) -> None:
    result = check("sp", matrix)
    assert result.verdict == result.measured_verdict == "FAIL"
    assert result.symbolic == ()  # it is built as its own table says
    assert result.culprits[0].startswith(what)
    assert result.culprits[0].endswith(cause)
    line = next(line for line in result.culprits if line.startswith(what))
    assert f"of {zoo.ALL} scale as width^" in line
    assert line.endswith(cause)
    logits = next(line for line in result.culprits if line.startswith("self-token logits"))
    assert logits.endswith("the output multiplier is not divided by the width")


def test_the_fork_s_init_and_muon_are_found() -> None:
    """`xmodel`: o and down at s/sqrt(2L) without m, norm gains and Muon at 1/m."""
    adamw, muon = check("xmodel"), check("xmodel", "muon")
    assert adamw.symbolic == muon.symbolic == ()
    wrong = "layers.*.attention.o, layers.*.mlp.down scale as width^"
    assert adamw.culprits[0].startswith(f"initial weights of {wrong}+0.")
    gains = "first updates of layers.*.{attention_norm,mlp_norm}, norm scale as width^-1.00"
    assert any(line.startswith(gains) for line in adamw.culprits)
    steps = next(line for line in muon.culprits if line.startswith("operator norms"))
    assert zoo.ALL in steps
    assert steps.endswith("Muon's step is divided by the width where the square root is right")


def poisoned(build: Any) -> None:
    with torch.no_grad():
        build.model.embedding.weight[:, 0] = math.nan


def one_width_poisoned(build: Any) -> None:
    if build.m == 2:
        poisoned(build)


@pytest.mark.parametrize(("bug", "widths"), [(poisoned, "32, 64, 128"), (one_width_poisoned, "64")])
def test_a_model_that_is_no_number_fails(bug: Bug, widths: str) -> None:
    result = check(bug=bug)
    assert result.measured_verdict == "FAIL"
    causes = {q.kind: q.cause for q in result.quantities if q.kind in ("loss", "residual")}
    assert causes == dict.fromkeys(("loss", "residual"), f"the run diverges (width {widths})")
    assert [e for e in result.exceptions if e.reason.startswith("zero")] == []
    json.dumps(result.to_json(), allow_nan=False)


def test_findings_know_the_width_they_were_first_seen_at() -> None:
    """At the base width nothing is scaled, so nothing is wrong yet."""
    result = check(bug=hidden_lr_not_scaled)
    assert {finding.width for finding in result.symbolic} == {64}
    frozen = check(bug=frozen_keys)
    assert {finding.width for finding in frozen.symbolic} == {32}


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("completep-tied", "muon"),
        ("sp",),
        ("completep-tied", "adamw", frozen_keys),
        ("completep-tied", "muon", hidden_lr_not_scaled),
    ],
)
def test_json_is_strict_and_starts_with_the_verdict(arguments: tuple[Any, ...]) -> None:
    result = check(*arguments)
    record = result.to_json()
    assert list(record)[:2] == ["verdict", "schema_version"]
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["verdict"] == result.verdict
    assert record["widths"] == list(result.widths)
    assert record["culprits"] == list(result.culprits)
    assert len(record["quantities"]) == len(result.quantities)
    assert len(record["symbolic"]) == len(result.symbolic)
    for entry, q in zip(record["quantities"], result.quantities, strict=True):
        assert (entry["kind"], entry["name"], entry["slope"]) == (q.kind, q.name, q.slope)
        assert (entry["slope"] is None) == ("nothing moves it" in q.sentence)


def test_summary_says_what_was_found() -> None:
    text = check("sp").summary()
    assert text.startswith("coordinate check of sp under adamw: FAIL\n")
    assert "widths 32, 64, 128, 256; 2 seeds; 4 steps" in text
    assert "as in the table: all" in text
    assert f"  - {check('sp').culprits[0]}" in text.splitlines()
    broken = check(bug=decay_not_compensated).summary()
    assert "as in the table: 7 differences from the table" in broken


def test_thresholds_of_one_s_own_are_used() -> None:
    strict = Thresholds(logits_change_below=Tolerance(warn=1e-4, fail=1e-3))
    result = coord_check(make, (32, 64, 128), seeds=2, steps=2, thresholds=strict)
    (logits,) = [q for q in result.quantities if q.kind == "delta_logits"]
    assert (logits.warn_below, logits.fail_below) == (1e-4, 1e-3)
    assert logits.verdict == "FAIL"
    assert logits.slope < -0.1  # type: ignore[operator]


def refuse(
    match: str, factory: Callable[[int, int], Trainable] = make, widths: Any = (32, 64, 96),
    **keywords: int,
) -> UserError:  # fmt: skip
    with pytest.raises(UserError, match=match) as caught:
        coord_check(factory, widths, **({"seeds": 1, "steps": 2} | keywords))
    return caught.value


def never(width: int, seed: int) -> Trainable:
    raise AssertionError("the arguments are checked before anything is built")


@pytest.mark.parametrize(
    ("widths", "got"),
    [((32, 64), [32, 64]), ((32, 32, 64), [32, 64]), ((), []), ((0, 32, 64), [0, 32, 64])],
)
def test_too_few_widths_are_refused(widths: tuple[int, ...], got: list[int]) -> None:
    error = refuse("^widths: too few widths", never, widths)
    assert (error.got, error.expected) == (got, "at least 3 different ones")


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [("seeds", 0, 1), ("seeds", -1, 1), ("steps", 1, 2), ("steps", 0, 2)],
)
def test_too_few_seeds_or_steps_are_refused(name: str, value: int, least: int) -> None:
    error = refuse(f"^{name}: too few", never, **{name: value})
    assert (error.got, error.expected) == (value, f"at least {least}")


def untied(width: int, seed: int) -> Trainable:
    return zoo.make(zoo.ADAMW if width == 64 else zoo.UNTIED, width, seed)  # type: ignore[no-any-return]


def deeper(width: int, seed: int) -> Trainable:
    return zoo.make(zoo.DEPTH, width // 32, seed)  # type: ignore[no-any-return]


def mixed(width: int, seed: int) -> Trainable:
    return make(width, seed, matrix="muon" if width == 64 else "adamw")


def sometimes(width: int, seed: int) -> Trainable:
    trainable = make(width, seed)
    return replace(trainable, tokens=None) if width == 64 else trainable


@pytest.mark.parametrize(
    ("factory", "where"),
    [(untied, "roles"), (deeper, "parameters"), (mixed, "optimizer"), (sometimes, "tokens")],
)
def test_models_that_differ_in_more_than_width_are_refused(
    factory: Callable[[int, int], Trainable], where: str
) -> None:
    error = refuse(f"^{where}: the factory's models differ in more than width", factory)
    assert error.got == "another at width 64 than at 32"
    assert error.expected == "the same at every width"


def test_a_depth_ladder_is_told_in_depths() -> None:
    """The stream and its change keep their size, and every block moves by its share."""
    result = zoo.check(zoo.DEPTH)
    found = {(q.kind, q.name): q for q in result.quantities}
    assert (result.axis, result.widths) == ("depth", zoo.SMALL.depths)
    assert {q.axis for q in result.quantities} == {"depth"}
    assert found["update", "layers.*.mlp.down.weight"].slope == pytest.approx(0, abs=0.01)
    assert found["branch", "layers.*"].slope == pytest.approx(-1, abs=0.15)
    assert found["delta_branch", "layers.*"].expected == -1
    assert "depths 2, 4, 8; 2 seeds" in result.summary()
    assert result.to_json()["axis"] == "depth"


@pytest.mark.parametrize(
    ("factory", "match"),
    [
        (lambda depth, seed: make(32 * depth, seed), "shapes: .* differ in more than depth"),
        (lambda depth, seed: make(32, seed), "do not grow with the depth"),
    ],
)
def test_depths_that_are_none_are_refused(
    factory: Callable[[int, int], Trainable], match: str
) -> None:
    with pytest.raises(UserError, match=match):
        coord_check(factory, (1, 2, 4), seeds=1, steps=2, axis="depth")


def test_models_that_do_not_grow_are_refused() -> None:
    """All slopes of a factory that forgets the width would be flat, hence right."""
    error = refuse("do not grow with the width", lambda width, seed: make(32, seed))
    assert (error.where, error.got) == ("factory", "equal shapes at 32 and 96")


def test_an_optimizer_without_groups_is_refused() -> None:
    def factory(width: int, seed: int) -> Trainable:
        class Bare:
            def step(self) -> None: ...

            def zero_grad(self) -> None: ...

        return replace(make(width, seed), optimizer=Bare())

    error = refuse(r"^Trainable\.optimizer: .*no parameter groups", factory)
    assert (error.got, error.expected) == ("Bare", "a list `groups`")


def test_a_table_of_another_width_is_refused() -> None:
    def factory(width: int, seed: int) -> Trainable:
        table: Table = make(32, seed).table
        return replace(make(width, seed), table=table)

    refuse(r"^embedding\.weight: shape differs from the table's", factory)


def test_another_batch_at_every_call_is_refused_where_its_shape_shows() -> None:
    def factory(width: int, seed: int) -> Trainable:
        trainable = make(width, seed)
        lengths = iter(range(SEQ, 0, -1))
        model, tokens = trainable.model, trainable.tokens
        loss: Any = lambda: model.loss(tokens[:, : next(lengths)])  # type: ignore[operator, index]  # noqa: E731
        return replace(trainable, loss=loss, tokens=None)

    refuse("output changes its shape between steps.*one fixed batch", factory)


def test_a_plain_torch_optimizer_will_do() -> None:
    def factory(width: int, seed: int) -> Trainable:
        trainable = make(width, seed)
        groups = param_groups(trainable.model, trainable.table, "adamw")
        return replace(trainable, optimizer=torch.optim.AdamW(groups, fused=True))

    plain = coord_check(factory, (32, 64, 96), seeds=1, steps=2)
    ours = coord_check(make, (32, 64, 96), seeds=1, steps=2)
    assert plain.frame.equals(ours.frame)
    assert plain.symbolic == ours.symbolic == ()


def test_the_name_is_a_function_whoever_imported_the_module_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = importlib.import_module("mutransfer.coord_check")
    assert sys.modules["mutransfer.coord_check"] is module
    monkeypatch.delattr(mutransfer, "coord_check", raising=False)
    assert mutransfer.coord_check is coord_check  # found by name
    monkeypatch.setattr(mutransfer, "coord_check", module)  # what an import leaves behind
    for call in (mutransfer.coord_check, module):
        with pytest.raises(UserError, match="too few widths"):
            call(never, (32, 64))
    assert module.coord_check is coord_check
    assert module.Trainable is Trainable
    called = module(make, (32, 64, 96), seeds=1, steps=2)
    assert isinstance(called, CoordCheckResult)


def test_the_module_is_there_after_the_function_was_used_first() -> None:
    program = (
        "import mutransfer\n"
        "mutransfer.coord_check\n"
        "import mutransfer.coord_check as module\n"
        "assert module.Trainable and callable(module) and module is mutransfer.coord_check\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
