"""The named models have the sizes that they are known by."""

from __future__ import annotations

import pytest

from mutransfer.errors import UserError
from proxies.decoder import meta_decoder
from proxies.presets import PRESETS, get_preset


@pytest.mark.parametrize(
    ("name", "n_nonembedding", "n_parameters"),
    [
        ("xmodel-2.5", 1_151_485_440, 1_350_059_520),
        ("proxy-20m", 18_008_256, 42_830_016),
        ("proxy-20m-wide", 17_999_232, 67_642_752),
        ("tiny-32", 21_664, 29_856),
        ("tiny-256", 1_377_536, 1_443_072),
    ],
)
def test_sizes(name: str, n_nonembedding: int, n_parameters: int) -> None:
    config = get_preset(name)
    assert config.n_nonembedding == n_nonembedding
    assert config.n_parameters == n_parameters
    assert sum(p.numel() for p in meta_decoder(config).parameters()) == n_parameters


def test_xmodel_is_the_published_model() -> None:
    assert get_preset("xmodel-2.5").model_dump() == {
        "d_model": 1536,
        "n_layers": 48,
        "n_heads": 24,
        "n_kv_heads": 8,
        "head_dim": 64,
        "d_ff": 3840,
        "vocab_size": 129280,
        "max_seq_len": 131072,
        "rope_base": 500000.0,
        "norm_eps": 1e-5,
        "tied": True,
    }


@pytest.mark.parametrize(
    ("name", "target", "sizes"),
    [
        ("proxy-20m", "xmodel-2.5", {"d_model": 192, "n_heads": 3, "n_kv_heads": 1, "d_ff": 480}),
        ("proxy-20m-wide", "xmodel-2.5",
         {"d_model": 384, "n_layers": 12, "n_heads": 6, "n_kv_heads": 2, "d_ff": 960}),
        ("tiny-32", "tiny-256", {"d_model": 32, "n_heads": 2, "n_kv_heads": 1, "d_ff": 80}),
        ("tiny-64", "tiny-256", {"d_model": 64, "n_heads": 4, "n_kv_heads": 2, "d_ff": 160}),
        ("tiny-128", "tiny-256", {"d_model": 128, "n_heads": 8, "n_kv_heads": 4, "d_ff": 320}),
    ],
)  # fmt: skip
def test_a_proxy_is_its_target_at_another_size(
    name: str, target: str, sizes: dict[str, int]
) -> None:
    assert get_preset(name).model_dump() == get_preset(target).model_dump() | sizes


def test_the_tiny_family_spans_a_factor_of_eight() -> None:
    widths = sorted(c.d_model for name, c in PRESETS.items() if name.startswith("tiny-"))
    assert widths[-1] == 8 * widths[0]
    assert len(widths) == 4
    assert all(name == f"tiny-{c.d_model}" for name, c in PRESETS.items() if name[:4] == "tiny")


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(UserError, match=r"got tiny-48; expected one of xmodel-2\.5, proxy-20m, "):
        get_preset("tiny-48")
