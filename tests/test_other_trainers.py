"""The snippet of docs/other-trainers.md, run on modules with torchtitan's and nanotron's names."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mutransfer.rules import BaseParams
from proxies.decoder import DecoderConfig
from proxies.tables import decoder_table

ROOT = Path(__file__).resolve().parents[1]
CONFIG = DecoderConfig(d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=96,
                       vocab_size=256, tied=False)  # fmt: skip
TABLE = decoder_table(CONFIG, CONFIG.narrow(32), BaseParams(
    lr=0.01, embedding_lr_ratio=4.0, init_std=0.2, weight_decay=0.1))  # fmt: skip
INSIDE = {
    "TORCHTITAN": "attention.wq attention.wk attention.wv attention.wo feed_forward.w1 "
    "feed_forward.w2 feed_forward.w3 attention_norm ffn_norm",
    "NANOTRON": "attn.qkv_proj attn.o_proj mlp.gate_up_proj mlp.down_proj input_layernorm "
    "post_attention_layernorm",
}
OUTSIDE = {
    "TORCHTITAN": ("layers.{}.", "tok_embeddings output norm"),
    "NANOTRON": ("model.decoder.{}.pp_block.",
                 "model.token_position_embeddings.pp_block.token_embedding model.lm_head.pp_block "
                 "model.final_layer_norm.pp_block"),
}  # fmt: skip


class Named(nn.Module):
    """Parameters under another framework's names; it is not that framework's model."""

    def __init__(self, framework: str) -> None:
        super().__init__()
        prefix, outside = OUTSIDE[framework]
        names = [prefix.format(n) + name for n in range(2) for name in INSIDE[framework].split()]
        self.named = {
            f"{name}.weight": nn.Parameter(torch.full((64,) if "norm" in name else (64, 64), 9.0))
            for name in [*names, *outside.split()]
        }

    def named_parameters(self, *args: Any, **options: Any) -> Any:
        return iter(self.named.items())


@pytest.mark.parametrize("framework", ["TORCHTITAN", "NANOTRON"])
def test_every_name_has_its_row(framework: str) -> None:
    text = (ROOT / "docs" / "other-trainers.md").read_text("utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
                if "TORCHTITAN" in block)  # fmt: skip
    scope: dict[str, Any] = {}
    exec(compile(code, "docs/other-trainers.md", "exec"), scope)
    model, bundle, names = Named(framework), SimpleNamespace(table=TABLE), scope[framework]
    roles = {fqn: row.role for fqn, _, row in scope["rows"](model, bundle, names)}
    expected = {"embed": "embedding", "output": "head", "lm_head": "head"}
    for fqn, role in roles.items():
        if "norm" in fqn:
            inside = "layers." in fqn or "decoder." in fqn
            assert role == ("gain" if inside else "final_gain"), fqn
        elif re.search(r"wo\.|w2\.|o_proj|down_proj", fqn):
            assert role == "hidden_out", fqn
        else:
            known = next((r for part, r in expected.items() if part in fqn), "hidden")
            assert role == known, fqn
    rates = {group["lr"] for group in scope["groups"](model, bundle, names)}
    assert rates == {0.005, 0.01, 0.04}
    torch.manual_seed(0)
    scope["draw"](model, bundle, names)
    for fqn, parameter, row in scope["rows"](model, bundle, names):
        if "norm" in fqn:
            assert torch.equal(parameter, torch.ones(64))
        else:
            assert float(parameter.detach().std()) == pytest.approx(row.init_std, rel=0.1)
