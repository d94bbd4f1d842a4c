"""Values beyond the range of FP8, as the layers tell that compute in it.

Where wide models grow, their largest values leave a range that narrow ones fit into, and a
cast clamps them. A scale hides it: one from the tensor itself entirely, one from earlier steps
up to what a tensor grows in a step, none not at all.
"""

from __future__ import annotations

import math

import pandas as pd
import torch
from torch import nn

from mutransfer.coord_measure import Values, module_pattern

PARTS = ("inputs", "weights", "gradients")
"""What a linear layer casts; gradients are those of its output."""

OVERFLOWS = "amax grows with the {} faster than the scale follows"


@torch.no_grad()
def fp8_values(model: nn.Module) -> Values:
    """Share of entries that FP8 casts clamped, and their amax, in the worst layer of a pattern.

    Kinds are `overflow_` and `amax_` with each of `PARTS`, read off `fp8_overflow` and
    `fp8_amax` of any module that has them (see `coord_measure.Recorder`). What is NaN is left
    out, and the whole where no module has any.

    Args:
        model: The model, after a forward pass: gradients are those of the step before.
    """
    found: Values = {}
    for name, module in model.named_modules():
        for kind in ("overflow", "amax"):
            told = getattr(module, f"fp8_{kind}", {})
            for part in PARTS:
                value = float(told.get(part, math.nan))
                if not math.isnan(value):
                    key = (f"{kind}_{part}", module_pattern(name))
                    found[key] = max(value, found.get(key, 0.0))
    return found


def excess_over_smallest(points: pd.DataFrame) -> pd.Series:
    """By how much more of a tensor overflows than in the smallest models, at its worst step.

    What overflows at every width does so for another reason than the width: delayed scaling
    clamps what grows within a step, whatever the width, if the learning rate is high.

    Args:
        points: Share of entries that overflow, a row per width and seed, a column per step.

    Returns:
        The difference to the worst of the smallest models, by width and seed, 0 at least.
    """
    shares: pd.Series = points.max(axis=1)
    least = shares.index.get_level_values("width").min()
    return (shares - float(shares.loc[least].max())).clip(lower=0.0)
