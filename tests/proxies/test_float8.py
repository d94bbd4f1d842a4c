"""Emulated FP8 against a slow float64 reference: casts, scales, gradients, a short training."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from mutransfer.apply import initialize
from mutransfer.errors import UserError
from mutransfer.optimizers import Optimizers
from mutransfer.rules import BaseParams
from proxies.decoder import Decoder, DecoderConfig
from proxies.float8 import FORMATS, HISTORY, Float8, Float8Linear, Scaling, cast, scale_of
from proxies.presets import TINY
from proxies.tables import decoder_table

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SHAPE = {E4M3: (3, 7, 126), E5M2: (2, 15, 123)}
"""Bits of the mantissa, bias of the exponent, code of the largest finite number (2209.05433)."""
SMALL = TINY.narrow(32).model_copy(update={"vocab_size": 64})


def grid(dtype: torch.dtype) -> list[float]:
    """Every finite magnitude of a format by its code, from the definition."""
    bits, bias, last = SHAPE[dtype]
    found = []
    for code in range(last + 1):
        exponent, mantissa = code >> bits, (code & (2**bits - 1)) / 2**bits
        found.append(
            (1 + mantissa) * 2.0 ** (exponent - bias) if exponent else mantissa * 2.0 ** (1 - bias)
        )
    return found


def code_of(x: float, dtype: torch.dtype) -> int:
    """The code of a number: nearest magnitude, the even code of two, saturated."""
    sign = 128 if math.copysign(1.0, x) < 0 else 0
    near = enumerate(grid(dtype))
    return sign + min((abs(min(abs(x), 1e9) - value), code % 2, code) for code, value in near)[2]


def inputs(dtype: torch.dtype) -> Tensor:
    """Every number of a format, every midpoint and its neighbours, and far beyond."""
    values = torch.tensor(grid(dtype))
    middle = (values[1:] + values[:-1]) / 2
    ends = torch.tensor([0.0, torch.inf])
    random = 2 ** torch.empty(200).uniform_(-20, 20, generator=torch.Generator().manual_seed(0))
    beyond = torch.tensor([449.0, 464.0, 465.0, 480.0, 61439.0, 61440.0, 65536.0, 1e30, torch.inf])
    positive = torch.cat((values, middle, *(middle.nextafter(end) for end in ends), random, beyond))
    return torch.cat((positive, -positive))


@pytest.mark.parametrize("scale", [1.0, 0.37, 1000.0])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_casts_are_those_of_the_definition_bit_for_bit(dtype: torch.dtype, scale: float) -> None:
    x = inputs(dtype)
    got = cast(x, torch.tensor(scale), dtype)[0]
    product = (x * torch.tensor(scale)).tolist()
    assert got.dtype == dtype
    assert got.view(torch.uint8).tolist() == [code_of(value, dtype) for value in product]


@pytest.mark.parametrize(
    ("dtype", "last", "first"), [(E4M3, 464.0, 464.1), (E5M2, 61440.0, 61444.0)]
)
def test_what_rounds_to_the_largest_number_does_not_overflow(
    dtype: torch.dtype, last: float, first: float
) -> None:
    inside = torch.tensor([0.0, 1.0, -last])
    assert float(cast(inside, torch.tensor(1.0), dtype)[1]) == 0
    beyond = torch.tensor([first, -1e9, torch.inf, torch.nan])
    assert float(cast(beyond, torch.tensor(1.0), dtype)[1]) == 1
    assert float(cast(torch.cat((inside, inside[:1], beyond)), torch.tensor(1.0), dtype)[1]) == 0.5


def test_a_scale_takes_the_amax_to_the_largest_number() -> None:
    amax = torch.tensor([2.0, 0.0, torch.inf, torch.nan, 1e-37, 448.0])
    scale = scale_of(amax, E4M3, torch.full_like(amax, 7.0))
    most = torch.finfo(torch.float32).max
    assert scale.tolist() == [224.0, 7.0, 7.0, 7.0, most, 1.0]
    assert float(scale_of(torch.tensor(7.0), E5M2, torch.tensor(1.0))) == 8192.0


def fed(layer: Float8Linear, amax: float) -> float:
    """The scale that inputs of this amax meet."""
    scale = layer.quantize("inputs", torch.tensor([[amax / 2, -amax]]), True)[1]
    return float(scale)


def test_delayed_scales_come_from_the_uses_before() -> None:
    layer = Float8Linear(2, 2, "delayed")
    assert fed(layer, 4.0) == 1.0  # nothing is known before the first use
    assert [fed(layer, amax) for amax in (1.0, 0.0, 8.0, 2.0)] == [112.0, 112.0, 112.0, 56.0]
    assert layer.amax_history[0, :6].tolist() == [2.0, 8.0, 0.0, 1.0, 4.0, 0.0]
    assert layer.amax_history[1:].count_nonzero() == 0
    for _ in range(HISTORY - 2):
        assert fed(layer, 2.0) == 56.0
    assert fed(layer, 2.0) == 56.0  # the 8 is the oldest of the last 128
    assert fed(layer, 2.0) == 224.0  # and forgotten
    assert layer.scale[1:].tolist() == [1.0, 1.0]


def test_what_is_not_finite_leaves_a_delayed_scale_alone() -> None:
    layer = Float8Linear(2, 2, "delayed")
    assert [fed(layer, amax) for amax in (4.0, torch.inf, 1.0)] == [1.0, 112.0, 112.0]


def test_current_scales_come_from_the_tensor_and_none_from_nowhere() -> None:
    for scaling, expected in (("current", [112.0, 448.0, 1.0]), ("none", [1.0, 1.0, 1.0])):
        layer = Float8Linear(2, 2, scaling)  # type: ignore[arg-type]
        assert [fed(layer, amax) for amax in (4.0, 1.0, 0.0)] == expected
        assert list(layer.state_dict()) == ["weight"]


def quantized(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """What a tensor becomes, in float64, by the definition."""
    values = torch.tensor(grid(dtype), dtype=torch.float64)
    codes = torch.tensor([code_of(v, dtype) for v in (x * torch.tensor(scale)).flatten().tolist()])
    return (values[codes % 128] * (1 - 2 * (codes // 128)) / scale).reshape(x.shape)


@pytest.mark.parametrize("scaling", ["delayed", "current", "none"])
def test_product_and_gradients_are_those_of_the_casts(scaling: Scaling) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = Float8Linear(12, 5, scaling)
    torch.nn.init.normal_(layer.weight, generator=generator)
    for _ in range(2):  # under delayed scaling the second pass has scales other than 1
        layer.weight.grad = None
        x = torch.randn(2, 3, 4, 12, generator=generator).requires_grad_()
        grad = torch.randn(2, 3, 4, 5, generator=generator) / 100
        scales = dict(zip(FORMATS, getattr(layer, "scale", torch.ones(3)).tolist(), strict=True))
        if scaling == "current":
            tensors = {"inputs": x, "weights": layer.weight, "gradients": grad}
            for part, dtype in FORMATS.items():
                amax = tensors[part].detach().abs().max()
                scales[part] = float(torch.finfo(dtype).max / amax)
        out = layer(x)
        out.backward(grad)
    assert (scaling == "none") == (set(scales.values()) == {1.0})
    qx, qw = (quantized(t.detach(), scales[part], E4M3)
              for part, t in (("inputs", x), ("weights", layer.weight)))  # fmt: skip
    qg = quantized(grad, scales["gradients"], E5M2)

    def near(got: Tensor, right: Tensor) -> None:
        torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-6)

    assert x.grad is not None
    assert layer.weight.grad is not None
    near(out.detach(), qx @ qw.T)
    near(x.grad, qg @ qw)
    near(layer.weight.grad, qg.flatten(0, -2).T @ qx.flatten(0, -2))
    wide, out = torch.nn.functional.linear(x, layer.weight).detach(), out.detach()
    assert 1e-3 < float((out - wide).norm() / wide.norm()) < 0.1


def test_an_evaluation_changes_no_scale_and_tells_what_overflows() -> None:
    layer = Float8Linear(4, 4, "delayed")
    torch.nn.init.ones_(layer.weight)
    layer(torch.ones(1, 4)).sum().backward()
    before = copy.deepcopy(layer.state_dict())
    with torch.no_grad():
        layer(torch.tensor([[1.0, 2.0, -3.0, 0.5]]))
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    told = {part: float(share) for part, share in layer.fp8_overflow.items()}
    assert told == {"inputs": 0.5, "weights": 0.0, "gradients": 0.0}
    assert {part: float(amax) for part, amax in layer.fp8_amax.items()} == {
        "inputs": 3.0, "weights": 1.0, "gradients": 1.0
    }  # fmt: skip
    layer.reset_state()
    assert fed(layer, 4.0) == 1.0


def test_under_autocast_the_product_stays_wide_and_its_result_does_not() -> None:
    layer = Float8Linear(64, 8, "current")
    torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
        out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, layer(x.bfloat16()).detach())
    assert torch.equal(out, layer(x.bfloat16().float()).bfloat16())
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_head_and_norms_stay_out(tied: bool) -> None:
    model = Decoder(SMALL.model_copy(update={"tied": tied}), Float8())
    inside = {name for name, m in model.named_modules() if isinstance(m, Float8Linear)}
    parts = ("attention.q", "attention.k", "attention.v", "attention.o",
             "mlp.gate", "mlp.up", "mlp.down")  # fmt: skip
    assert inside == {f"layers.{i}.{part}" for i in range(SMALL.n_layers) for part in parts}


def test_an_unknown_scaling_is_refused() -> None:
    with pytest.raises(UserError, match=r"^scaling: .*got block; expected delayed, current, none"):
        Float8(scaling="block")  # type: ignore[arg-type]


def batch(step: int, config: DecoderConfig) -> Tensor:
    """Text with one likely successor per token: (8, 33)."""
    generator = torch.Generator().manual_seed(step)
    successor = torch.randperm(config.vocab_size, generator=torch.Generator().manual_seed(99))
    tokens = [torch.randint(config.vocab_size, (8,), generator=generator)]
    for _ in range(32):
        other = torch.randint(config.vocab_size, (8,), generator=generator)
        likely = torch.rand(8, generator=generator) < 0.7
        tokens.append(torch.where(likely, successor[tokens[-1]], other))
    return torch.stack(tokens, 1)


def start(layers: Float8 | None) -> tuple[Decoder, Optimizers]:
    table = decoder_table(SMALL, SMALL, BaseParams(lr=2**-7))
    model = Decoder(SMALL, layers)
    initialize(model, table, seed=0)
    return model, Optimizers(model, table)


def train(model: Decoder, optimizers: Optimizers, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = model.loss(batch(step, SMALL))
        loss.backward()
        optimizers.step()
        optimizers.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("scaling", ["delayed", "current"])
def test_training_ends_near_fp32(scaling: Scaling) -> None:
    wide = train(*start(None), range(100))
    emulated = train(*start(Float8(scaling=scaling)), range(100))
    assert wide != emulated
    last, right = sum(emulated[-20:]) / 20, sum(wide[-20:]) / 20
    assert right < math.log(SMALL.vocab_size) - 1
    assert abs(last - right) < 0.02


def test_a_resumed_run_goes_on_bit_for_bit() -> None:
    model, optimizers = start(Float8())
    train(model, optimizers, range(3))
    state = copy.deepcopy(model.state_dict())
    forgetful, _ = start(Float8())
    resumed, _ = start(Float8())
    resumed.load_state_dict(state)
    with torch.no_grad():
        forgetful.load_state_dict({name: state[name] for name, _ in model.named_parameters()},
                                  strict=False)  # fmt: skip
    right, again, lost = (m.loss(batch(3, SMALL)) for m in (model, resumed, forgetful))
    assert torch.equal(right, again)
    assert not torch.equal(right, lost)
