"""The symbolic check: every way in which a build can differ from its table, broken by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Muon

from mutransfer.apply import initialize, parametrize
from mutransfer.errors import UserError
from mutransfer.groups import param_groups
from mutransfer.optimizers import Matrix, Optimizers
from mutransfer.rules import PARAMETRIZATIONS, BaseParams
from mutransfer.schedule import WSD
from mutransfer.symbolic import (
    Finding,
    check_groups,
    check_schedule,
    is_muon,
    muon_factor,
    optimizer_kind,
)
from mutransfer.table import Table
from proxies.decoder import Decoder, DecoderConfig
from proxies.tables import decoder_table

PARAMS = BaseParams(
    lr=0.01, init_std=0.1, weight_decay=0.1, eps=1e-6, embedding_lr_ratio=2.0, muon_factor=0.5,
    embedding_multiplier=3.0, output_multiplier=2.0, residual_multiplier=1.5,
)  # fmt: skip
CONFIG = DecoderConfig(
    d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=160, vocab_size=48
)
HIDDEN = ["layers.*.attention.q.weight", "layers.*.attention.k.weight",
          "layers.*.attention.v.weight", "layers.*.attention.o.weight",
          "layers.*.mlp.gate.weight", "layers.*.mlp.up.weight",
          "layers.*.mlp.down.weight"]  # fmt: skip
GAINS = ["layers.*.attention_norm.weight", "layers.*.mlp_norm.weight"]

Group = dict[str, Any]


class Built:
    """A correct build at twice the base width, for a test to break."""

    def __init__(self, matrix: Matrix = "adamw", name: str = "completep-tied") -> None:
        self.table: Table = decoder_table(CONFIG, CONFIG.narrow(32), PARAMS, name)
        self.model = Decoder(CONFIG)
        initialize(self.model, self.table, seed=0)
        self.optimizers = Optimizers(self.model, self.table, matrix)

    @property
    def groups(self) -> list[Group]:
        return self.optimizers.groups

    @property
    def findings(self) -> list[Finding]:
        return check_groups(self.groups, self.table, self.model)

    def of(self, fqn: str) -> Group:
        """The group that holds a parameter."""
        parameter = self.model.get_parameter(fqn)
        (group,) = (g for g in self.groups if any(p is parameter for p in g["params"]))
        return group


def fields(findings: list[Finding]) -> dict[str, set[str]]:
    """Names by field."""
    found: dict[str, set[str]] = {}
    for finding in findings:
        found.setdefault(finding.field, set()).add(finding.name)
    return found


@pytest.mark.parametrize("matrix", ["adamw", "muon"])
@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_a_correct_build_has_no_finding(name: str, matrix: Matrix) -> None:
    built = Built(matrix, name)
    assert built.findings == []
    assert check_schedule(built.groups) == []


def test_a_correct_build_over_plain_torch_has_no_finding() -> None:
    built = Built()
    optimizer = AdamW(param_groups(built.model, built.table, "adamw"))
    assert check_groups(optimizer.param_groups, built.table, built.model) == []


def test_a_parameter_in_no_group() -> None:
    built = Built()
    group = built.of("layers.1.mlp.up.weight")
    lost = built.model.layers[1].mlp.up.weight
    group["params"] = [p for p in group["params"] if p is not lost]
    (finding,) = built.findings
    assert (finding.name, finding.field) == ("layers.*.mlp.up.weight", "groups")
    assert (finding.got, finding.expected) == (0, 1)
    assert finding.sentence == "layers.1.mlp.up.weight is in no optimizer group"
    assert finding.width is None


def test_a_parameter_in_two_groups() -> None:
    built = Built()
    twice = built.model.norm.weight
    extra = built.groups[0] | {"params": [twice]}
    extra |= {key: built.of("norm.weight")[key] for key in ("lr", "peak_lr", "eps")}
    found = check_groups([*built.groups, extra], built.table, built.model)
    assert [finding.sentence for finding in found] == ["norm.weight is in 2 optimizer groups"]
    assert (found[0].got, found[0].expected) == (2, 1)


def test_a_frozen_parameter() -> None:
    built = Built()
    for block in built.model.layers:
        block.attention.k.weight.requires_grad_(False)
    (finding,) = built.findings  # two layers, one pattern
    assert (finding.name, finding.field) == ("layers.*.attention.k.weight", "requires_grad")
    sentence = "layers.0.attention.k.weight is frozen (requires_grad is False)"
    assert finding.sentence == sentence


def test_tensors_that_the_model_does_not_own() -> None:
    """As after a deep copy of the model: the optimizer updates another one."""
    built = Built()
    optimizer = AdamW(param_groups(Built().model, built.table, "adamw"))
    found = check_groups(optimizer.param_groups, built.table, built.model)
    assert fields(found)["groups"] == {row.pattern for row in built.table.rows} | {"optimizer"}
    stranger = next(finding for finding in found if finding.name == "optimizer")
    assert (stranger.got, stranger.expected) == (20, 0)
    assert "20 tensors that the model does not own" in stranger.sentence


@pytest.mark.parametrize(
    ("key", "value", "field", "got", "expected"),
    [
        ("lr", 0.01, "learning rate", 0.01, 0.005),
        ("peak_lr", 0.01, "peak learning rate", 0.01, 0.005),
        ("eps", 1e-6, "eps", 1e-6, 5e-7),
        ("weight_decay", 0.1, "weight decay", 0.1, 0.2),
        ("betas", (0.8, 0.95), "beta1", 0.8, 0.9),
        ("betas", (0.9, 0.999), "beta2", 0.999, 0.95),
    ],
)
def test_a_wrong_setting_of_adamw(
    key: str, value: Any, field: str, got: float, expected: float
) -> None:
    """The value at the base width, not carried over to twice that width."""
    built = Built()
    built.of("layers.0.mlp.down.weight")[key] = value
    found = built.findings
    assert fields(found) == {field: set(HIDDEN)}
    for finding in found:
        assert finding.got == pytest.approx(got, rel=1e-12)
        assert finding.expected == pytest.approx(expected, rel=1e-12)
        assert finding.sentence == (
            f"{field} of {finding.name} is {got:.4g}; the table says {expected:.4g}"
        )


@pytest.mark.parametrize(
    ("fqn", "names", "right"),
    [
        ("embedding.weight", {"embedding.weight"}, 0.02),
        ("layers.0.mlp_norm.weight", set(GAINS), 0.01),
        ("norm.weight", {"norm.weight"}, 0.01),
    ],
)
def test_the_other_groups_are_checked_too(fqn: str, names: set[str], right: float) -> None:
    built = Built()
    built.of(fqn)["lr"] *= 0.5
    found = built.findings
    assert set().union(*fields(found).values()) >= names
    assert fields(found).keys() == {"learning rate"}
    assert {finding.expected for finding in found} == {right}


@pytest.mark.parametrize("key", ["lr", "eps", "weight_decay"])
def test_a_setting_that_is_missing(key: str) -> None:
    built = Built()
    del built.of("embedding.weight")[key]
    found = built.findings
    assert {finding.name for finding in found} == {"embedding.weight"}
    assert all(finding.got is None for finding in found)
    assert all("is missing; the table says" in finding.sentence for finding in found)


def test_without_a_peak_the_learning_rate_is_the_peak() -> None:
    built = Built()
    for group in built.groups:
        del group["peak_lr"]
    assert built.findings == []
    assert check_schedule(built.groups) == []
    built.of("embedding.weight")["lr"] = 0.01
    assert fields(built.findings).keys() == {"learning rate", "peak learning rate"}


def test_six_digits_are_enough_and_five_are_not() -> None:
    built = Built()
    group = built.of("embedding.weight")
    group["eps"] *= 1 + 0.9e-6
    assert built.findings == []
    group["eps"] *= 1 + 0.3e-6
    assert fields(built.findings) == {"eps": {"embedding.weight"}}


@pytest.mark.parametrize("multiplier", ["embedding", "output", "residual", "attention"])
def test_a_wrong_multiplier(multiplier: str) -> None:
    built = Built()
    buffer = built.model.get_buffer(f"{multiplier}_multiplier")
    expected = float(buffer)
    buffer.mul_(2)
    (finding,) = built.findings
    assert (finding.name, finding.field) == (f"{multiplier}_multiplier", "multiplier")
    assert finding.got == pytest.approx(2 * expected)
    assert finding.expected == pytest.approx(expected)
    assert finding.sentence.startswith(f"the {multiplier} multiplier is ")


@pytest.mark.parametrize("factor", [0.0, 0.5, 1 / math.sqrt(2), 0.9, 1.1, 2.0, math.nan])
@pytest.mark.parametrize("fqn", ["embedding.weight", "layers.{}.mlp.down.weight"])
def test_a_wrong_init_std(fqn: str, factor: float) -> None:
    """10% is beyond 2% and three standard errors of 3072 numbers or more, 3.8%, and one more."""
    built = Built()
    with torch.no_grad():
        for layer in (0, 1):
            parameter = built.model.get_parameter(fqn.format(layer))
            if "{" in fqn or not layer:
                parameter.mul_(factor)
    (finding,) = built.findings
    assert (finding.name, finding.field) == (fqn.replace("{}", "*"), "init_std")
    row = built.table.row(fqn.format(0))
    assert finding.expected == row.init_std
    assert finding.got == pytest.approx(factor * row.init_std, rel=0.05, nan_ok=True)
    assert finding.sentence.startswith(f"init std of {finding.name} is ")


@pytest.mark.parametrize(("off", "count"), [(0.0582, 0), (0.0583, 1)])
@pytest.mark.parametrize("sign", [1, -1])
def test_init_std_to_three_standard_errors_and_two_percent(
    off: float, count: int, sign: int
) -> None:
    """3072 numbers: 3/sqrt(2 * 3072) + 0.02 = 0.05827."""
    built = Built()
    nn.init.constant_(built.model.embedding.weight, 0.1 * (1 + sign * off))
    assert len(built.findings) == count


def test_a_nonzero_mean_counts_as_a_wrong_init() -> None:
    built = Built()
    with torch.no_grad():
        built.model.embedding.weight.add_(0.1)
    assert fields(built.findings) == {"init_std": {"embedding.weight"}}


@pytest.mark.parametrize("seed", range(8))
def test_the_sampling_error_of_small_matrices_is_allowed(seed: int) -> None:
    config = CONFIG.model_copy(update={"vocab_size": 2}).narrow(32, n_layers=1)
    table = decoder_table(config, config, PARAMS)
    model = Decoder(config)
    initialize(model, table, seed=seed)
    assert check_groups(Optimizers(model, table).groups, table, model) == []


@pytest.mark.parametrize("fqn", ["layers.1.mlp_norm.weight", "norm.weight"])
def test_a_gain_that_is_not_one(fqn: str) -> None:
    built = Built()
    with torch.no_grad():
        built.model.get_parameter(fqn)[:32] = 1.5
    (finding,) = built.findings
    assert (finding.name, finding.field) == (fqn.replace(".1.", ".*."), "init")
    assert (finding.got, finding.expected) == (1.25, 1.0)
    assert finding.sentence.endswith("starts at 1.25 on average; it should start at 1")


def test_a_bias_that_is_not_zero() -> None:
    class Biased(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.head = nn.Linear(width, 3)

    model = Biased(8)
    table = parametrize(
        model,
        Biased(8),
        BaseParams(init_std=0.3),
        "mup",
        role=lambda fqn, shape: "head" if fqn == "head.weight" else "bias",
    )
    initialize(model, table, seed=0)
    groups = AdamW(param_groups(model, table, "adamw")).param_groups
    nn.init.constant_(model.head.weight, 0.3)
    assert check_groups(groups, table, model) == []
    nn.init.constant_(model.head.bias, -0.25)
    (finding,) = check_groups(groups, table, model)
    assert (finding.name, finding.field) == ("head.bias", "init")
    assert (finding.got, finding.expected) == (-0.25, 0.0)


STEP, PEAK, DECAY = (
    "learning rate times update scale",
    "peak learning rate times update scale",
    "learning rate times weight decay",
)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("lr", lambda lr: 2 * lr, {STEP, DECAY}),
        ("peak_lr", lambda lr: 2 * lr, {PEAK}),
        ("weight_decay", lambda decay: decay / 2, {DECAY}),
        ("momentum", lambda momentum: 0.9, {"momentum"}),
        ("adjust_lr_fn", lambda mode: "original", {STEP, PEAK}),
    ],
)
def test_a_wrong_setting_of_muon(key: str, value: Callable[[Any], Any], expected: set[str]) -> None:
    built = Built("muon")
    (group,) = built.optimizers.matrix.param_groups
    group[key] = value(group[key])
    found = built.findings
    assert fields(found) == {field: set(HIDDEN) for field in expected}


def test_muon_in_torch_s_original_mode_is_held_against_the_same_step() -> None:
    """`mup` asks for sqrt(out/in), which torch has not; the lr makes up for it."""
    built = Built("muon", "mup")
    groups = built.optimizers.matrix.param_groups
    assert {group["adjust_lr_fn"] for group in groups} == {"original"}
    assert len(groups) > 1
    wide = built.of("layers.0.mlp.down.weight")
    entry = built.table.row("layers.0.mlp.down.weight").optimizers.muon
    assert entry is not None
    wide["lr"] = wide["peak_lr"] = entry.lr  # as if torch's factor were ours
    found = {(finding.name, finding.field): finding for finding in built.findings}
    names = {name for name, _ in found}
    assert "layers.*.mlp.down.weight" in names
    assert names < set(HIDDEN)
    finding = found["layers.*.mlp.down.weight", STEP]
    assert finding.got == pytest.approx(entry.lr)  # (64, 160): torch's factor is 1
    assert finding.expected == pytest.approx(entry.lr * math.sqrt(64 / 160))
    assert ("layers.*.mlp.down.weight", DECAY) in found


@pytest.mark.parametrize("name", ["completep-tied", "mup"])
def test_muon_with_a_scale_of_its_own(name: str) -> None:
    """An optimizer that is not torch's: one group per shape, each with its factor."""
    built = Built("muon", name)
    groups = list(built.optimizers.aux.param_groups)
    for fqn, parameter in built.model.named_parameters():
        if (entry := built.table.row(fqn).optimizers.muon) is not None:
            groups.append(
                {"params": [parameter], "lr": entry.lr, "scale": entry.scale,
                 "weight_decay": entry.weight_decay, "momentum": entry.momentum}
            )  # fmt: skip
    assert optimizer_kind(groups) == "muon"
    assert check_groups(groups, built.table, built.model) == []
    groups[-1]["scale"] *= 2
    found = check_groups(groups, built.table, built.model)
    assert fields(found) == {field: {"layers.*.mlp.down.weight"} for field in (STEP, PEAK)}
    del groups[-2]["lr"]
    found = check_groups(groups, built.table, built.model)
    assert fields(found)[DECAY] == {"layers.*.mlp.up.weight"}


