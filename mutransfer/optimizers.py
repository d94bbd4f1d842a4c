"""AdamW, Muon and the hand-over from one to the other, over the groups of a table.

The hidden matrices and everything else live in two optimizers from the first step on, so
the hand-over replaces one of them and cannot disturb the other's moments or step count.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon

from mutransfer.errors import UserError
from mutransfer.groups import param_groups
from mutransfer.schedule import set_lr
from mutransfer.table import Table

Matrix = Literal["adamw", "muon"]
Momentum = Literal["seed", "fresh"]

_ADAMW_STATE = ("exp_avg", "exp_avg_sq", "step")
_MUON_STATE = ("momentum_buffer",)


class Optimizers:
    """The optimizer of the hidden matrices beside the AdamW of everything else.

    Args:
        model: The model to train.
        table: Its table.
        matrix: Which optimizer the hidden matrices start with.

    Attributes:
        aux: AdamW over embeddings, heads, gains and biases.
        matrix: AdamW or Muon over the hidden matrices.
    """

    def __init__(self, model: nn.Module, table: Table, matrix: Matrix = "adamw") -> None:
        self._model, self._table = model, table
        self.aux = _adamw(param_groups(model, table, "adamw_aux"))
        if matrix == "muon":
            self.matrix: AdamW | Muon = self._muon()
        else:
            hidden = {name for group in self._muon_groups() for name, _ in group["params"]}
            groups = param_groups(model, table, "adamw")
            for group in groups:
                group["params"] = [pair for pair in group["params"] if pair[0] in hidden]
            self.matrix = _adamw([group for group in groups if group["params"]])

    @property
    def kind(self) -> Matrix:
        """Which optimizer the hidden matrices have now."""
        return "muon" if isinstance(self.matrix, Muon) else "adamw"

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Every parameter group, for logging and schedules."""
        return [*self.aux.param_groups, *self.matrix.param_groups]

    def set_lr(self, factor: float) -> None:
        """Sets every group's learning rate to `factor` times its own peak."""
        set_lr(self.groups, factor)

    def step(self) -> None:
        """Takes one step of both."""
        self.aux.step()
        self.matrix.step()

    def zero_grad(self) -> None:
        """Drops all gradients."""
        self.aux.zero_grad(set_to_none=True)
        self.matrix.zero_grad(set_to_none=True)

    def hand_over(self, momentum: Momentum = "seed") -> None:
        """Moves the hidden matrices from AdamW to Muon; everything else stays as it is.

        The new groups stand at their peak learning rates until the next `set_lr`.

        Args:
            momentum: `seed` starts Muon's momentum from AdamW's first moment, which is an
                average of gradients of the same form (Newton-Schulz ignores its scale);
                `fresh` starts it at zero.

        Raises:
            UserError: The hidden matrices are on Muon already.
        """
        if isinstance(self.matrix, Muon):
            raise UserError("the hidden matrices are on Muon already",
                            cure="The hand-over happens once, at its declared step.")  # fmt: skip
        first = {p: state["exp_avg"] for p, state in self.matrix.state.items() if state}
        self.matrix = self._muon()
        for group in self.matrix.param_groups:
            for p in group["params"]:
                seeded = momentum == "seed" and p in first
                buffer = first[p] if seeded else torch.zeros_like(p)
                self.matrix.state[p]["momentum_buffer"] = buffer

    def state_tensors(self) -> dict[str, Tensor]:
        """The whole state, by `<fully qualified name>/<state>`: the live tensors, not copies.

        There is none before the first step.
        """
        names: dict[Tensor, str] = {p: fqn for fqn, p in self._model.named_parameters()}
        return {
            f"{names[p]}/{key}": value
            for optimizer in (self.aux, self.matrix)
            for p, state in optimizer.state.items()
            for key, value in state.items()
        }

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Copies what `state_tensors` returned into the same kind of optimizer.

        Raises:
            UserError: A state is missing, of another optimizer, or of another shape.
        """
        names: dict[Tensor, str] = {p: fqn for fqn, p in self._model.named_parameters()}
        left = set(tensors)
        for optimizer in (self.aux, self.matrix):
            keys = _MUON_STATE if isinstance(optimizer, Muon) else _ADAMW_STATE
            for group in optimizer.param_groups:
                for p in group["params"]:
                    for key in keys:
                        name = f"{names[p]}/{key}"
                        if name not in tensors:
                            raise UserError("optimizer state is missing", where=name,
                                            cure="It was saved by another optimizer.")  # fmt: skip
                        value, shape = tensors[name], () if key == "step" else tuple(p.shape)
                        if value.shape != shape:
                            raise UserError("optimizer state has another shape", where=name,
                                            got=tuple(value.shape), expected=shape)  # fmt: skip
                        dtype = torch.float32 if key == "step" else p.dtype
                        optimizer.state[p][key] = value.to(p.device, dtype, copy=True)
                        left.discard(name)
        if left:
            raise UserError("optimizer state belongs to another optimizer", got=sorted(left)[0])

    def _muon_groups(self) -> list[dict[str, Any]]:
        return param_groups(self._model, self._table, "muon")

    def _muon(self) -> Muon:
        return Muon(self._muon_groups(), nesterov=True)


def _adamw(groups: list[dict[str, Any]]) -> AdamW:
    return AdamW(groups, fused=True)
