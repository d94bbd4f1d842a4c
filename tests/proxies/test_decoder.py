"""The decoder against explicit references: attention, RoPE, multipliers, shapes, counts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from mutransfer.apply import initialize
from mutransfer.errors import UserError
from mutransfer.rules import BaseParams
from mutransfer.table import Multipliers
from proxies.decoder import Attention, Decoder, DecoderConfig, meta_decoder, rotate
from proxies.layers import Plain, RMSNorm
from proxies.presets import get_preset
from proxies.tables import decoder_table

TINY = DecoderConfig(
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    d_ff=80,
    vocab_size=40,
    max_seq_len=64,
)
UNTIED = TINY.model_copy(update={"tied": False})


def decoder(config: DecoderConfig = TINY, **multipliers: float) -> Decoder:
    """A float64 decoder with large weights, so that every part of it matters."""
    model = Decoder(config)
    initialize(model, decoder_table(config, config, BaseParams(init_std=0.3)), seed=1)
    model.set_multipliers(Multipliers(**multipliers))
    return model.double()


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 40, shape, generator=torch.Generator().manual_seed(0))


def rope(length: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    frequency = base ** -(torch.arange(0, head_dim, 2).double() / head_dim)
    angle = torch.outer(torch.arange(length).double(), frequency)
    return angle.cos(), angle.sin()


def turned(x: Tensor, position: int, base: float) -> Tensor:
    """RoPE of one vector as rotations of complex numbers (x_j, x_{j + head_dim/2})."""
    half = x.shape[-1] // 2
    frequency = base ** -(torch.arange(half).double() / half)
    z = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones(half).double(),
                                                       position * frequency)  # fmt: skip
    return torch.cat((z.real, z.imag))


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(4, 4), (4, 2), (6, 2), (4, 1)])
def test_attention_equals_an_explicit_reference(n_heads: int, n_kv_heads: int) -> None:
    """Position by position, head by head: query head h reads KV head h // (n_heads/n_kv_heads)."""
    config = TINY.model_copy(update={"n_heads": n_heads, "n_kv_heads": n_kv_heads})
    attention, length, dim, base = Attention(config, Plain()).double(), 7, 8, 10000.0
    generator = torch.Generator().manual_seed(3)
    for p in attention.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) / 4
    x = torch.randn(length, 32, generator=generator, dtype=torch.float64)
    cos, sin = rope(length, dim, base)
    got = attention(x[None], cos, sin, torch.tensor(0.5))[0]
    q, k, v = (
        (x @ layer.weight.T).reshape(length, -1, dim)
        for layer in (attention.q, attention.k, attention.v)
    )
    mixed = torch.zeros(length, n_heads, dim, dtype=torch.float64)
    for h in range(n_heads):
        source = h // (n_heads // n_kv_heads)
        for t in range(length):
            query = turned(q[t, h], t, base)
            scores = [0.5 * (query @ turned(k[s, source], s, base)).item() for s in range(t + 1)]
            top = max(scores)
            weights = [math.exp(score - top) for score in scores]
            for s, weight in enumerate(weights):
                mixed[t, h] += weight / sum(weights) * v[s, source]
    torch.testing.assert_close(got, mixed.flatten(1) @ attention.o.weight.T, rtol=1e-10, atol=1e-10)


def test_rope_depends_on_relative_positions_only() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 16, generator=generator, dtype=torch.float64)
    cos, sin = rope(40, 16, 10000.0)

    def score(i: int, j: int) -> float:
        return (rotate(q, cos[i], sin[i]) @ rotate(k, cos[j], sin[j])).item()

    for distance in (0, 1, 7):
        assert score(3 + distance, 3) == pytest.approx(score(30 + distance, 30), rel=1e-11)
    assert score(0, 0) == pytest.approx((q @ k).item(), rel=1e-12)
    assert abs(score(4, 3) - score(3, 4)) > 0.1


