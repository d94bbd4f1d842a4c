"""Every rule of every parametrization against numbers written out from the papers' tables.

The model: width 1536 on base width 256 (m = 6), 48 layers on 12 (r = 4), heads of 64 on 16.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from pydantic import ValidationError

from mutransfer import rules
from mutransfer.errors import UserError
from mutransfer.roles import Role, decoder_role, matches, pattern_of
from mutransfer.rules import (
    DEFAULT,
    PARAMETRIZATIONS,
    BaseParams,
    Parametrization,
    Ratios,
    get_parametrization,
)

BASE = BaseParams(
    lr=0.01,
    embedding_lr_ratio=2.0,
    init_std=0.1,
    embedding_multiplier=12.0,
    output_multiplier=3.0,
    residual_multiplier=1.4,
    attention_multiplier=2.0,
    weight_decay=0.1,
    eps=1e-8,
    muon_factor=0.5,
)
X = Ratios(width=6.0, depth=4.0, n_layers=48, base_width=256.0)
INDEPENDENT = ["completep-tied", "completep", "mup", "xmodel-fixed", "sp"]

# role: (AdamW lr, AdamW eps, AdamW weight decay); final_gain where it differs from gain.
ADAMW: dict[str, dict[Role, tuple[float, float, float]]] = {
    "completep-tied": {
        "embedding": (0.02, 1.666666667e-9, 0.0),
        "head": (0.02, 1.666666667e-9, 0.0),
        "hidden": (0.001666666667, 4.166666667e-10, 0.6),
        "hidden_out": (0.001666666667, 4.166666667e-10, 0.6),
        "gain": (0.01, 4.166666667e-10, 0.0),
        "bias": (0.01, 4.166666667e-10, 0.0),
        "final_gain": (0.01, 1.666666667e-9, 0.0),
    },
    "completep": {
        "embedding": (0.02, 4.166666667e-10, 0.1),
        "head": (0.02, 4.166666667e-10, 0.1),
        "hidden": (0.001666666667, 4.166666667e-10, 0.6),
        "hidden_out": (0.001666666667, 4.166666667e-10, 0.6),
        "gain": (0.01, 4.166666667e-10, 0.0),
        "bias": (0.01, 4.166666667e-10, 0.0),
        "final_gain": (0.01, 4.166666667e-10, 0.0),
    },
    "mup": {
        "embedding": (0.02, 1e-8, 0.1),
        "head": (0.02, 1e-8, 0.1),
        "hidden": (0.001666666667, 1e-8, 0.6),
        "hidden_out": (0.001666666667, 1e-8, 0.6),
        "gain": (0.01, 1e-8, 0.1),
        "bias": (0.01, 1e-8, 0.1),
        "final_gain": (0.01, 1e-8, 0.1),
    },
    "megatron": {
        "embedding": (0.02, 1e-8, 0.1),
        "head": (0.02, 1e-8, 0.1),
        "hidden": (0.001666666667, 1.666666667e-9, 0.1),
        "hidden_out": (0.001666666667, 1.666666667e-9, 0.1),
        "gain": (0.01, 1e-8, 0.0),
        "bias": (0.01, 1e-8, 0.0),
        "final_gain": (0.01, 1e-8, 0.0),
    },
    "minicpm": {
        "embedding": (0.02, 1e-8, 0.1),
        "head": (0.02, 1e-8, 0.1),
        "hidden": (0.001666666667, 1e-8, 0.1),
        "hidden_out": (0.001666666667, 1e-8, 0.1),
        "gain": (0.01, 1e-8, 0.0),
        "bias": (0.01, 1e-8, 0.0),
        "final_gain": (0.01, 1e-8, 0.0),
    },
    "xmodel": {
        "embedding": (0.02, 1e-8, 0.1),
        "head": (0.02, 1e-8, 0.1),
        "hidden": (0.001666666667, 1e-8, 0.1),
        "hidden_out": (0.001666666667, 1e-8, 0.1),
        "gain": (0.001666666667, 1e-8, 0.0),
        "bias": (0.001666666667, 1e-8, 0.0),
        "final_gain": (0.001666666667, 1e-8, 0.0),
    },
    "xmodel-fixed": {
        "embedding": (0.02, 1.666666667e-9, 0.0),
        "head": (0.02, 1.666666667e-9, 0.0),
        "hidden": (0.001666666667, 1.666666667e-9, 0.6),
        "hidden_out": (0.001666666667, 1.666666667e-9, 0.6),
        "gain": (0.01, 1.666666667e-9, 0.0),
        "bias": (0.01, 1.666666667e-9, 0.0),
        "final_gain": (0.01, 1.666666667e-9, 0.0),
    },
    "sp": {
        "embedding": (0.02, 1e-8, 0.0),
        "head": (0.02, 1e-8, 0.0),
        "hidden": (0.01, 1e-8, 0.1),
        "hidden_out": (0.01, 1e-8, 0.1),
        "gain": (0.01, 1e-8, 0.0),
        "bias": (0.01, 1e-8, 0.0),
        "final_gain": (0.01, 1e-8, 0.0),
    },
}

NAMES = list(ADAMW)

# Init std of gate (fan-in 1536) and of down (fan-in 3840); every end has 0.1.
INIT: dict[str, tuple[float, float]] = {
    "completep-tied": (0.04082482905, 0.04082482905),
    "completep": (0.04082482905, 0.04082482905),
    "mup": (0.04082482905, 0.04082482905),
    "megatron": (0.04082482905, 0.004166666667),
    "minicpm": (0.04082482905, 0.04082482905),
    "xmodel": (0.04082482905, 0.01020620726),
    "xmodel-fixed": (0.04082482905, 0.04082482905),
    "sp": (0.04082482905, 0.02581988897),
}

# Muon: lr, weight decay, scale of k (512, 1536), scale of down (1536, 3840).
MUON: dict[str, tuple[float, float, float, float]] = {
    "completep-tied": (0.002041241452, 0.4898979486, 7.838367177, 12.39354671),
    "completep": (0.005, 0.2, 0.5773502692, 0.632455532),
    "mup": (0.005, 0.2, 0.5773502692, 0.632455532),
    "megatron": (0.005, 0.1, 0.5773502692, 0.632455532),
    "minicpm": (0.002041241452, 0.1, 7.838367177, 12.39354671),
    "xmodel": (0.0008333333333, 0.1, 7.838367177, 12.39354671),
    "xmodel-fixed": (0.002041241452, 0.4898979486, 7.838367177, 12.39354671),
    "sp": (0.005, 0.2, 7.838367177, 12.39354671),
}

# Residual, output and attention (whole softmax scale) multipliers.
FORWARD: dict[str, tuple[float, float, float]] = {
    "completep-tied": (0.1010362971, 0.5, 0.125),
    "completep": (0.35, 0.5, 0.03125),
    "mup": (1.4, 0.5, 0.125),
    "megatron": (1.4, 3.0, 0.125),
    "minicpm": (0.2020725942, 0.5, 0.25),
    "xmodel": (0.2020725942, 0.5, 0.03125),
    "xmodel-fixed": (0.2020725942, 0.5, 0.03125),
    "sp": (0.2020725942, 3.0, 0.25),
}


def close(expected: float | tuple[float, ...]) -> object:
    return pytest.approx(expected, rel=1e-9, abs=0)


def test_the_tables_here_cover_every_parametrization() -> None:
    assert set(PARAMETRIZATIONS) == set(NAMES) == set(INIT) == set(MUON) == set(FORWARD)
    assert DEFAULT == "completep-tied"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "role", ["embedding", "head", "hidden", "hidden_out", "gain", "bias", "final_gain"]
)
def test_adamw(name: str, role: Role) -> None:
    p = get_parametrization(name)
    got = (
        rules.adamw_lr(p, role, X, BASE),
        rules.adamw_eps(p, role, X, BASE),
        rules.adamw_decay(p, role, X, BASE),
    )
    assert got == close(ADAMW[name][role])


@pytest.mark.parametrize("name", NAMES)
def test_init(name: str) -> None:
    p = get_parametrization(name)
    assert rules.init_std(p, "hidden", X, BASE, 1536) == close(INIT[name][0])
    assert rules.init_std(p, "hidden_out", X, BASE, 3840) == close(INIT[name][1])
    for role in ("embedding", "head"):
        assert rules.init_std(p, role, X, BASE, 1536) == 0.1
    for role in ("gain", "final_gain", "bias"):
        assert rules.init_std(p, role, X, BASE) == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_muon(name: str) -> None:
    p = get_parametrization(name)
    got = (
        rules.muon_lr(p, X, BASE),
        rules.muon_decay(p, X, BASE),
        rules.muon_scale(p, 512, 1536),
        rules.muon_scale(p, 1536, 3840),
    )
    assert got == close(MUON[name])


@pytest.mark.parametrize("name", NAMES)
def test_forward_multipliers(name: str) -> None:
    p = get_parametrization(name)
    got = (
        rules.residual_multiplier(p, X, BASE),
        rules.output_multiplier(p, 6.0, BASE),
        rules.softmax_scale(p, 64, 16, BASE),
    )
    assert got == close(FORWARD[name])


def test_megatron_replaces_the_output_rule_only_when_it_is_set() -> None:
    untouched = BASE.model_copy(update={"output_multiplier": 1.0})
    assert rules.output_multiplier(PARAMETRIZATIONS["megatron"], 6.0, untouched) == 1 / 6


def test_fan_in_init_needs_the_fan_in() -> None:
    with pytest.raises(ValueError, match="fan-in"):
        rules.init_std(PARAMETRIZATIONS["sp"], "hidden", X, BASE)


@pytest.mark.parametrize("name", INDEPENDENT)
@pytest.mark.parametrize("m", [0.25, 0.75, 1.0, 3.0, 8.0])
def test_shrinkage_per_step_is_constant_in_width_and_across_the_hand_over(
    name: str, m: float
) -> None:
    p, x = get_parametrization(name), replace(X, width=m)
    adamw = rules.adamw_lr(p, "hidden", x, BASE) * rules.adamw_decay(p, "hidden", x, BASE)
    muon = rules.muon_lr(p, x, BASE) * rules.muon_decay(p, x, BASE)
    assert adamw == pytest.approx(0.001, rel=1e-14)
    assert muon == pytest.approx(0.001, rel=1e-14)


@pytest.mark.parametrize("name", ["megatron", "minicpm", "xmodel"])
def test_coupled_shrinkage_falls_with_width(name: str) -> None:
    p = get_parametrization(name)
    shrink = rules.adamw_lr(p, "hidden", X, BASE) * rules.adamw_decay(p, "hidden", X, BASE)
    assert shrink == pytest.approx(1.666666667e-4, rel=1e-9)


@pytest.mark.parametrize("m", [1, 2, 6])
@pytest.mark.parametrize("shape", [(64, 64), (32, 64), (160, 64), (64, 160)])
def test_rms_matched_muon_with_root_m_is_a_fixed_operator_norm(
    m: int, shape: tuple[int, int]
) -> None:
    """lr * scale has the RMS-operator norm of the base, sqrt(in0/out0) * its step, at any m."""
    p, (out, fan_in) = PARAMETRIZATIONS[DEFAULT], shape
    x = replace(X, width=float(m))
    step = rules.muon_lr(p, x, BASE) * rules.muon_scale(p, out * m, fan_in * m)
    base = 0.005 * 0.2 * math.sqrt(max(out, fan_in))
    assert step == pytest.approx(base, rel=1e-14)


def test_alpha_one_half() -> None:
    """alpha = 1/2: branches a/sqrt(L), block lr r^-1/2, eps r^-1/2; the last norm keeps its lr."""
    p = replace(PARAMETRIZATIONS[DEFAULT], alpha=0.5)
    assert rules.residual_multiplier(p, X, BASE) == close(0.2020725942)
    assert rules.adamw_lr(p, "hidden", X, BASE) == close(0.0008333333333)
    assert rules.adamw_lr(p, "gain", X, BASE) == close(0.005)
    assert rules.adamw_lr(p, "final_gain", X, BASE) == close(0.01)
    assert rules.adamw_lr(p, "embedding", X, BASE) == close(0.02)
    assert rules.adamw_eps(p, "hidden", X, BASE) == close(8.333333333e-10)


def test_unknown_parametrization() -> None:
    with pytest.raises(UserError, match=r"got mupp; expected one of completep-tied, .*, sp"):
        get_parametrization("mupp")


LIMITS = {
    "lr": (0.0, 10.0),
    "embedding_lr_ratio": (0.0, 1e4),
    "init_std": (0.0, 10.0),
    "embedding_multiplier": (0.0, 1e4),
    "output_multiplier": (0.0, 1e4),
    "residual_multiplier": (0.0, 1e4),
    "attention_multiplier": (0.0, 1e4),
    "eps": (0.0, 1.0),
    "muon_factor": (0.0, 1e3),
}


@pytest.mark.parametrize("field", LIMITS)
def test_positive_base_params_have_limits(field: str) -> None:
    low, high = LIMITS[field]
    for good in (math.nextafter(low, 1), high):
        assert getattr(BaseParams(**{field: good}), field) == good
    for bad in (low, -1e-9, math.nextafter(high, math.inf), math.nan, math.inf):
        with pytest.raises(ValidationError):
            BaseParams(**{field: bad})


@pytest.mark.parametrize(
    ("field", "high", "closed"),
    [("weight_decay", 100.0, True), ("beta1", 1.0, False), ("beta2", 1.0, False),
     ("muon_momentum", 1.0, False)],
)  # fmt: skip
def test_base_params_that_may_be_zero_have_limits(field: str, high: float, closed: bool) -> None:
    last = high if closed else math.nextafter(high, 0)
    for good in (0.0, last):
        assert getattr(BaseParams(**{field: good}), field) == good
    for bad in (-1e-12, math.nextafter(last, math.inf), math.nan, math.inf):
        with pytest.raises(ValidationError):
            BaseParams(**{field: bad})


def test_every_base_param_has_tested_limits() -> None:
    rest = {"weight_decay", "beta1", "beta2", "muon_momentum"}
    assert set(BaseParams.model_fields) == set(LIMITS) | rest


def test_base_params_are_closed_and_frozen() -> None:
    with pytest.raises(ValidationError, match="learning_rate"):
        BaseParams(learning_rate=0.1)  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="frozen"):
        BASE.lr = 0.5


@pytest.mark.parametrize(
    ("fqn", "role"),
    [
        ("embedding.weight", "embedding"),
        ("head.weight", "head"),
        ("layers.0.attention.q.weight", "hidden"),
        ("layers.47.attention.k.weight", "hidden"),
        ("layers.1.attention.v.weight", "hidden"),
        ("layers.1.attention.o.weight", "hidden_out"),
        ("layers.1.mlp.gate.weight", "hidden"),
        ("layers.1.mlp.up.weight", "hidden"),
        ("layers.1.mlp.down.weight", "hidden_out"),
        ("layers.1.attention_norm.weight", "gain"),
        ("layers.1.mlp_norm.weight", "gain"),
        ("norm.weight", "final_gain"),
    ],
)
def test_decoder_roles(fqn: str, role: Role) -> None:
    assert decoder_role(fqn, (2, 2)) == role


@pytest.mark.parametrize("fqn", ["layers.0.norm.weight", "norm.bias", "xnorm.weight", "head"])
def test_a_parameter_without_a_role_is_refused_by_name(fqn: str) -> None:
    with pytest.raises(UserError, match=rf"^{fqn}: no role .*shape \(3, 4\)"):
        decoder_role(fqn, (3, 4))


def test_patterns_name_every_layer_and_nothing_else() -> None:
    pattern = pattern_of("layers.12.mlp.up.weight")
    assert pattern == "layers.*.mlp.up.weight"
    assert matches(pattern, "layers.0.mlp.up.weight")
    assert not matches(pattern, "layers.x.mlp.up.weight")
    assert not matches(pattern, "layers.1.2.mlp.up.weight")
    assert not matches(pattern, "layers.1.mlpxup.weight")
    assert not matches(pattern, "a.layers.1.mlp.up.weight")
    assert pattern_of("experts.3.layers.4.w2") == "experts.*.layers.*.w2"
    assert pattern_of("conv1.weight") == "conv1.weight"


def test_rules_of_ones_own_are_registered_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "PARAMETRIZATIONS", dict(PARAMETRIZATIONS))
    mine = Parametrization(name="mine", hidden_lr=0.5)
    with pytest.raises(UserError, match="unknown parametrization"):
        rules.get_parametrization("mine")
    rules.register(mine)
    rules.register(mine)
    assert rules.get_parametrization("mine") is mine
    with pytest.raises(UserError, match="other rules have this name"):
        rules.register(Parametrization(name="completep-tied", hidden_lr=0.5))
