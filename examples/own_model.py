"""A model of your own: an n-gram language model, with the role of each of its parameters."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mutransfer.roles import Role
from mutransfer.table import Multipliers


class NextByte(nn.Module):
    """Predicts a byte from the bytes before it: their embeddings, mixed, then residual MLPs."""

    def __init__(self, *, width: int, context: int, n_layers: int) -> None:
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(256, width)
        self.mix = nn.Linear(context * width, width, bias=False)
        self.up = nn.ModuleList(nn.Linear(width, 4 * width, bias=False) for _ in range(n_layers))
        self.down = nn.ModuleList(nn.Linear(4 * width, width, bias=False) for _ in range(n_layers))
        self.head = nn.Linear(width, 256, bias=False)

    def set_multipliers(self, multipliers: Multipliers) -> None:
        """Takes the factors of the forward pass from the table."""
        self.multipliers = multipliers

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits. Shapes: tokens (batch, context) -> (batch, 256)."""
        x = self.mix((self.embedding(tokens) * self.multipliers.embedding).flatten(-2))
        for up, down in zip(self.up, self.down, strict=True):
            hidden = F.silu(up(F.rms_norm(x, x.shape[-1:])))
            x = x + self.multipliers.residual * down(hidden)
        logits: Tensor = self.head(F.rms_norm(x, x.shape[-1:]) * self.multipliers.output)
        return logits


def role(name: str, shape: tuple[int, ...]) -> Role:
    """What each parameter is for; `parametrize` asks this when the bundle is made."""
    kinds: dict[str, Role] = {"embedding": "embedding", "head": "head", "down": "hidden_out"}
    return kinds.get(name.partition(".")[0], "hidden")