@pytest.mark.parametrize("shape", [(64, 160), (160, 64), (64, 64)])
@pytest.mark.parametrize("mode", ["original", "match_rms_adamw", None])
def test_the_factor_is_what_torch_s_muon_does(shape: tuple[int, int], mode: str | None) -> None:
    """One step from zero: the RMS of the weight over that of the orthogonal matrix."""
    parameter = nn.Parameter(torch.zeros(shape))
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    steps = []
    for adjust in (mode, "match_rms_adamw"):
        parameter = nn.Parameter(torch.zeros(shape))
        optimizer = Muon([parameter], lr=1.0, weight_decay=0, adjust_lr_fn=adjust)
        parameter.grad = gradient.clone()
        optimizer.step()
        steps.append(float(parameter.detach().norm()))
        group = optimizer.param_groups[0]
        assert is_muon(group)
    ours = muon_factor({"adjust_lr_fn": mode}, shape) / (0.2 * math.sqrt(max(shape)))
    assert steps[0] / steps[1] == pytest.approx(ours, rel=1e-5)
    assert muon_factor({"adjust_lr_fn": mode, "scale": 7.0}, shape) == 7.0
    assert muon_factor(group, shape) == pytest.approx(0.2 * math.sqrt(max(shape)))


def test_a_matrix_left_to_adamw_beside_muon() -> None:
    built = Built("muon")
    (muon,) = built.optimizers.matrix.param_groups
    moved = built.model.layers[0].attention.q.weight
    muon["params"] = [p for p in muon["params"] if p is not moved]
    built.optimizers.aux.param_groups[0]["params"].append(moved)
    (finding,) = built.findings
    assert (finding.name, finding.field) == ("layers.*.attention.q.weight", "optimizer")
    assert finding.got is finding.expected is None
    assert finding.sentence.endswith("is optimized by AdamW; the table gives it to Muon")


