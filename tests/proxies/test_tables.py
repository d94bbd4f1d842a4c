"""The decoder's table: Xmodel-2.5's own numbers, m = 1, ratios, and bases that do not belong."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mutransfer.errors import UserError
from mutransfer.rules import PARAMETRIZATIONS, BaseParams
from mutransfer.table import Row
from proxies.decoder import DecoderConfig
from proxies.presets import get_preset
from proxies.tables import decoder_table

XMODEL, PROXY = get_preset("xmodel-2.5"), get_preset("proxy-20m")
BUNDLE = BaseParams(
    lr=0.01,
    init_std=0.1,
    embedding_multiplier=12.0,
    residual_multiplier=1.4,
    weight_decay=0.1,
)
"""Xmodel-2.5's base hyperparameters, at base width 256 (2511.19496)."""

TINY = DecoderConfig(
    d_model=64, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=160, vocab_size=48
)


def test_xmodel_s_derived_scales() -> None:
    """The scales that its training scripts arrive at for the 1.3B model."""
    table = decoder_table(XMODEL, PROXY, BUNDLE, "xmodel", base_width=256)
    block = "layers.47"
    for name in ("attention.q", "attention.k", "attention.v", "mlp.gate", "mlp.up"):
        row = table.row(f"{block}.{name}.weight")
        assert row.init_std == pytest.approx(0.040824829046386304, rel=1e-14)
    for name in ("attention.o", "mlp.down"):
        row = table.row(f"{block}.{name}.weight")
        assert row.init_std == pytest.approx(0.010206207261596576, rel=1e-14)
    assert table.row("embedding.weight").init_std == 0.1
    assert table.multipliers.embedding == 12.0
    assert table.multipliers.attention == 0.015625
    assert table.multipliers.residual == pytest.approx(0.20207259421636903, rel=1e-14)
    assert table.multipliers.output == pytest.approx(0.16666666666666666, rel=1e-14)
    for row in table.rows:
        lr = 0.01 if row.role == "embedding" else 0.0016666666666666668
        assert row.optimizers.adamw.lr == pytest.approx(lr, rel=1e-14)
        shrink = {"embedding": 1e-3, "hidden": 1e-3 / 6, "hidden_out": 1e-3 / 6}.get(row.role, 0.0)
        assert row.optimizers.adamw.lr_times_weight_decay == pytest.approx(shrink, rel=1e-14)


def test_xmodel_with_the_width_in_down_and_o() -> None:
    """What the residual projections would have had: 0.1 / sqrt(2 * 48 * 6)."""
    table = decoder_table(XMODEL, PROXY, BUNDLE, "megatron", base_width=256)
    row = table.row("layers.0.mlp.down.weight")
    assert row.init_std == pytest.approx(0.004166666666666667, rel=1e-14)


def test_the_default_for_xmodel_from_the_20m_proxy() -> None:
    """m = 8 on the proxy's own width, equal depth: the recommended table, written out."""
    table = decoder_table(XMODEL, PROXY, BUNDLE.model_copy(update={"muon_factor": 0.5}))
    down = table.row("layers.3.mlp.down.weight")
    assert (down.width_ratio, down.depth_ratio) == (8.0, 1.0)
    assert down.init_std == pytest.approx(0.1 / math.sqrt(8), rel=1e-14)
    assert down.optimizers.adamw.lr == 0.00125
    assert down.optimizers.adamw.eps == pytest.approx(1.25e-9, rel=1e-14)
    assert down.optimizers.adamw.weight_decay == pytest.approx(0.8, rel=1e-14)
    muon = down.optimizers.muon
    assert muon is not None
    assert muon.lr == pytest.approx(0.005 / math.sqrt(8), rel=1e-14)
    assert muon.scale == pytest.approx(0.2 * math.sqrt(3840), rel=1e-14)
    assert muon.weight_decay == pytest.approx(0.2 * math.sqrt(8), rel=1e-14)
    assert table.multipliers.model_dump() == pytest.approx(
        {"embedding": 12.0, "output": 0.125, "attention": 0.125, "residual": 1.4 / math.sqrt(48)},
        rel=1e-14,
    )