def test_the_decoder_s_own_rope_has_the_config_s_base() -> None:
    """First frequency 1, last base^(-(d-2)/d); computed in float32, hence 1e-5 at position 60."""
    model = decoder(TINY.model_copy(update={"rope_base": 500000.0}))
    cos, sin = model._rope(61, torch.zeros((), dtype=torch.float64))
    expected = rope(61, 8, 500000.0)
    assert cos.dtype == torch.float64
    torch.testing.assert_close((cos, sin), expected, rtol=0, atol=1e-5)
    assert cos[60, 0].item() == pytest.approx(math.cos(60), abs=1e-5)


def test_rope_at_position_131071_is_as_good_as_float32_angles() -> None:
    """Half a unit in the last place of the frequency, times the position, and one of the angle."""
    config = get_preset("xmodel-2.5").narrow(192, n_layers=1)
    rotation = meta_decoder(config)._rope(131072, torch.zeros((), dtype=torch.float32))
    frequency = np.longdouble(500000) ** -(np.arange(32).astype(np.longdouble) * 2 / 64)
    positions = np.array([1, 4096, 65537, 131071])
    angle = positions[:, None].astype(np.longdouble) * frequency
    for got, exact in zip(rotation, (np.cos(angle), np.sin(angle)), strict=True):
        error = np.abs(got[positions].numpy().astype(np.longdouble) - exact)
        assert (error <= 2 * angle * 2.0**-24 + 2 * angle * 2.0**-24 + 2.0**-23).all()


@pytest.mark.parametrize("config", [TINY, UNTIED])
def test_the_future_does_not_reach_the_past(config: DecoderConfig) -> None:
    model, ids = decoder(config), tokens(2, 12)
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 40
    with torch.no_grad():
        a, b = model(ids), model(changed)
    assert torch.equal(a[:, :7], b[:, :7])
    assert ((a - b)[:, 7:].abs().amax(-1) > 1e-3).all()


def test_the_past_reaches_the_future() -> None:
    model, ids = decoder(), tokens(1, 12)
    changed = ids.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 40
    with torch.no_grad():
        assert ((model(ids) - model(changed)).abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("shape", [(2, 3, 9), (2, 1, 3, 9), (9,)])
def test_leading_dimensions_pass_through(shape: tuple[int, ...]) -> None:
    model, ids = decoder(), tokens(*shape)
    with torch.no_grad():
        got, flat = model(ids), model(ids.reshape(-1, 9))
    assert got.shape == (*shape, 40)
    torch.testing.assert_close(got, flat.reshape(got.shape), rtol=1e-10, atol=1e-10)


def test_loss_is_the_mean_cross_entropy_of_the_next_token() -> None:
    model, ids = decoder(), tokens(2, 3, 8)
    with torch.no_grad():
        logits, total = model(ids[..., :-1]), 0.0
        for i in range(2):
            for j in range(3):
                for t in range(7):
                    row = logits[i, j, t]
                    total += (row.logsumexp(0) - row[ids[i, j, t + 1]]).item()
        # float32 inside the loss: 40 logits of size about 10
        assert model.loss(ids).item() == pytest.approx(total / 42, rel=1e-5)


def test_small_weights_give_the_loss_of_a_uniform_guess() -> None:
    model = Decoder(TINY)
    initialize(model, decoder_table(TINY, TINY, BaseParams(init_std=1e-6)), seed=0)
    assert model.loss(tokens(4, 9)).item() == pytest.approx(math.log(40), rel=1e-4)


def test_the_tied_head_is_the_embedding() -> None:
    model, ids = decoder(), tokens(2, 5)
    assert not hasattr(model, "head")
    with torch.no_grad():
        torch.testing.assert_close(model(ids), model.hidden(ids) @ model.embedding.weight.T)
    model.loss(ids).backward()  # type: ignore[no-untyped-call]
    used = ids[:, :-1].unique()
    unused = [i for i in range(40) if i not in used]
    gradient = model.get_parameter("embedding.weight").grad
    assert gradient is not None
    assert unused
    assert (gradient[unused].abs().amax(-1) > 0).all()


def test_the_untied_head_is_its_own() -> None:
    model, ids = decoder(UNTIED), tokens(2, 5)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), model.hidden(ids) @ model.head.weight.T)
    model.loss(ids).backward()  # type: ignore[no-untyped-call]
    unused = [i for i in range(40) if i not in ids[:, :-1]]
    gradient = model.get_parameter("embedding.weight").grad
    assert gradient is not None
    assert not gradient[unused].any()


