"""Named models. A proxy is a target at another width (and depth), and nothing else."""

from __future__ import annotations

from mutransfer.errors import UserError
from proxies.decoder import DecoderConfig

XMODEL_2_5 = DecoderConfig(
    d_model=1536,
    n_layers=48,
    n_heads=24,
    n_kv_heads=8,
    head_dim=64,
    d_ff=3840,
    vocab_size=129280,
    max_seq_len=131072,
    rope_base=500000.0,
)
"""Xmodel-2.5 (2511.19496): 1,350,059,520 parameters."""

ONE_B = XMODEL_2_5.model_copy(update={"n_layers": 40, "vocab_size": 65536})
"""A model of 1,060,234,752 parameters that a small team can train on 100B tokens."""

TINY = DecoderConfig(
    d_model=256,
    n_layers=2,
    n_heads=16,
    n_kv_heads=8,
    head_dim=16,
    d_ff=640,
    vocab_size=256,
    max_seq_len=2048,
)
"""A family for the CPU: widths 32 to 256 span a factor of 8 at head_dim 16."""

PRESETS: dict[str, DecoderConfig] = {
    "xmodel-2.5": XMODEL_2_5,
    "proxy-20m": XMODEL_2_5.narrow(192),
    "proxy-20m-wide": XMODEL_2_5.narrow(384, n_layers=12),
    "1b": ONE_B,
    **{f"tiny-{d_model}": TINY.narrow(d_model) for d_model in (32, 64, 128, 256)},
}


def get_preset(name: str) -> DecoderConfig:
    """The model called `name`.

    Raises:
        UserError: There is none of that name.
    """
    if name not in PRESETS:
        raise UserError("unknown preset", got=name, expected=f"one of {', '.join(PRESETS)}")
    return PRESETS[name]
