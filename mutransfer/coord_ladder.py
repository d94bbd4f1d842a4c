"""How the models of a coordinate check grow from one rung to the next, and that they do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise

from torch import nn

from mutransfer.coord_expect import Axis, Ladder
from mutransfer.errors import UserError
from mutransfer.table import Table


class Rung:
    """What is left of a trained model for the ladder: roles, shapes, names, optimizer."""

    def __init__(
        self,
        model: nn.Module,
        table: Table,
        optimizer: str,
        tokens: bool,
        head_dim: int | None,
        trained: int = 0,
    ) -> None:
        self.roles = {row.pattern: row.role for row in table.rows}
        self.shapes = {row.pattern: row.shape for row in table.rows}
        self.parameters = {fqn for fqn, _ in model.named_parameters()}
        self.optimizer, self.tokens, self.head_dim = optimizer, tokens, head_dim or 1
        self.trained = trained


def make_ladder(rungs: Mapping[int, Rung], axis: Axis) -> Ladder:
    """How the models grow, from the smallest to the largest.

    Args:
        rungs: The models by width, or by depth.
        axis: Which of the two.

    Raises:
        UserError: They are not the same model at several widths, or several depths.
    """
    small, large = rungs[min(rungs)], rungs[max(rungs)]
    same = ["roles", "parameters", "optimizer", "tokens", "trained"]
    if axis == "depth":
        same = ["roles", "shapes", "optimizer", "tokens", "head_dim", "trained"]
    for size, rung in rungs.items():
        for what in same:
            if getattr(rung, what) != getattr(small, what):
                raise UserError(f"the factory's models differ in more than {axis}", where=what,
                                got=f"another at {axis} {size} than at {min(rungs)}",
                                expected=f"the same at every {axis}")  # fmt: skip
    grown = (
        large.shapes != small.shapes if axis == "width" else _grows(rungs[r] for r in sorted(rungs))
    )
    if not grown:
        alike = "shapes" if axis == "width" else "numbers of parameters"
        raise UserError(f"the factory's models do not grow with the {axis}", where="factory",
                        got=f"equal {alike} at {min(rungs)} and {max(rungs)}",
                        cure=f"Build the model that ({axis}, seed) asks for.")  # fmt: skip

    def exponent(low: float, high: float) -> float:
        return math.log(high / low) / math.log(max(rungs) / min(rungs))

    return Ladder(
        axis=axis,
        optimizer=small.optimizer,
        roles=small.roles,
        fan_in={name: exponent(s[-1], large.shapes[name][-1]) for name, s in small.shapes.items()},
        fan_out={name: exponent(s[0], large.shapes[name][0]) for name, s in small.shapes.items()},
        head_dim=exponent(small.head_dim, large.head_dim),
        tokens=small.tokens,
        trained=small.trained,
    )


def _grows(rungs: Iterable[Rung]) -> bool:
    counts = [len(rung.parameters) for rung in rungs]
    return all(low < high for low, high in pairwise(counts))
