"""The whole check on the real decoder: what is right passes, what is broken is named.

Every bug is put into a correct build after the fact, as a user's slip would be, and must be
caught by the slopes alone, by the symbolic check alone, or by both, as stated beside it.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mutransfer
from mutransfer.apply import initialize
from mutransfer.coord_check import CoordCheckResult, Thresholds, Trainable, coord_check
from mutransfer.coord_expect import Tolerance
from mutransfer.coord_text import culprits
from mutransfer.errors import UserError
from mutransfer.groups import param_groups
from mutransfer.optimizers import Matrix, Optimizers
from mutransfer.rules import BaseParams
from mutransfer.table import Table
from proxies.decoder import Decoder, DecoderConfig
from proxies.presets import TINY
from proxies.tables import decoder_table

PARAMS = BaseParams(
    lr=2**-7, embedding_lr_ratio=2.0, init_std=0.1, embedding_multiplier=3.0,
    output_multiplier=2.0, residual_multiplier=1.5, weight_decay=0.1,
)  # fmt: skip
TARGET = TINY.model_copy(update={"vocab_size": 64})
BASE, SEQ, BATCH, STEPS = 32, 16, 4, 4
WIDTHS, FEW = (32, 64, 128, 256), (32, 64, 128)
HIDDEN = "layers.*.attention.{q,k,v,o}, layers.*.mlp.{gate,up,down}"


@dataclass
class Build:
    """A correct build, for a bug to break; `m` is its width ratio."""

    model: Decoder
    optimizers: Optimizers
    m: float

    def group(self, parameter: Tensor) -> dict[str, Any]:
        groups = self.optimizers.groups
        return next(g for g in groups if any(p is parameter for p in g["params"]))

    def assign(self, group: dict[str, Any], lr: float) -> None:
        group["lr"] = group["peak_lr"] = lr


Bug = Callable[[Build], object]


def make_batch(seed: int, vocab: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (BATCH, SEQ + 1), generator=generator)


def make(
    width: int,
    seed: int,
    *,
    name: str = "completep-tied",
    matrix: Matrix = "adamw",
    bug: Bug | None = None,
    target: DecoderConfig = TARGET,
) -> Trainable:
    config = target.narrow(width)
    table = decoder_table(config, target.narrow(BASE), PARAMS, name)
    model = Decoder(config)
    initialize(model, table, seed=seed)
    build = Build(model, Optimizers(model, table, matrix), width / BASE)
    if bug is not None:
        bug(build)
    batch = make_batch(seed)
    return Trainable(
        model=model,
        optimizer=build.optimizers,
        loss=lambda: model.loss(batch),
        table=table,
        tokens=batch[:, :-1],
    )


def check(
    name: str = "completep-tied", matrix: Matrix = "adamw", bug: Bug | None = None
) -> CoordCheckResult:
    return run_once(name, matrix, bug)


@functools.cache
def run_once(name: str, matrix: Matrix, bug: Bug | None) -> CoordCheckResult:
    def factory(width: int, seed: int) -> Trainable:
        return make(width, seed, name=name, matrix=matrix, bug=bug)

    return coord_check(factory, WIDTHS if bug is None else FEW, seeds=2, steps=STEPS)


def measured(result: CoordCheckResult) -> tuple[str, ...]:
    """The culprits, had there been no symbolic check."""
    return culprits(result.quantities, ())


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
             "update_ratio", "loss"}  # fmt: skip
    assert set(frame["kind"]) == kinds
    judged = {(q.kind, q.name) for q in result.quantities}
    excused = {(each.kind, each.name) for each in result.exceptions}
    measured_at_all = set(zip(frame["kind"], frame["name"], strict=True))
    assert judged | excused == {key for key in measured_at_all if key[0] != "update_ratio"}
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
    assert result.culprits[0].startswith("first updates of layers.*")
    assert result.culprits[0].endswith(cause)
    line = next(line for line in result.culprits if line.startswith(what))
    assert f"of {HIDDEN} scale as width^" in line
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
    assert HIDDEN in steps
    assert steps.endswith("Muon's step is divided by the width where the square root is right")


def hidden_lr_not_scaled(build: Build) -> None:
    for group in build.optimizers.matrix.param_groups:
        build.assign(group, PARAMS.lr)


def logits_multiplier_dropped(build: Build) -> None:
    build.model.output_multiplier.fill_(PARAMS.output_multiplier)


def embedding_lr_like_hidden(build: Build) -> None:
    build.assign(build.group(build.model.embedding.weight), 2 * PARAMS.lr / build.m)


def gains_lr_like_hidden(build: Build) -> None:
    build.assign(build.group(build.model.norm.weight), PARAMS.lr / build.m)


def frozen_keys(build: Build) -> None:
    for block in build.model.layers:
        block.attention.k.weight.requires_grad_(False)


def forgotten_group(build: Build) -> None:
    lost = {id(block.mlp.up.weight) for block in build.model.layers}
    for group in build.optimizers.matrix.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in lost]


def out_init_without_width(build: Build) -> None:
    with torch.no_grad():
        for block in build.model.layers:
            block.attention.o.weight.mul_(math.sqrt(build.m))
            block.mlp.down.weight.mul_(math.sqrt(build.m))


def softmax_scale_grows(build: Build) -> None:
    build.model.attention_multiplier.mul_(math.sqrt(build.m))


def muon_over_width(build: Build) -> None:
    for group in build.optimizers.matrix.param_groups:
        build.assign(group, PARAMS.lr / build.m)


def schedule_that_assigns(build: Build) -> None:
    step = build.optimizers.step

    def step_and_assign() -> None:
        step()
        for group in build.optimizers.groups:
            group["lr"] = PARAMS.lr

    build.optimizers.step = step_and_assign  # type: ignore[method-assign]


LR_SHRINKS = "right is width^+0.00: the learning rate is scaled like a hidden matrix's"
MISSING = "the output multiplier is not divided by the width"
STILL = "nothing moves it: frozen, in no optimizer group, or without a gradient (width 32, 64, 128)"


@pytest.mark.parametrize(
    ("bug", "matrix", "symbolic", "start", "end"),
    [
        (
            hidden_lr_not_scaled, "adamw",
            "learning rate of layers.*.attention.q.weight is 0.007812; the table says 0.003906 "
            "(and 6 more like it)",
            f"first updates of {HIDDEN} scale as width^+0.00, right is width^-1.00: ",
            "the learning rate is not divided by the width",
        ),
        (
            hidden_lr_not_scaled, "muon",
            "learning rate times update scale of layers.*.attention.q.weight is",
            "first updates of layers.*.attention.",
            "Muon's step is not divided by the square root of the width",
        ),
        (
            muon_over_width, "muon",
            "learning rate times update scale of layers.*.attention.q.weight is",
            f"operator norms of the updates of {HIDDEN} scale as width^-0.",
            "Muon's step is divided by the width where the square root is right",
        ),
        (
            embedding_lr_like_hidden, "adamw",
            "learning rate of embedding.weight is 0.007812; the table says 0.01562",
            "first updates of embedding scale as width^-1.00, ",
            LR_SHRINKS,
        ),
        (
            gains_lr_like_hidden, "adamw",
            "learning rate of layers.*.attention_norm.weight is 0.003906; the table says "
            "0.007812 (and 2 more like it)",
            "first updates of layers.*.{attention_norm,mlp_norm}, norm scale as width^-1.00, ",
            LR_SHRINKS,
        ),
        (
            frozen_keys, "adamw",
            "layers.0.attention.k.weight is frozen (requires_grad is False)",
            "first updates of layers.*.attention.k: ",
            STILL,
        ),
        (
            frozen_keys, "muon",
            "layers.0.attention.k.weight is frozen (requires_grad is False)",
            "first updates of layers.*.attention.k: ",
            STILL,
        ),
        (
            forgotten_group, "adamw",
            "layers.0.mlp.up.weight is in no optimizer group",
            "first updates of layers.*.mlp.up: ",
            STILL,
        ),
        (
            logits_multiplier_dropped, "adamw",
            "the output multiplier is 2; the table says 1",
            "self-token logits at init scale as width^+",
            MISSING,
        ),
        (
            out_init_without_width, "adamw",
            "init std of layers.*.attention.o.weight is",
            "initial weights of layers.*.attention.o, layers.*.mlp.down scale as width^",
            "right is width^-0.50: the init std is not divided by the square root of the width",
        ),
        (
            softmax_scale_grows, "adamw",
            "the attention multiplier is 0.3536; the table says 0.25",
            "attention logits at init scale as width^+",
            "the softmax scale, or the init of q and k, is too large in width",
        ),
        (
            schedule_that_assigns, "adamw",
            "after the steps the groups' learning rates stand at different fractions",
            "operator norms of the updates of layers.*",
            "the learning rate is not divided by the width",
        ),
    ],
)  # fmt: skip
def test_a_bug_is_caught_by_slopes_and_by_symbols_alike(
    bug: Bug, matrix: Matrix, symbolic: str, start: str, end: str
) -> None:
    result = check("completep-tied", matrix, bug)
    assert result.verdict == result.measured_verdict == "FAIL"
    assert result.culprits[0].startswith(symbolic)
    assert measured(result)[0].startswith(start)
    assert measured(result)[0].endswith(end)


def decay_not_compensated(build: Build) -> None:
    for group in build.optimizers.matrix.param_groups:
        group["weight_decay"] = PARAMS.weight_decay


def eps_not_scaled(build: Build) -> None:
    for group in build.optimizers.groups:
        group["eps"] = PARAMS.eps


def beta_of_torch_s_default(build: Build) -> None:
    for group in build.optimizers.groups:
        group["betas"] = (0.9, 0.999)


@pytest.mark.parametrize(
    ("bug", "first", "patterns"),
    [
        (decay_not_compensated, "weight decay of layers.*.attention.q.weight is 0.1; the table "
         "says 0.2 (and 6 more like it)", 7),
        (eps_not_scaled, "eps of embedding.weight is 1e-08; the table says 5e-09 (and 10 more", 11),
        (beta_of_torch_s_default, "beta2 of embedding.weight is 0.999; the table says 0.95", 11),
    ],
)  # fmt: skip
def test_what_no_slope_can_see_is_caught_by_symbols(bug: Bug, first: str, patterns: int) -> None:
    result = check(bug=bug)
    assert result.measured_verdict != "FAIL"
    assert result.verdict == "FAIL"
    assert result.culprits[0].startswith(first)
    assert len(result.symbolic) == patterns


def hook(module: nn.Module, factor: float) -> None:
    module.register_forward_hook(lambda _module, _inputs, output: output * factor)


def logits_divided_twice(build: Build) -> None:
    hook(build.model.norm, 1 / build.m)


def logits_not_divided(build: Build) -> None:
    hook(build.model.norm, build.m)


def queries_scaled_by_hand(build: Build) -> None:
    for block in build.model.layers:
        hook(block.attention.q, math.sqrt(build.m))


def branches_that_grow(build: Build) -> None:
    for block in build.model.layers:
        hook(block.attention.o, math.sqrt(build.m))
        hook(block.mlp.down, math.sqrt(build.m))


def values_without_gradient(build: Build) -> None:
    for block in build.model.layers:
        block.attention.v.register_forward_hook(lambda _m, _i, output: output.detach())


@pytest.mark.parametrize(
    ("bug", "start", "end"),
    [
        (logits_not_divided, "self-token logits at init scale as width^+", MISSING),
        (
            logits_divided_twice,
            "other-token logits at init scale as width^-1.",
            "the output multiplier is divided by the width more than once",
        ),
        (
            queries_scaled_by_hand,
            "activations of layers.*.attention.q at init scale as width^+",
            "does not shrink with the fan-in",
        ),
        (
            branches_that_grow,
            "activations of layers.*.attention.o, layers.*.mlp.down at init scale as width^+",
            "does not shrink with the fan-in",
        ),
        (values_without_gradient, "first updates of layers.*.attention.v: ", STILL),
    ],
)
def test_what_hides_in_the_forward_pass_is_caught_by_slopes(bug: Bug, start: str, end: str) -> None:
    result = check(bug=bug)
    assert result.symbolic == ()
    assert result.verdict == "FAIL"
    assert result.culprits[0].startswith(start)
    assert result.culprits[0].endswith(end)


def poisoned(build: Build) -> None:
    with torch.no_grad():
        build.model.embedding.weight[:, 0] = math.nan


def one_width_poisoned(build: Build) -> None:
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
    target = TARGET.model_copy(update={"tied": width != 64})
    return make(width, seed, target=target)


def deeper(width: int, seed: int) -> Trainable:
    return make(width, seed, target=TARGET.model_copy(update={"n_layers": width // 32}))


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
        model: Any = trainable.model
        return replace(
            trainable, loss=lambda: model.loss(make_batch(0)[:, : next(lengths)]), tokens=None
        )

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