def test_every_ratio_of_a_proxy_below_its_base_width() -> None:
    """Base width 256 over a proxy of 192: m = 0.75 for the proxy itself, 6 for the target."""
    for config, m in ((PROXY, 0.75), (XMODEL, 6.0)):
        table = decoder_table(config, PROXY, BUNDLE, base_width=256)
        assert {row.width_ratio for row in table.rows} == {m}


def test_the_depth_ratio_is_that_of_the_base() -> None:
    wide = get_preset("proxy-20m-wide")
    table = decoder_table(XMODEL, wide, BUNDLE)
    ratios = {row.role: (row.width_ratio, row.depth_ratio) for row in table.rows}
    assert ratios == {
        "embedding": (4.0, 1.0),
        "hidden": (4.0, 4.0),
        "hidden_out": (4.0, 4.0),
        "gain": (4.0, 4.0),
        "final_gain": (4.0, 1.0),
    }
    assert table.multipliers.residual == pytest.approx(1.4 / math.sqrt(12) / 4, rel=1e-14)


def test_at_the_base_the_default_is_the_standard_parametrization() -> None:
    """At m = r = 1 only down differs: `sp` divides by its own fan-in, d_ff = 2.5 d."""
    base = BUNDLE.model_copy(update={"output_multiplier": 4.0, "muon_factor": 0.5})
    default, sp = (decoder_table(TINY, TINY, base, name) for name in ("completep-tied", "sp"))
    assert default.multipliers == sp.multipliers
    assert default.multipliers.residual == pytest.approx(1.4 / 2, rel=1e-14)

    def but_std(row: Row) -> dict[str, Any]:
        return row.model_dump(exclude={"init_std"})

    for ours, theirs in zip(default.rows, sp.rows, strict=True):
        assert but_std(ours) == but_std(theirs)
        shrunk = math.sqrt(64 / 160) if ours.pattern.endswith("down.weight") else 1.0
        assert theirs.init_std == pytest.approx(ours.init_std * shrunk, rel=1e-14)


@pytest.mark.parametrize("name", [n for n in PARAMETRIZATIONS if n not in ("sp", "mup")])
def test_at_the_base_every_parametrization_has_the_base_s_own_settings(name: str) -> None:
    table = decoder_table(TINY, TINY, BUNDLE, name)
    for row in table.rows:
        assert row.optimizers.adamw.lr == 0.01
        assert row.optimizers.adamw.eps == 1e-8
        if row.role == "hidden":
            assert row.init_std == 0.1
            assert row.optimizers.adamw.weight_decay == 0.1


@pytest.mark.parametrize("base_width", [0, -256])
def test_a_base_width_that_is_none_is_refused(base_width: int) -> None:
    with pytest.raises(UserError, match=f"base_width: .*got {base_width}; expected at least 1"):
        decoder_table(TINY, TINY, BUNDLE, base_width=base_width)


@pytest.mark.parametrize(
    ("changed", "where"),
    [
        ({"vocab_size": 64}, "vocab_size"),
        ({"head_dim": 32}, "head_dim"),
        ({"n_kv_heads": 4}, "n_kv_heads"),
        ({"n_heads": 8, "d_ff": 96}, "n_heads, d_ff"),
        ({"tied": False}, "tied"),
        ({"rope_base": 500000.0}, "rope_base"),
        ({"norm_eps": 1e-6}, "norm_eps"),
    ],
)
def test_a_base_that_is_another_model_is_refused_by_field(
    changed: dict[str, float], where: str
) -> None:
    base = TINY.model_copy(update=changed)
    with pytest.raises(UserError, match=f"^{where}: the base is not this model narrowed"):
        decoder_table(TINY, base, BUNDLE)


def test_positions_may_differ() -> None:
    longer = TINY.model_copy(update={"max_seq_len": 8192})
    assert decoder_table(longer, TINY.narrow(32), BUNDLE) == decoder_table(
        TINY, TINY.narrow(32), BUNDLE
    )
