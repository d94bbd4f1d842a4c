"""Layer sets: where the one decoder takes its layers from.

A layer set decides how a matrix product, an embedding and a norm are computed (plain
torch here; FP8 and stacked populations are further sets); the decoder decides what is
connected to what, once.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerSet(Protocol):
    """Makes the parametrized layers of a decoder; all weights are (fan_out, fan_in)."""

    def linear(self, fan_in: int, fan_out: int) -> nn.Module:
        """A bias-free map (..., fan_in) -> (..., fan_out) with a parameter `weight`."""
        ...

    def head(self, d_model: int, vocab_size: int) -> nn.Module:
        """The same for an untied head, which FP8 leaves in its own precision."""
        ...

    def embedding(self, vocab_size: int, d_model: int) -> nn.Module:
        """A table (vocab_size, d_model), as the parameter `weight`; `logits` is its tied head."""
        ...

    def norm(self, d_model: int, eps: float) -> nn.Module:
        """An RMSNorm over the last dimension with a gain `weight` (d_model,)."""
        ...

    def multiplier(self, dims: int) -> Tensor:
        """A one, in a shape that broadcasts over a model's tensors of `dims` dimensions."""
        ...


class Linear(nn.Linear):
    """A bias-free linear layer whose initial values come from the table alone."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__(fan_in, fan_out, bias=False)

    def reset_parameters(self) -> None:
        """Nothing: `mutransfer.apply.initialize` draws the values."""


class Embedding(nn.Embedding):
    """A table (vocab_size, d_model) of embeddings that can be read backwards, as a tied head."""

    def logits(self, x: Tensor) -> Tensor:
        """Shapes: (..., d_model) -> (..., vocab_size)."""
        return F.linear(x, self.weight)


class RMSNorm(nn.Module):
    """x * gain / sqrt(mean(x^2) + eps) (1910.07467), in the gain's precision.

    Shapes: (..., d_model) -> (..., d_model).
    """

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes the last dimension."""
        y = F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps)
        return y.to(x.dtype)


class Plain:
    """Plain torch layers in the precision of their parameters."""

    def linear(self, fan_in: int, fan_out: int) -> nn.Module:
        """See `LayerSet.linear`."""
        return Linear(fan_in, fan_out)

    def head(self, d_model: int, vocab_size: int) -> nn.Module:
        """See `LayerSet.head`."""
        return Linear(d_model, vocab_size)

    def embedding(self, vocab_size: int, d_model: int) -> nn.Module:
        """See `LayerSet.embedding`."""
        return Embedding(vocab_size, d_model)

    def norm(self, d_model: int, eps: float) -> nn.Module:
        """See `LayerSet.norm`."""
        return RMSNorm(d_model, eps)

    def multiplier(self, dims: int) -> Tensor:
        """See `LayerSet.multiplier`."""
        return torch.ones(())
