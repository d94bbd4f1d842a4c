"""AdamW, Muon and the hand-over for many models of one shape, stepped together.

Every parameter has the models ("members") as its first dimension. Parameters of equal shape
become views of one block (members, parameters, *shape), so that a step is a few operations per
shape, whatever the number of members and layers. Every setting is a number per (member,
parameter): a member has its own learning rates, step count and hand-over.

The arithmetic is that of `torch.optim.AdamW(fused=True)` and `torch.optim.Muon`. Up to their
last line they are one: decay the value, move the first moment (Muon's momentum) towards the
gradient. Only the update differs, and a stack may hold members of both kinds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mutransfer.errors import UserError
from mutransfer.groups import param_groups
from mutransfer.newton_schulz import newton_schulz
from mutransfer.optimizers import Matrix, Momentum
from mutransfer.symbolic import muon_factor
from mutransfer.table import Table

_SETTINGS = ("lr", "weight_decay", "eps", "beta1", "beta2")
_MUON_SETTINGS = ("muon_lr", "muon_weight_decay", "momentum", "ratio")


@dataclass(kw_only=True)
class _Block:
    """Parameters of one shape, all hidden matrices or none.

    Attributes:
        names: Of the parameters.
        parameters: Views of `value`.
        columns: Their places among all parameters.
        hidden: Whether Muon may take them.
        value, first, second: (members, parameters, *shape); `first` is AdamW's first moment
            or Muon's momentum.
    """

    names: list[str]
    parameters: list[nn.Parameter]
    columns: slice
    hidden: bool
    value: Tensor
    first: Tensor
    second: Tensor

    def bind(self) -> None:
        """Makes the parameters views of `value`, without gradients."""
        for index, parameter in enumerate(self.parameters):
            parameter.grad = None
            parameter.data = self.value[:, index]

    def gradient(self) -> Tensor:
        """Shape (members, parameters, *shape)."""
        gradients = [parameter.grad for parameter in self.parameters]
        assert all(g is not None for g in gradients), f"no gradient in {self.names}"
        return torch.stack(gradients, 1) if len(gradients) > 1 else gradients[0][:, None]  # type: ignore[arg-type,index]


class StackedOptimizers:
    """What `Optimizers` is to one model, to a stack of them. Members are named by their row.

    Args:
        stack: Its parameters are (members, *shape). They become views of the blocks.
        like: One such model alone, for names and shapes; may live on the meta device.
        tables: A table per member.
        matrix: Which optimizer the hidden matrices start with.

    Attributes:
        steps: Steps that each member has taken, (members,).
        on_muon: Whether its hidden matrices are on Muon, (members,).
    """

    def __init__(
        self,
        stack: nn.Module,
        like: nn.Module,
        tables: Sequence[Table],
        matrix: Matrix = "adamw",
    ) -> None:
        self._like, self._matrix = like, matrix
        parameters = dict(stack.named_parameters())
        hidden = _names(param_groups(like, tables[0], "muon"))
        kinds: dict[tuple[bool, torch.Size], list[str]] = {}
        for fqn, parameter in like.named_parameters():
            kinds.setdefault((fqn in hidden, parameter.shape), []).append(fqn)
        self._blocks: list[_Block] = []
        self._columns: dict[str, int] = {}
        for (is_hidden, _), names in kinds.items():
            start = len(self._columns)
            self._columns.update({fqn: start + i for i, fqn in enumerate(names)})
            value = torch.stack([parameters[fqn].detach() for fqn in names], 1)
            block = _Block(
                names=names,
                parameters=[parameters[fqn] for fqn in names],
                columns=slice(start, start + len(names)),
                hidden=is_hidden,
                value=value,
                first=torch.zeros_like(value),
                second=torch.zeros_like(value),
            )
            block.bind()
            self._blocks.append(block)
        self._order = [self._columns[fqn] for fqn, _ in like.named_parameters()]
        members, n = len(tables), len(self._columns)
        self._settings = {
            name: np.zeros((members, n)) for name in (*_SETTINGS, *_MUON_SETTINGS)
        }  # peaks
        self._hidden = np.zeros(n, dtype=bool)
        for block in self._blocks:
            self._hidden[block.columns] = block.hidden
        self._factor = np.ones(members)
        self.steps = np.zeros(members, dtype=np.int64)
        self.on_muon = np.zeros(members, dtype=bool)
        for row, table in enumerate(tables):
            self.reset(row, table)

    def reset(self, row: int, table: Table) -> None:
        """Gives a row to a new member, which has taken no step; its weights are the caller's.

        Raises:
            UserError: Model and table do not match.
        """
        adamw, muon = (param_groups(self._like, table, kind) for kind in ("adamw", "muon"))
        hidden = {fqn for fqn, column in self._columns.items() if self._hidden[column]}
        if _names(muon) != hidden:
            raise UserError("members differ in their hidden matrices", where=table.parametrization,
                            got=sorted(_names(muon) ^ hidden))  # fmt: skip
        for group in adamw:
            values = (group["lr"], group["weight_decay"], group["eps"], *group["betas"])
            self._set(row, group, dict(zip(_SETTINGS, values, strict=True)))
        for group in muon:
            values = (group["lr"], group["weight_decay"], group["momentum"])
            self._set(row, group, dict(zip(_MUON_SETTINGS, values, strict=False)))
            for fqn, parameter in group["params"]:
                ratio = muon_factor(group, tuple(parameter.shape))
                self._settings["ratio"][row, self._columns[fqn]] = ratio
        for block in self._blocks:
            block.first[row].zero_()
            block.second[row].zero_()
        self.steps[row], self.on_muon[row] = 0, self._matrix == "muon"
        self._factor[row] = 1.0

    def set_lr(self, factor: float | Sequence[float]) -> None:
        """Sets every learning rate to this times its own peak: for all, or member by member."""
        self._factor[:] = factor

    def hand_over(self, rows: Sequence[int], momentum: Momentum = "seed") -> None:
        """Moves these members' hidden matrices from AdamW to Muon; see `Optimizers.hand_over`.

        Raises:
            UserError: They are on Muon already.
        """
        chosen = np.asarray(rows, dtype=np.int64)
        if self.on_muon[chosen].any():
            raise UserError("the hidden matrices are on Muon already",
                            cure="The hand-over happens once, at its declared step.")  # fmt: skip
        self.on_muon[chosen] = True
        if momentum == "fresh":
            for block in self._blocks:
                if block.hidden:
                    block.first[torch.from_numpy(chosen).to(block.first.device)] = 0.0

    @torch.no_grad()
    def step(self, clip_norm: float | None = None) -> None:
        """Takes one step of every member.

        Args:
            clip_norm: Clips each member's gradients at this global norm, in place.
        """
        gradients = [block.gradient() for block in self._blocks]
        if clip_norm is not None:
            _clip(gradients, clip_norm, self._order)
        self.steps += 1
        value = self._blocks[0].value
        numbers = torch.from_numpy(self._coefficients()).to(value.device, value.dtype)
        rows = torch.from_numpy(np.flatnonzero(self.on_muon)).to(value.device)
        for block, gradient in zip(self._blocks, gradients, strict=True):
            _update(
                block, gradient, numbers[:, :, block.columns], rows if block.hidden else rows[:0]
            )

    def zero_grad(self) -> None:
        """Drops all gradients."""
        for block in self._blocks:
            for parameter in block.parameters:
                parameter.grad = None

    def select(self, rows: Sequence[int]) -> None:
        """Makes a stack of these members, in this order; a row named twice is copied."""
        chosen = np.asarray(rows, dtype=np.int64)
        for block in self._blocks:
            index = torch.from_numpy(chosen).to(block.value.device)
            for name in ("value", "first", "second"):
                setattr(block, name, getattr(block, name).index_select(0, index))
            block.bind()
        self._settings = {name: values[chosen] for name, values in self._settings.items()}
        self._factor, self.steps = self._factor[chosen], self.steps[chosen]
        self.on_muon = self.on_muon[chosen]

    def state_tensors(self, row: int) -> dict[str, Tensor]:
        """A member's state under the names of `Optimizers.state_tensors`, which can load it.

        They are views of the live tensors; there are none before the first step.
        """
        tensors: dict[str, Tensor] = {}
        if self.steps[row]:
            for block in self._blocks:
                for index, fqn in enumerate(block.names):
                    first = block.first[row, index]
                    if block.hidden and self.on_muon[row]:
                        tensors[f"{fqn}/momentum_buffer"] = first
                        continue
                    tensors[f"{fqn}/exp_avg"] = first
                    tensors[f"{fqn}/exp_avg_sq"] = block.second[row, index]
                    tensors[f"{fqn}/step"] = torch.tensor(float(self.steps[row]))
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, row: int, tensors: Mapping[str, Tensor]) -> None:
        """Copies what `state_tensors` returned, here or of a single model, into a fresh row.

        Raises:
            UserError: A state is missing, too many, or of another shape, or step counts differ.
        """
        if not tensors:
            return
        on_muon = any(name.endswith("/momentum_buffer") for name in tensors)
        left, steps = set(tensors), set()
        for block in self._blocks:
            targets = {"exp_avg": block.first, "exp_avg_sq": block.second}
            if block.hidden and on_muon:
                targets = {"momentum_buffer": block.first}
            for index, fqn in enumerate(block.names):
                for key, target in targets.items():
                    name, place = f"{fqn}/{key}", target[row, index]
                    value = _take(tensors, name)
                    if value.shape != place.shape:
                        raise UserError(
                            "optimizer state has another shape",
                            where=name,
                            got=tuple(value.shape),
                            expected=tuple(place.shape),
                        )
                    place.copy_(value)
                    left.discard(name)
                if "exp_avg" in targets:
                    steps.add(float(_take(tensors, f"{fqn}/step")))
                    left.discard(f"{fqn}/step")
        if left:
            raise UserError("optimizer state belongs to another optimizer", got=sorted(left)[0])
        if len(steps) != 1:
            raise UserError("parameters of one model have taken different numbers of steps",
                            where="step", got=sorted(steps))  # fmt: skip
        self.steps[row], self.on_muon[row] = int(steps.pop()), on_muon

    def _set(self, row: int, group: dict[str, Any], values: dict[str, float]) -> None:
        columns = [self._columns[fqn] for fqn, _ in group["params"]]
        for name, value in values.items():
            self._settings[name][row, columns] = value

    def _coefficients(self) -> NDArray[np.float64]:
        """What `_update` multiplies by, in float64: (coefficient, member, parameter)."""
        s, factor, t = self._settings, self._factor[:, None], self.steps[:, None]
        muon = self.on_muon[:, None] & self._hidden
        lr = np.where(muon, s["muon_lr"], s["lr"]) * factor
        decay = np.where(muon, s["muon_weight_decay"], s["weight_decay"])
        return np.stack([
            1 - lr * decay,
            np.where(muon, 1 - s["momentum"], 1 - s["beta1"]),
            s["beta2"],
            1 - s["beta2"],
            np.sqrt(1 - s["beta2"] ** t),
            s["eps"],
            -lr / (1 - s["beta1"] ** t),
            s["momentum"],
            np.where(muon, -lr * s["ratio"], 1.0),
        ])  # fmt: skip


def _update(block: _Block, gradient: Tensor, numbers: Tensor, rows: Tensor) -> None:
    """One step of one block. Shapes: numbers (9, members, parameters); rows: those on Muon."""
    numbers = numbers[(..., *[None] * (gradient.dim() - 2))]
    keep, weight, beta2, rest2, root, eps, scale, momentum, factor = numbers
    block.value.mul_(keep)
    block.first.lerp_(gradient, weight)
    update = None
    if len(rows) < len(gradient):
        block.second.mul_(beta2).addcmul_(gradient * rest2, gradient)
        update = (block.first * scale).div_(_sqrt(block.second).div_(root).add_(eps))
    if len(rows):
        some = (gradient, block.first, momentum)
        nesterov = torch.lerp(*(some if update is None else (t[rows] for t in some)))
        turned = newton_schulz(nesterov.flatten(0, 1)).unflatten(0, nesterov.shape[:2])
        turned = turned.to(block.value.dtype)
        update = turned if update is None else update.index_copy_(0, rows, turned)
    assert update is not None
    block.value.addcmul_(update, factor)


def _sqrt(x: Tensor) -> Tensor:
    """Rounded as in the fused AdamW: on a CPU, `torch.sqrt` may be MKL's, which often is not."""
    return x.sqrt() if x.is_cuda else x.double().sqrt().to(x.dtype)


def _clip(gradients: list[Tensor], norm: float, order: list[int]) -> None:
    """`torch.nn.utils.clip_grad_norm_` per member. Shapes: (members, parameters, ...).

    Args:
        gradients: A tensor per block.
        norm: The largest norm that is left as it is.
        order: Columns in the order in which a single model adds up their norms.
    """
    norms = torch.cat([torch.linalg.vector_norm(g.flatten(2), dim=2) for g in gradients], 1)
    total = torch.linalg.vector_norm(norms[:, order], dim=1)
    factor = (norm / (total + 1e-6)).clamp(max=1.0)
    for g in gradients:
        g.mul_(factor[(..., *[None] * (g.dim() - 1))])


def _names(groups: list[dict[str, Any]]) -> set[str]:
    return {fqn for group in groups for fqn, _ in group["params"]}


def _take(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise UserError("optimizer state is missing", where=name,
                        cure="It was saved by another optimizer.")  # fmt: skip
    return tensors[name]
