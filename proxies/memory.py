"""Trading arithmetic for memory in a pass: logits in chunks, blocks computed twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a pass computes again in its backward half rather than keep.

    Attributes:
        loss_chunk: Tokens whose logits exist at a time; `None`: those of all tokens at once.
        recompute: Whether blocks keep their input alone.
    """

    loss_chunk: int | None = None
    recompute: bool = False


def twice(run: Callable[..., Tensor], *args: object) -> Tensor:
    """`run(...)`, keeping its arguments alone: the backward pass begins by running it again."""
    # nothing in a pass is random, so there is no generator to rewind
    result: Tensor = checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)
    return result


def chunked_loss(
    state: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, chunk: int
) -> Tensor:
    """Mean cross-entropy in nats, in fp32 at least; logits of `chunk` tokens exist at a time.

    Costs one more product with the head: its logits are computed again in the backward pass.

    Shapes: state (..., d_model), targets (...) -> scalar.
    """
    parts = zip(state.flatten(0, -2).split(chunk), targets.flatten().split(chunk), strict=True)
    total = torch.zeros((), dtype=wide(state.dtype), device=state.device)
    for x, target in parts:
        total = total + twice(_sum_of_losses, x, head, target)
    return total / targets.numel()


def wide(dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or fp32 where that is wider."""
    return torch.promote_types(dtype, torch.float32)


def _sum_of_losses(x: Tensor, head: Callable[[Tensor], Tensor], target: Tensor) -> Tensor:
    logits = head(x)
    return F.cross_entropy(logits.to(wide(logits.dtype)), target, reduction="sum")
