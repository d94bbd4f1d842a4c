"""Memory counted without memory, against the same count over tensors that are there."""

from __future__ import annotations

from typing import Any

import pytest

from proxies.allocation import _count, allocation
from proxies.decoder import DecoderConfig
from proxies.memory import Memory

CONFIG = DecoderConfig(
    d_model=32, n_layers=5, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=80, vocab_size=300
)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"optimizer": "muon"},
        {"memory": Memory(recompute=True, loss_chunk=16)},
        {"precision": "bf16", "measured": False},
    ],
    ids=str,
)
def test_five_blocks_take_what_two_and_three_say(change: dict[str, Any]) -> None:
    own: dict[str, Any] = {"optimizer": "adamw", "precision": "fp32", "memory": Memory(),
                           "measured": True, **change}  # fmt: skip
    real = _count(CONFIG, micro_batch=4, seq_len=32, fake=False, **own)
    said = allocation(CONFIG, micro_batch=4, seq_len=32, **change)
    assert said.state == real.state
    assert said.peak == pytest.approx(real.peak, rel=0.01)
    assert said.passes == pytest.approx(real.passes, rel=0.01)


def test_state_is_four_numbers_per_weight_and_less_under_muon() -> None:
    adamw, muon = (allocation(CONFIG, micro_batch=1, seq_len=8, optimizer=o)
                   for o in ("adamw", "muon"))  # fmt: skip
    n = CONFIG.n_parameters
    assert adamw.weights == adamw.gradients == 4 * n
    steps = 4 * (2 + 9 * CONFIG.n_layers)  # a step count per tensor
    assert adamw.moments == 8 * n + steps
    matrices = CONFIG.n_nonembedding - CONFIG.d_model * (2 * CONFIG.n_layers + 1)
    assert muon.moments == 8 * n - 4 * matrices + 4 * (2 + 2 * CONFIG.n_layers)
    assert adamw.update >= 4 * n  # the copy that measures


def test_computing_twice_takes_less() -> None:
    plain = allocation(CONFIG, micro_batch=4, seq_len=64)
    again = allocation(
        CONFIG, micro_batch=4, seq_len=64, memory=Memory(recompute=True, loss_chunk=32)
    )
    assert again.passes < plain.passes / 2
