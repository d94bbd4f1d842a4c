"""A bundle with everything in it, made by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mutransfer.bundle import Bundle
from mutransfer.rules import DEFAULT, BaseParams, get_parametrization
from proxies.decoder import DecoderConfig
from proxies.tables import decoder_table

PARAMS = BaseParams(
    lr=2**-7,
    embedding_lr_ratio=1.7,
    init_std=0.043,
    embedding_multiplier=3.3,
    output_multiplier=1.9,
    residual_multiplier=0.8,
    attention_multiplier=1.1,
    weight_decay=0.1,
    beta1=0.85,
    beta2=0.93,
    eps=3e-9,
    muon_factor=0.7,
    muon_momentum=0.9,
)


@pytest.fixture
def make_sound(passed: dict[str, Any]) -> Callable[..., Bundle]:
    """Makes a bundle that is sound in every respect: wider and deeper than its base, which is
    wider than m = 1; keywords replace fields."""

    def make(*, tied: bool = True, **fields: Any) -> Bundle:
        target = DecoderConfig(
            d_model=96, n_layers=4, n_heads=6, n_kv_heads=3, head_dim=16, d_ff=192,
            vocab_size=256, max_seq_len=128, tied=tied,
        )  # fmt: skip
        base = target.narrow(32, n_layers=2).model_copy(update={"max_seq_len": 64})
        own = {
            "experiment": {"name": "made by hand", "sha256": "e" * 64},
            "base": {"config": base.model_dump(), "base_width": 24},
            "target": {"config": target.model_dump()},
            "parametrization": {"name": DEFAULT, "version": get_parametrization(DEFAULT).version},
            "base_hyperparameters": PARAMS,
            "table": decoder_table(target, base, PARAMS, base_width=24),
            "batch_tokens": 512,
            "horizon_tokens": 51200,
            "data": {
                "fingerprint": "a" * 64,
                "tokenizer_fingerprint": "b" * 64,
                "vocab_size": 256,
            },
            "versions": {"python": "3.11.0"},
        }
        return Bundle.create(**{**own, **passed, **fields})

    return make


@pytest.fixture
def sound(make_sound: Callable[..., Bundle]) -> Bundle:
    """The bundle as it is; nothing is wrong with it."""
    return make_sound()
