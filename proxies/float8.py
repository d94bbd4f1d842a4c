"""FP8 hybrid training, emulated: FP8's values and scales, in matrix products of wide numbers.

Inputs and weights of a linear layer are cast to E4M3 and output gradients to E5M2 (2209.05433),
each with one scale per tensor; the casts are then multiplied back by their scales and go into
an ordinary matrix product. An FP8 tensor core adds the same products in another order and with
fewer bits, which this does not show; nor is it any faster. It runs on every device.

The casts and scales are functions of tensors alone, for engines that compute in real FP8.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mutransfer.errors import UserError
from proxies.layers import Linear, Plain

Scaling = Literal["delayed", "current", "none"]
"""Where a scale comes from: the amax of earlier uses, of this very tensor, or nowhere (1)."""

HISTORY = 128
"""Uses whose amax delayed scaling remembers."""

OVERFLOW = {torch.float8_e4m3fn: 464.0, torch.float8_e5m2: 61440.0}
"""Halfway from a format's largest number, 448 or 57344, to what would be the next one: beyond
it rounding overflows (IEEE 754, 7.4), so that clamping loses more than rounding ever does."""

FORMATS = {
    "inputs": torch.float8_e4m3fn,
    "weights": torch.float8_e4m3fn,
    "gradients": torch.float8_e5m2,
}
"""What is cast to which format: "hybrid" FP8. The order is that of the buffers' rows."""


def scale_of(amax: Tensor, dtype: torch.dtype, otherwise: Tensor) -> Tensor:
    """The scale that takes `amax` to the largest number of an FP8 format; margin 0.

    As in NVIDIA Transformer Engine, `otherwise` is returned where amax is zero or not finite,
    and the largest fp32 number where the scale would overflow.

    Shapes: all the same, fp32.
    """
    scale = torch.finfo(dtype).max / amax
    scale = scale.clamp(max=torch.finfo(torch.float32).max)
    return torch.where((amax > 0) & amax.isfinite(), scale, otherwise)