def watch(model: Decoder, name: str, ids: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Inputs and output of a module in one forward pass."""
    seen: list[Any] = []
    hook = model.get_submodule(name).register_forward_hook(lambda _, a, out: seen.append((a, out)))
    with torch.no_grad():
        model(ids)
    hook.remove()
    return seen[0][0], seen[0][1]


def test_the_embedding_multiplier_scales_the_embedding() -> None:
    ids = tokens(2, 5)
    model = decoder(embedding=12.0)
    (x, *_), _ = watch(model, "layers.0", ids)
    torch.testing.assert_close(x, 12.0 * model.embedding.weight[ids])


def test_the_output_multiplier_scales_the_logits() -> None:
    ids = tokens(2, 5)
    with torch.no_grad():
        torch.testing.assert_close(decoder(output=0.25)(ids), 0.25 * decoder()(ids))


def test_the_residual_multiplier_scales_both_branches() -> None:
    ids = tokens(2, 5)
    model = decoder(residual=0.125)
    (x, *_), out = watch(model, "layers.1", ids)
    attention = watch(model, "layers.1.attention", ids)[1]
    mlp = watch(model, "layers.1.mlp", ids)[1]
    torch.testing.assert_close(out, x + 0.125 * attention + 0.125 * mlp)
    (middle, *_), _ = watch(model, "layers.1.mlp_norm", ids)
    torch.testing.assert_close(middle, x + 0.125 * attention)


def test_the_attention_multiplier_is_the_whole_softmax_scale() -> None:
    ids = tokens(2, 5)
    model = decoder(attention=0.5)
    (x, *_), _ = watch(model, "layers.0.attention", ids)
    (q, k, _), _ = watch(model, "layers.0.attention.attend", ids)
    heads = (x @ model.get_parameter("layers.0.attention.q.weight").T).unflatten(-1, (4, 8))
    # position 0 is not rotated
    torch.testing.assert_close(q[:, :, 0], 0.5 * heads[:, 0])
    assert q.shape == (2, 4, 5, 8)
    assert k.shape == (2, 2, 5, 8)


def test_the_norm_is_an_rms_norm() -> None:
    norm = RMSNorm(4, 0.5).double()
    norm.weight.data = torch.tensor([1.0, 2.0, 3.0, 4.0]).double()
    x = torch.tensor([1.0, -1.0, 3.0, 5.0]).double()
    torch.testing.assert_close(norm(x), x * norm.weight / math.sqrt(36 / 4 + 0.5))


def test_the_mlp_is_a_swiglu() -> None:
    model = decoder()
    (x,), out = watch(model, "layers.0.mlp", tokens(2, 5))
    gate, up, down = (
        model.get_parameter(f"layers.0.mlp.{n}.weight") for n in ("gate", "up", "down")
    )
    g = x @ gate.T
    torch.testing.assert_close(out, (g / (1 + torch.exp(-g)) * (x @ up.T)) @ down.T)


def test_positions_end() -> None:
    model = Decoder(TINY)
    model(tokens(1, 64))
    with pytest.raises(UserError, match=r"seq_len: .*got 65; expected at most 64"):
        model(tokens(1, 65))


@pytest.mark.parametrize("n_layers", [1, 3])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("d_model", [32, 64])
def test_counts_are_those_of_the_model(n_layers: int, tied: bool, d_model: int) -> None:
    config = TINY.model_copy(update={"tied": tied}).narrow(d_model, n_layers)
    sizes = {fqn: p.numel() for fqn, p in meta_decoder(config).named_parameters()}
    ends = sum(n for fqn, n in sizes.items() if fqn.startswith(("embedding", "head")))
    assert config.n_embedding == ends
    assert config.n_parameters == sum(sizes.values())
    assert config.n_nonembedding == sum(sizes.values()) - ends


def test_the_meta_decoder_has_no_memory() -> None:
    model = meta_decoder(TINY)
    assert all(p.is_meta for p in model.parameters())
    assert list(model.state_dict()) == list(Decoder(TINY).state_dict())


@pytest.mark.parametrize("config", [TINY, UNTIED])
def test_a_meta_decoder_with_memory_is_the_same_once_initialized(config: DecoderConfig) -> None:
    """Weights, gains and multipliers all come from the table, whatever the memory held."""
    params = BaseParams(embedding_multiplier=3.0, output_multiplier=2.0, residual_multiplier=1.5)
    table = decoder_table(config, config.narrow(16), params)
    plain, empty = Decoder(config), meta_decoder(config).to_empty(device="cpu")
    for tensor in (*empty.parameters(), *empty.buffers()):
        tensor.data.fill_(math.nan)
    for model in (plain, empty):
        initialize(model, table, seed=3)
    assert torch.equal(plain(tokens(2, 9)), empty(tokens(2, 9)))
    for named in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(empty, named)()), dict(getattr(plain, named)())
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_narrow_keeps_every_ratio() -> None:
    narrow = TINY.narrow(16, n_layers=5)
    assert narrow.model_dump() == TINY.model_dump() | {
        "d_model": 16, "n_layers": 5, "n_heads": 2, "n_kv_heads": 1, "d_ff": 40
    }  # fmt: skip
    assert narrow.narrow(32, n_layers=2) == TINY
    assert TINY.narrow(32) == TINY
    assert TINY.width_step == 16


@pytest.mark.parametrize("d_model", [-16, 0, 8, 24, 33])
def test_a_width_that_does_not_fit_lists_those_that_do(d_model: int) -> None:
    with pytest.raises(UserError, match=r"^d_model: .*expected one of 16, 32, 48, 64, … \(16 \* k"):
        TINY.narrow(d_model)


@pytest.mark.parametrize(
    ("changed", "step"),
    [({"n_kv_heads": 1, "n_heads": 4}, 32), ({"d_ff": 84}, 16), ({"d_ff": 81}, 32)],
)
def test_the_step_of_widths_follows_what_must_stay_whole(
    changed: dict[str, int], step: int
) -> None:
    """d / gcd(d, heads, KV heads, d_ff), and every multiple of it works."""
    config = TINY.model_copy(update=changed)
    assert config.width_step == step
    for k in (1, 2, 3):
        narrow = config.narrow(step * k)
        assert narrow.n_heads * 32 == config.n_heads * narrow.d_model
        assert narrow.n_kv_heads * 32 == config.n_kv_heads * narrow.d_model
        assert narrow.d_ff * 32 == config.d_ff * narrow.d_model


@pytest.mark.parametrize("n_layers", [0, -1])
def test_a_model_without_layers_is_refused(n_layers: int) -> None:
    with pytest.raises(UserError, match=f"n_layers: .*got {n_layers}; expected at least 1"):
        TINY.narrow(32, n_layers=n_layers)


LIMITS = {
    "d_model": (1, 2**20),
    "n_layers": (1, 4096),
    "n_heads": (2, 65536),
    "n_kv_heads": (1, 4),
    "head_dim": (2, 4096),
    "d_ff": (1, 2**22),
    "vocab_size": (2, 2**22),
    "max_seq_len": (1, 2**24),
}


@pytest.mark.parametrize("field", LIMITS)
def test_sizes_have_limits(field: str) -> None:
    low, high = LIMITS[field]
    fields = TINY.model_dump()
    for good in (low, high):
        assert getattr(DecoderConfig(**fields | {field: good}), field) == good
    for bad in (0, -1, low - 1, high + 1, 3.5):
        with pytest.raises(ValidationError):
            DecoderConfig(**fields | {field: bad})


@pytest.mark.parametrize(
    "changed",
    [
        {"n_heads": 3},
        {"n_kv_heads": 3},
        {"head_dim": 7},
        {"norm_eps": 0.0},
        {"norm_eps": 1.0},
        {"norm_eps": math.nan},
        {"rope_base": 0.0},
        {"rope_base": math.inf},
        {"rope_base": math.nan},
        {"d_modle": 32},
    ],
)
def test_what_is_no_decoder_is_refused(changed: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(changed)).split("_")[0]):
        DecoderConfig(**TINY.model_dump() | changed)


def test_the_config_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        TINY.d_model = 64
