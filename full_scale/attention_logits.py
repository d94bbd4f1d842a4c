"""The largest attention logit of a pass: what grows first where training without QK-norm fails.

Exact over all pairs that attention sees, at the cost of one more product of queries and keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from proxies.decoder import Attend

_ROWS = 512  # queries whose logits exist at a time


class Largest:
    """What was seen so far; `None` before any pass."""

    value: Tensor | None = None

    @torch.no_grad()
    def see(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """A hook before `Attend`; see there for the shapes."""
        q, k = inputs[:2]
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3)
        for start in range(0, q.shape[-2], _ROWS):
            rows = q[..., start : start + _ROWS, :]
            logits = rows @ k[..., : start + rows.shape[-2], :].transpose(-2, -1)
            future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device)
            logits.masked_fill_(future.triu(start + 1), -torch.inf)
            most = logits.amax().float()
            self.value = most if self.value is None else torch.maximum(self.value, most)


@contextmanager
def watched(model: nn.Module, wanted: bool = True) -> Iterator[Largest]:
    """Watches every attention of the forward passes within; nothing where it is not `wanted`."""
    seen = Largest()
    handles = [
        module.register_forward_pre_hook(seen.see)
        for module in model.modules()
        if wanted and isinstance(module, Attend)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