def cast(x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x * scale in an FP8 format, rounded to nearest even, saturated at its largest number.

    Returns:
        The FP8 tensor, and the share of entries that overflow (0-dim, fp32); one that is not
        a number counts as such.
    """
    largest = torch.finfo(dtype).max
    scaled = x.float() * scale
    beyond = ~(scaled.abs() <= OVERFLOW[dtype])
    return scaled.clamp(-largest, largest).to(dtype), beyond.float().mean()


def remember(history: Tensor, amax: Tensor) -> Tensor:
    """The history with `amax` as its newest entry and without its oldest. Shape (uses,)."""
    return torch.cat((amax.reshape(1), history[:-1]))


class Float8Linear(Linear):
    """A bias-free linear layer in emulated FP8. Shapes: (..., fan_in) -> (..., fan_out).

    Under delayed scaling a cast uses the scale left by earlier uses, 1 if there were none, and
    then remembers its own amax; as in Transformer Engine not where gradients are off, so that
    an evaluation changes nothing. History and scales are in the state dict.

    Args:
        fan_in, fan_out: Shape of the weight.
        scaling: Where scales come from.

    Attributes:
        amax_history: Newest first, a row per entry of `FORMATS`: (3, HISTORY), 0 where there
            is none yet; only under delayed scaling.
        scale: Scale of the next use (3,); only under delayed scaling.
    """

    amax_history: Tensor
    scale: Tensor

    def __init__(self, fan_in: int, fan_out: int, scaling: Scaling) -> None:
        super().__init__(fan_in, fan_out)
        self.scaling = scaling
        if scaling == "delayed":
            self.register_buffer("amax_history", torch.empty(len(FORMATS), HISTORY))
            self.register_buffer("scale", torch.empty(len(FORMATS)))
        for name in ("_overflow", "_amax"):
            self.register_buffer(name, torch.empty(len(FORMATS)), persistent=False)
        self.reset_state()

    @torch.no_grad()
    def reset_state(self) -> None:
        """Forgets everything but the weight, as a new run or `to_empty` needs it."""
        if self.scaling == "delayed":
            self.amax_history.zero_()
            self.scale.fill_(1.0)
        for name in ("_overflow", "_amax"):
            self.get_buffer(name).fill_(torch.nan)

    @property
    def fp8_overflow(self) -> dict[str, Tensor]:
        """Share of entries that the last use clamped; NaN before the first."""
        return dict(zip(FORMATS, self.get_buffer("_overflow"), strict=True))

    @property
    def fp8_amax(self) -> dict[str, Tensor]:
        """Largest magnitude, unscaled, in the last use; NaN before the first."""
        return dict(zip(FORMATS, self.get_buffer("_amax"), strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """Under autocast inputs are rounded to its type first, and outputs are of that type."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        out: Tensor = _Product.apply(x, self.weight, self, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
        return out

    @torch.no_grad()
    def quantize(self, part: str, x: Tensor, learn: bool) -> tuple[Tensor, Tensor]:
        """Casts one tensor.

        Args:
            part: Which of `FORMATS` it is.
            x: The tensor.
            learn: Whether delayed scaling remembers its amax.

        Returns:
            The FP8 tensor and its scale, 0-dim.
        """
        row, dtype = list(FORMATS).index(part), FORMATS[part]
        amax = x.abs().amax().float()
        scale = torch.ones_like(amax)
        if self.scaling == "delayed":
            scale = self.scale[row].clone()
        elif self.scaling == "current":
            scale = scale_of(amax, dtype, scale)
        quantized, overflow = cast(x, scale, dtype)
        self.get_buffer("_overflow")[row], self.get_buffer("_amax")[row] = overflow, amax
        if learn and self.scaling == "delayed":
            self.amax_history[row] = remember(self.amax_history[row], amax)
            self.scale[row] = scale_of(self.amax_history[row].amax(), dtype, scale)
        return quantized, scale


class _Product(torch.autograd.Function):
    """x @ weight.T and its gradients, of FP8 casts; the backward pass casts only its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: Float8Linear, learn: bool) -> Tensor:
        inputs = layer.quantize("inputs", x, learn)
        weights = layer.quantize("weights", weight, learn)
        ctx.layer, ctx.types = layer, (x.dtype, weight.dtype)
        ctx.save_for_backward(*inputs, *weights)
        return _matmul(_wide(*inputs), _wide(*weights).T).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        inputs, inputs_scale, weights, weights_scale = ctx.saved_tensors
        grad = _wide(*ctx.layer.quantize("gradients", grad_output, True))
        dgrad = wgrad = None
        if ctx.needs_input_grad[0]:
            dgrad = _matmul(grad, _wide(weights, weights_scale)).to(ctx.types[0])
        if ctx.needs_input_grad[1]:
            x = _wide(inputs, inputs_scale)
            rows = grad.reshape(-1, grad.shape[-1]).T
            wgrad = _matmul(rows, x.reshape(-1, x.shape[-1])).to(ctx.types[1])
        return dgrad, wgrad, None, None


def _wide(quantized: Tensor, scale: Tensor) -> Tensor:
    """What an FP8 tensor stands for, in fp32."""
    return quantized.float() / scale


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32, under autocast too."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


class Float8(Plain):
    """Linear layers in emulated FP8; embedding, head and norms stay in their own precision.

    Args:
        scaling: `delayed` takes a scale from the largest amax of the last `HISTORY` uses;
            `current` from the tensor itself, so that nothing is ever clamped; `none` casts
            without a scale, as frameworks do that cast and no more.

    Raises:
        UserError: There is no such scaling.
    """

    def __init__(self, *, scaling: Scaling = "delayed") -> None:
        if scaling not in get_args(Scaling):
            raise UserError("unknown scaling of FP8 tensors", where="scaling", got=scaling,
                            expected=", ".join(get_args(Scaling)))  # fmt: skip
        self.scaling: Scaling = scaling

    def linear(self, fan_in: int, fan_out: int) -> nn.Module:
        """See `LayerSet.linear`."""
        return Float8Linear(fan_in, fan_out, self.scaling)
