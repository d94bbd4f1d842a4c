"""FLOPs per token against what torch counts in a pass."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mutransfer.apply import initialize
from mutransfer.rules import BaseParams
from proxies.cost import flops_per_token
from proxies.decoder import Decoder, DecoderConfig
from proxies.presets import get_preset
from proxies.tables import decoder_table

CONFIG = DecoderConfig(
    d_model=64, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=160, vocab_size=300
)


@pytest.mark.parametrize("tied", [True, False])
def test_all_products_are_counted_once(tied: bool) -> None:
    config = CONFIG.model_copy(update={"tied": tied})
    model = Decoder(config)
    initialize(model, decoder_table(config, config, BaseParams()), seed=0)
    seq_len = 8
    tokens = torch.zeros(4, seq_len + 1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(
        torch.nn.attention.SDPBackend.MATH  # the counter does not know the fused kernel
    ):  # fmt: skip
        model.loss(tokens).backward()
    # the counter has attention in full, and neither norms nor gains
    attention = 6 * config.n_layers * seq_len * config.n_heads * config.head_dim
    gains = 6 * (2 * config.n_layers + 1) * config.d_model
    counted = counter.get_total_flops() / (4 * seq_len)
    assert counted == flops_per_token(config, seq_len) + attention - gains


def test_the_reference_s_model() -> None:
    config = get_preset("xmodel-2.5")
    assert flops_per_token(config, 3712) == 6 * 1_350_059_520 + 6 * 48 * 3712 * 1536
