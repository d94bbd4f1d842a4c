"""Newton-Schulz for many matrices at once, with the bits of `torch.optim.Muon`'s for one."""

from __future__ import annotations

import torch
from torch import Tensor

_A, _B, _C, _STEPS, _EPS = 3.4445, -4.7750, 2.0315, 5, 1e-7  # torch.optim.Muon's


def newton_schulz(updates: Tensor) -> Tensor:
    """`torch.optim.Muon`'s orthogonalization of many matrices, in bfloat16 as there.

    Shapes: (n, fan_out, fan_in) -> the same, bfloat16.
    """
    x = updates.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=_EPS)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if tall else x
