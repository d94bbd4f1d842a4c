"""The largest attention logit against all logits, written out."""

from __future__ import annotations

import pytest
import torch

from full_scale import attention_logits
from full_scale.attention_logits import watched
from mutransfer.apply import initialize
from mutransfer.rules import BaseParams
from proxies.decoder import Attend, Decoder, DecoderConfig
from proxies.memory import Memory
from proxies.tables import decoder_table

CONFIG = DecoderConfig(
    d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=80, vocab_size=40
)


@pytest.mark.parametrize("rows", [1, 4, 512])
def test_it_is_the_largest_that_attention_sees(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_logits, "_ROWS", rows)
    q, k = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8)
    k[..., 8, :] *= 100  # only the last query may see this
    logits = q @ k.repeat_interleave(2, dim=1).transpose(-2, -1)
    expected = logits.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf).amax()
    attend = Attend()
    with watched(attend) as seen:
        attend(q, k, k)
    assert seen.value is not None
    assert seen.value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_it_is_over_all_layers_and_leaves_no_trace() -> None:
    model = Decoder(CONFIG)
    initialize(model, decoder_table(CONFIG, CONFIG, BaseParams(init_std=0.3)), seed=0)
    tokens = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    with watched(model) as plain:
        model.loss(tokens)
    model.memory = Memory(recompute=True, loss_chunk=3)
    with watched(model) as again:
        loss = model.loss(tokens)
    loss.backward()
    with torch.no_grad():
        model.layers[1].attention.q.weight.mul_(50)  # type: ignore[union-attr]
    with watched(model, wanted=False) as unwatched:
        model.loss(tokens)
    with watched(model) as larger:
        model.loss(tokens)
    assert plain.value is not None
    assert larger.value is not None
    assert again.value == plain.value
    assert unwatched.value is None
    assert larger.value > 5 * plain.value
    assert not any(module._forward_pre_hooks for module in model.modules())
