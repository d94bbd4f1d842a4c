"""The table: `mup` as oracle for the groups, exact cover, and what must be refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mup
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mutransfer.apply import Geometry, initialize, parametrize, width_ratios
from mutransfer.errors import UserError
from mutransfer.groups import param_groups
from mutransfer.roles import Role
from mutransfer.rules import PARAMETRIZATIONS, BaseParams
from mutransfer.table import AdamWEntry, Multipliers, Table
from proxies.decoder import Decoder, DecoderConfig
from proxies.tables import decoder_table

BASE = BaseParams(lr=0.01, init_std=0.1, weight_decay=0.1)
TINY = DecoderConfig(
    d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=160, vocab_size=48
)


class MLP(nn.Module):
    """A plain model with `mup`'s own readout; the middle is 2.5 times as wide as the ends."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = nn.Linear(10, width)
        self.up = nn.Linear(width, width * 5 // 2)
        self.norm = nn.LayerNorm(width * 5 // 2)
        self.down = nn.Linear(width * 5 // 2, width, bias=False)
        self.readout = mup.MuReadout(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.readout(self.down(self.norm(self.up(self.enter(x)).relu())).relu())
        return out


def mlp_role(fqn: str, shape: tuple[int, ...]) -> Role:
    if len(shape) == 1:
        return "gain" if fqn == "norm.weight" else "bias"
    roles: dict[str, Role] = {"enter": "embedding", "readout": "head"}
    return roles.get(fqn.split(".")[0], "hidden")


class Plain(nn.Module):
    """A model of one's own: no multipliers, a `Sequential` of unequal layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(10, width, bias=False),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
        )
        self.head = nn.Linear(width, 3, bias=False)


def plain_role(fqn: str, shape: tuple[int, ...]) -> Role:
    if len(shape) == 1:
        return "bias"
    if fqn == "head.weight":
        return "head"
    return "embedding" if fqn == "net.0.weight" else "hidden"


def settings(
    model: nn.Module, groups: list[dict[str, Any]], keys: tuple[str, ...]
) -> dict[str, tuple[float, ...]]:
    """Settings by name; every parameter exactly once. Takes our pairs and torch's plain lists."""
    names = {id(p): fqn for fqn, p in model.named_parameters()}
    found: dict[str, tuple[float, ...]] = {}
    for group in groups:
        for entry in group["params"]:
            fqn = names[id(entry[1] if isinstance(entry, tuple) else entry)]
            assert fqn not in found
            found[fqn] = tuple(group[key] for key in keys)
    return found


@pytest.mark.parametrize("width", [4, 8, 16, 48])
def test_groups_of_a_plain_model_equal_mu_adamw(width: int) -> None:
    """Per parameter: lr and weight decay of `mup.MuAdamW`; width 4 is below the base of 8."""
    model, base = MLP(width), MLP(8)
    table = parametrize(model, base, BASE, "mup", role=mlp_role)
    # Not a deep copy: base shapes are attributes on the parameters and would be lost.
    mup.set_base_shapes(model, base, do_assert=False, rescale_params=False)
    oracle = mup.MuAdamW(model.parameters(), lr=BASE.lr, weight_decay=BASE.weight_decay)
    keys = ("lr", "weight_decay")
    expected = settings(model, oracle.param_groups, keys)
    ours = settings(model, param_groups(model, table, "adamw"), keys)
    assert expected.keys() == dict(model.named_parameters()).keys()
    assert ours.keys() == expected.keys()
    for fqn, values in expected.items():
        assert ours[fqn] == pytest.approx(values, rel=1e-14), fqn
    m = width / 8
    assert ours["down.weight"] == pytest.approx((0.01 / m, 0.1 * m), rel=1e-14)
    assert ours["readout.weight"] == (0.01, 0.1)
    assert table.multipliers.output == pytest.approx(1 / model.readout.width_mult(), rel=1e-14)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("width", [32, 64, 256])
def test_groups_of_the_decoder_equal_mu_adamw(width: int, tied: bool) -> None:
    config = TINY.model_copy(update={"tied": tied}).narrow(width)
    base_config = config.narrow(64)
    model, base = Decoder(config), Decoder(base_config)
    table = decoder_table(config, base_config, BASE, "mup")
    mup.set_base_shapes(model, base, do_assert=False, rescale_params=False)
    oracle = mup.MuAdamW(model.parameters(), lr=BASE.lr, weight_decay=BASE.weight_decay)
    keys = ("lr", "weight_decay")
    expected = settings(model, oracle.param_groups, keys)
    ours = settings(model, param_groups(model, table, "adamw"), keys)
    assert ours.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for fqn, values in expected.items():
        assert ours[fqn] == pytest.approx(values, rel=1e-14), fqn


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_muon_and_its_auxiliary_adamw_cover_every_parameter_once(name: str) -> None:
    model = Decoder(TINY)
    table = decoder_table(TINY, TINY.narrow(32), BASE, name)
    groups = param_groups(model, table, "muon"), param_groups(model, table, "adamw_aux")
    muon, aux = ({fqn for group in side for fqn, _ in group["params"]} for side in groups)
    assert sum(len(group["params"]) for side in groups for group in side) == len(muon | aux)
    assert muon | aux == dict(model.named_parameters()).keys()
    assert aux == {
        fqn for fqn, _ in model.named_parameters() if "norm" in fqn or "embedding" in fqn
    }
    assert not muon & aux


def test_groups_carry_the_table_s_settings() -> None:
    params = BASE.model_copy(update={"beta1": 0.8, "beta2": 0.9, "eps": 1e-6})
    model, table = Decoder(TINY), decoder_table(TINY, TINY.narrow(32), params)
    keys = ("lr", "peak_lr", "eps", "weight_decay", "betas")
    for fqn, got in settings(model, param_groups(model, table, "adamw"), keys).items():
        entry = table.row(fqn).optimizers.adamw
        assert got == (entry.lr, entry.lr, entry.eps, entry.weight_decay, (0.8, 0.9))


def test_an_unknown_kind_of_groups_is_refused() -> None:
    model, table = Decoder(TINY), decoder_table(TINY, TINY, BASE)
    with pytest.raises(UserError, match="got sgd; expected one of adamw, muon, adamw_aux"):
        param_groups(model, table, "sgd")  # type: ignore[arg-type]


def test_width_ratios_are_fan_in_ratios() -> None:
    ratios = width_ratios(MLP(32), MLP(8))
    assert ratios == dict.fromkeys(ratios, 4.0) | {"readout.bias": 1.0}


def test_models_of_unequal_depth_have_no_base_shapes() -> None:
    with pytest.raises(UserError, match=r"^layers\.1\..*equal depth"):
        width_ratios(Decoder(TINY), Decoder(TINY.narrow(32, n_layers=1)))


def test_the_base_width_scales_every_ratio() -> None:
    """A base model of width 8 with m = 1 at 16: half of every ratio."""
    table = parametrize(
        MLP(32), MLP(8), BASE, "mup", geometry=Geometry(base_width_mult=0.5), role=mlp_role
    )
    assert table.row("up.weight").width_ratio == 2.0
    assert table.row("up.weight").optimizers.adamw.lr == 0.005
    assert table.multipliers.output == 0.5


@pytest.mark.parametrize("geometry", [None, Geometry(), Geometry(base_width_mult=0.5),
                                      Geometry(base_width=8)])  # fmt: skip
def test_the_standard_init_reads_the_base_width(geometry: Geometry | None) -> None:
    """s * sqrt(d0 / fan-in), with d0 the base model's own width unless m = 1 lies elsewhere."""
    table = parametrize(MLP(32), MLP(8), BASE, "sp", geometry=geometry, role=mlp_role)
    d0 = 16 if geometry and geometry.base_width_mult == 0.5 else 8
    assert table.row("up.weight").init_std == pytest.approx(0.1 * math.sqrt(d0 / 32), rel=1e-14)
    assert table.row("down.weight").init_std == pytest.approx(0.1 * math.sqrt(d0 / 80), rel=1e-14)
    assert table.row("enter.weight").init_std == 0.1


def test_depth_reaches_blocks_only() -> None:
    geometry = Geometry(n_layers=8, base_n_layers=2)
    table = parametrize(MLP(8), MLP(8), BASE, geometry=geometry, role=mlp_role)
    assert table.row("up.weight").depth_ratio == 4.0
    assert table.row("norm.weight").depth_ratio == 4.0
    assert table.row("enter.weight").depth_ratio == 1.0
    assert table.multipliers.residual == pytest.approx(1 / math.sqrt(2) / 4, rel=1e-14)


def test_forward_multipliers_stand_beside_their_layers() -> None:
    params = BASE.model_copy(update={"embedding_multiplier": 12.0, "output_multiplier": 3.0})
    untied = TINY.model_copy(update={"tied": False})
    table = decoder_table(untied, untied.narrow(32), params)
    by_role = {row.role: row.forward_multiplier for row in table.rows}
    assert by_role == {
        "embedding": 12.0,
        "head": 1.5,
        "hidden": 1.0,
        "hidden_out": table.multipliers.residual,
        "gain": 1.0,
        "final_gain": 1.0,
    }


def test_a_record_of_rules_of_one_s_own() -> None:
    mine = replace(PARAMETRIZATIONS["mup"], name="mine", version=7, hidden_lr=0.5)
    table = parametrize(MLP(32), MLP(8), BASE, mine, role=mlp_role)
    assert (table.parametrization, table.version) == ("mine", 7)
    assert table.row("up.weight").optimizers.adamw.lr == pytest.approx(0.005, rel=1e-14)


def test_one_row_per_pattern_of_the_decoder() -> None:
    table = decoder_table(TINY, TINY, BASE)
    assert [row.pattern for row in table.rows] == [
        "embedding.weight",
        "layers.*.attention_norm.weight",
        "layers.*.attention.q.weight",
        "layers.*.attention.k.weight",
        "layers.*.attention.v.weight",
        "layers.*.attention.o.weight",
        "layers.*.mlp_norm.weight",
        "layers.*.mlp.gate.weight",
        "layers.*.mlp.up.weight",
        "layers.*.mlp.down.weight",
        "norm.weight",
    ]


def test_layers_that_differ_get_a_row_each() -> None:
    """`Sequential` numbers layers that have nothing in common."""
    model = Plain(16)
    table = parametrize(model, Plain(8), BASE, "mup", role=plain_role)
    assert [row.pattern for row in table.rows] == [
        "net.0.weight", "net.2.weight", "net.4.weight", "net.*.bias", "head.weight"
    ]  # fmt: skip
    assert table.resolve(model)["net.0.weight"].role == "embedding"
    assert table.resolve(model)["net.4.weight"].role == "hidden"


def refuse(model: nn.Module, base: nn.Module, role: Callable[..., Role], match: str) -> None:
    with pytest.raises(UserError, match=match):
        parametrize(model, base, BASE, "mup", role=role)


def test_a_hidden_role_for_a_layer_of_fixed_input_is_refused() -> None:
    def role(fqn: str, shape: tuple[int, ...]) -> Role:
        return "hidden" if fqn == "enter.weight" else mlp_role(fqn, shape)

    refuse(MLP(16), MLP(8), role, r"^enter\.weight: .*must grow in fan-in.*role embedding")


def test_a_matrix_role_for_a_vector_is_refused() -> None:
    def role(fqn: str, shape: tuple[int, ...]) -> Role:
        return "hidden_out" if fqn == "norm.weight" else mlp_role(fqn, shape)

    refuse(MLP(16), MLP(8), role, r"^norm\.weight: a matrix role needs two dimensions")


def test_a_model_without_ends_is_refused() -> None:
    refuse(
        nn.Linear(4, 4), nn.Linear(2, 2), lambda fqn, shape: "bias", "no parameter with the role"
    )


def test_resolve_refuses_what_does_not_belong_together() -> None:
    table = decoder_table(TINY, TINY, BASE)
    with pytest.raises(UserError, match=r"^embedding\.weight: shape differs.*\(48, 32\)"):
        table.resolve(Decoder(TINY.narrow(32)))
    with pytest.raises(UserError, match=r"^head\.weight: parameter is matched by no pattern"):
        table.resolve(Decoder(TINY.model_copy(update={"tied": False})))
    untied = decoder_table(*[TINY.model_copy(update={"tied": False})] * 2, BASE)
    with pytest.raises(UserError, match=r"name no parameter of the model; got \['head\.weight'\]"):
        untied.resolve(Decoder(TINY))
    doubled = table.model_copy(update={"rows": (*table.rows, table.rows[1])})
    with pytest.raises(UserError, match=r"^layers\.0\.attention_norm\.weight: .* several patterns"):
        doubled.resolve(Decoder(TINY))


def test_the_table_survives_json_exactly() -> None:
    params = BASE.model_copy(update={"lr": 0.1 + 0.2, "init_std": 1 / 3})
    table = decoder_table(TINY, TINY.narrow(32), params)
    assert Table.model_validate_json(table.model_dump_json()) == table


@pytest.mark.parametrize("field", ["lr", "eps", "weight_decay"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1e-9])
def test_numbers_that_are_none_do_not_enter_a_table(field: str, value: float) -> None:
    good = AdamWEntry(lr=0.1, eps=1e-8, weight_decay=0, betas=(0.9, 0.95), lr_times_weight_decay=0)
    with pytest.raises(ValidationError, match=field):
        AdamWEntry(**{**good.model_dump(), field: value})


def test_initial_values_have_the_table_s_moments() -> None:
    """Sample std within 5 standard errors, 1/sqrt(2n), of the table's; mean within 5 of zero."""
    config = DecoderConfig(
        d_model=256, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=64, d_ff=640, vocab_size=512
    )
    model = Decoder(config)
    table = decoder_table(config, config.narrow(128), BASE)
    initialize(model, table, seed=3)
    for fqn, parameter in model.named_parameters():
        row, n = table.row(fqn), parameter.numel()
        if row.role in ("gain", "final_gain"):
            assert torch.equal(parameter, torch.ones_like(parameter))
            continue
        expected = 0.1 if row.role == "embedding" else 0.1 / math.sqrt(2)
        assert row.init_std == pytest.approx(expected, rel=1e-14)
        assert parameter.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * n)), fqn
        assert abs(parameter.mean().item()) < 5 * expected / math.sqrt(n), fqn


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    """Not on the order of parameters, on torch's own generator, or on the rest of the model."""

    class Reversed(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            whole = Plain(width)
            self.head, self.net = whole.head, whole.net

    table = parametrize(Plain(16), Plain(8), BASE, "mup", role=plain_role)
    table = table.model_copy(update={"multipliers": Multipliers()})
    models = [Plain(16), Reversed(16), Plain(16)]
    orders = [[fqn for fqn, _ in model.named_parameters()] for model in models]
    assert orders[0] != orders[1]
    torch.manual_seed(1)
    initialize(models[0], table, seed=5)
    after = torch.random.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), after)
    torch.manual_seed(2)
    initialize(models[1], table, seed=5)
    initialize(models[2], table, seed=6)
    first, same, other = (dict(model.named_parameters()) for model in models)
    for fqn, parameter in first.items():
        assert torch.equal(parameter, same[fqn])
        if parameter.ndim == 2:
            assert not torch.equal(parameter, other[fqn])
        else:
            assert not parameter.any()
    assert not torch.equal(first["net.2.weight"], first["net.4.weight"])


def test_multipliers_that_would_be_lost_are_refused_before_anything_changes() -> None:
    model = Plain(16)
    table = parametrize(model, Plain(8), BASE, "mup", role=plain_role)
    before = {fqn: p.clone() for fqn, p in model.named_parameters()}
    with pytest.raises(UserError, match=r"^Plain: .*would be lost.*output=0\.5"):
        initialize(model, table, seed=0)
    for fqn, parameter in model.named_parameters():
        assert torch.equal(parameter, before[fqn])


def test_initialize_hands_over_the_multipliers() -> None:
    model = Decoder(TINY)
    table = decoder_table(
        TINY, TINY.narrow(32), BASE.model_copy(update={"embedding_multiplier": 12.0})
    )
    initialize(model, table, seed=0)
    for name, value in table.multipliers:
        assert getattr(model, f"{name}_multiplier").item() == pytest.approx(value, rel=1e-7)
    assert table.multipliers.embedding == 12.0
