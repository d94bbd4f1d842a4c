"""Stacked layers: many models of one shape in one program, for `proxies.population`.

Every tensor has the models ("members") as its first dimension and every operation keeps them
apart: weights are (members, fan_out, fan_in) and activations (members, batch, seq, features).
The products are batched ones; no layer loops over members, and how many there are is read off
the weights, so that members can come and go.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _apply(weight: Tensor, x: Tensor) -> Tensor:
    """Shapes: weight (members, fan_out, fan_in), x (members, ..., fan_in) -> (..., fan_out)."""
    out: Tensor = torch.bmm(x.flatten(1, -2), weight.mT).unflatten(1, x.shape[1:-1])
    return out


class StackedLinear(nn.Module):
    """A bias-free linear layer per member. Shapes: (members, ..., fan_in) -> (..., fan_out)."""

    def __init__(self, members: int, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(members, fan_out, fan_in))

    def forward(self, x: Tensor) -> Tensor:
        """Every member's own map."""
        return _apply(self.weight, x)


class StackedEmbedding(nn.Module):
    """A table per member, `weight` (members, vocab_size, d_model); ids must be below vocab_size.

    Shapes: (members, batch, seq), or (batch, seq) for all -> (members, batch, seq, d_model).
    """

    def __init__(self, members: int, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(members, vocab_size, d_model))

    def forward(self, tokens: Tensor) -> Tensor:
        """Looks ids up in one table of all, in which each member's begins at an offset."""
        members, vocab_size, _ = self.weight.shape
        offsets = torch.arange(0, members * vocab_size, vocab_size, device=tokens.device)
        return F.embedding(tokens + offsets[:, None, None], self.weight.flatten(0, 1))

    def logits(self, x: Tensor) -> Tensor:
        """The tied head. Shapes: (members, ..., d_model) -> (members, ..., vocab_size)."""
        return _apply(self.weight, x)


class StackedRMSNorm(nn.Module):
    """`proxies.layers.RMSNorm` with gains (members, d_model).

    Shapes: (members, batch, seq, d_model) -> the same.
    """

    def __init__(self, members: int, d_model: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(members, d_model))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes the last dimension."""
        y = F.rms_norm(x.to(self.weight.dtype), self.weight.shape[-1:], None, self.eps)
        return (y * self.weight[:, None, None]).to(x.dtype)


class Stacked:
    """A layer set that makes one decoder out of many.

    Its `losses`, not its `loss`, are what to train: their sum has every member's own gradient.

    Args:
        members: How many models; it may change later (`proxies.population`).
    """

    def __init__(self, members: int) -> None:
        self.members = members

    def linear(self, fan_in: int, fan_out: int) -> nn.Module:
        """See `proxies.layers.LayerSet.linear`."""
        return StackedLinear(self.members, fan_in, fan_out)

    def head(self, d_model: int, vocab_size: int) -> nn.Module:
        """See `proxies.layers.LayerSet.head`."""
        return StackedLinear(self.members, d_model, vocab_size)

    def embedding(self, vocab_size: int, d_model: int) -> nn.Module:
        """See `proxies.layers.LayerSet.embedding`."""
        return StackedEmbedding(self.members, vocab_size, d_model)

    def norm(self, d_model: int, eps: float) -> nn.Module:
        """See `proxies.layers.LayerSet.norm`."""
        return StackedRMSNorm(self.members, d_model, eps)

    def multiplier(self, dims: int) -> Tensor:
        """See `proxies.layers.LayerSet.multiplier`: (members, 1, ..., 1)."""
        return torch.ones(self.members, *[1] * dims)
