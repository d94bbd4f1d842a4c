"""Megatron's names and layout: fused by hand here, there and back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from full_scale.megatron_files import export_megatron, import_megatron
from full_scale.tensors import Tensors, open_tensors
from full_scale.weights import Weights, read_weights
from mutransfer.errors import UserError
from mutransfer.table import Multipliers
from proxies.decoder import Decoder, DecoderConfig

CONFIG = DecoderConfig(d_model=24, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=4, d_ff=20,
                       vocab_size=31, tied=False)  # fmt: skip
MULTIPLIERS = Multipliers(embedding=12.0, output=0.37, residual=0.23, attention=0.091)
TOKENS = torch.arange(20).view(2, 10) * 7 % 31


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    draw = torch.Generator().manual_seed(0)
    values = {
        n: torch.randn(p.shape, generator=draw) for n, p in Decoder(CONFIG).named_parameters()
    }
    tensors = Tensors(shapes={n: tuple(t.shape) for n, t in values.items()},
                      read=values.__getitem__)  # fmt: skip
    return Weights(config=CONFIG, multipliers=MULTIPLIERS, tensors=tensors,
                   parametrization="megatron", bundle=None, tokenizer=None, state=None,
                   path=tmp_path)  # fmt: skip


def plain(weights: Weights) -> Weights:
    """The same with a residual multiplier that Megatron can have."""
    multipliers = MULTIPLIERS.model_copy(update={"residual": 1.0})
    return Weights(**{**vars(weights), "multipliers": multipliers})


def test_heads_are_fused_group_by_group(weights: Weights, tmp_path: Path) -> None:
    export_megatron(plain(weights), tmp_path / "out", keep_multipliers=True)
    fused = open_tensors(tmp_path / "out").read("decoder.layers.1.self_attention.linear_qkv.weight")
    q, k, v = (weights.tensors.read(f"layers.1.attention.{x}.weight") for x in "qkv")
    expected = torch.cat([q[:12], k[:4], v[:4], q[12:], k[4:], v[4:]])  # 3 heads a group, of 4 rows
    assert torch.equal(fused, expected)
    fc1 = open_tensors(tmp_path / "out").read("decoder.layers.1.mlp.linear_fc1.weight")
    assert torch.equal(fc1[:20], weights.tensors.read("layers.1.mlp.gate.weight"))
    assert torch.equal(fc1[20:], weights.tensors.read("layers.1.mlp.up.weight"))


@pytest.mark.parametrize("layers", ["transformer_engine", "local"])
def test_there_and_back_is_bit_exact(weights: Weights, layers: Any, tmp_path: Path) -> None:
    export_megatron(plain(weights), tmp_path / "out", layers=layers, keep_multipliers=True)
    start = import_megatron(tmp_path / "out", tmp_path / "start")
    assert (start.source, start.parametrization) == ("megatron", "megatron")
    again = read_weights(tmp_path / "start")
    assert again.multipliers == plain(weights).multipliers
    assert again.tensors.shapes.keys() == weights.tensors.shapes.keys()
    for name in weights.tensors.shapes:
        assert torch.equal(again.tensors.read(name), weights.tensors.read(name)), name


@torch.no_grad()
def test_folded_weights_compute_the_same(weights: Weights, tmp_path: Path) -> None:
    export_megatron(weights, tmp_path / "out", dtype="float64")
    import_megatron(tmp_path / "out", tmp_path / "start")
    logits = []
    for each in (weights, read_weights(tmp_path / "start")):
        model = Decoder(CONFIG).double()
        model.load_state_dict({n: each.tensors.read(n) for n in each.tensors.shapes})
        model.set_multipliers(each.multipliers)
        logits.append(model(TOKENS))
    assert read_weights(tmp_path / "start").multipliers == Multipliers(attention=0.5)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-11, atol=1e-11)


def test_what_megatron_has_no_field_for_is_refused(weights: Weights, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no residual multiplier; got 0\.23.*Fold"):
        export_megatron(weights, tmp_path / "out", keep_multipliers=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"n_kv_heads": 3}}, "another shape than the model"),
        ({"config": {"n_layers": 3}}, r"layers\.2.*tensor is missing"),
        ({"config": {"tied": True}}, r"head\.weight: tensor is unknown"),
        ({"multipliers": {"embedding": 2.0}}, "not those of the multipliers"),
    ],
)
def test_a_folder_that_contradicts_itself_is_refused(
    weights: Weights, change: dict[str, dict[str, Any]], message: str, tmp_path: Path
) -> None:
    export_megatron(weights, tmp_path / "out")
    path = tmp_path / "out" / "megatron.json"
    content = json.loads(path.read_text())
    for key, fields in change.items():
        content[key] |= fields
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        import_megatron(tmp_path / "out", tmp_path / "start")