def test_an_embedding_given_to_muon() -> None:
    built = Built("muon")
    (muon,) = built.optimizers.matrix.param_groups
    group = built.of("embedding.weight")
    group["params"] = [p for p in group["params"] if p is not built.model.embedding.weight]
    muon["params"].append(built.model.embedding.weight)
    (finding,) = built.findings
    assert finding.sentence == "embedding.weight is optimized by Muon; the table gives it to AdamW"


def test_everything_wrong_is_told_once_per_pattern_and_field() -> None:
    built = Built()
    for group in built.groups:
        group["lr"] = 0.03
    found = built.findings
    assert fields(found) == {"learning rate": {row.pattern for row in built.table.rows}}
    assert len(found) == len(built.table.rows)


def test_a_table_of_another_model_is_refused() -> None:
    built = Built()
    other = decoder_table(CONFIG.narrow(32), CONFIG.narrow(32), PARAMS)
    with pytest.raises(UserError, match=r"^embedding\.weight: shape differs"):
        check_groups(built.groups, other, built.model)


@pytest.mark.parametrize("matrix", ["adamw", "muon"])
def test_a_schedule_that_multiplies_keeps_every_ratio(matrix: Matrix) -> None:
    built = Built(matrix)
    for step in range(20):
        built.optimizers.set_lr(WSD().factor(step, 20))
        assert check_schedule(built.groups) == []


@pytest.mark.parametrize("matrix", ["adamw", "muon"])
def test_a_schedule_that_assigns_is_found(matrix: Matrix) -> None:
    built = Built(matrix)
    for group in built.groups:
        group["lr"] = 0.005
    (finding,) = check_schedule(built.groups)
    assert (finding.name, finding.field) == ("schedule", "lr / peak_lr")
    factors = [0.005 / group["peak_lr"] for group in built.groups]
    assert finding.got == pytest.approx(max(factors))
    assert finding.expected == pytest.approx(min(factors)) == 0.25
    assert "a schedule assigns learning rates" in finding.sentence


def test_one_group_that_is_left_behind_is_found() -> None:
    built = Built()
    built.optimizers.set_lr(0.5)
    built.of("embedding.weight")["lr"] *= 1.001
    assert [finding.name for finding in check_schedule(built.groups)] == ["schedule"]


def test_kinds_of_groups() -> None:
    assert optimizer_kind(Built("adamw").groups) == "adamw"
    assert optimizer_kind(Built("muon").groups) == "muon"
    assert optimizer_kind([]) == "adamw"
    assert not is_muon({"params": [], "lr": 1.0})
    assert is_muon({"scale": 0.2})
