"""Adam's epsilon against the gradients that it is added to, and the alignment of updates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mutransfer.coord_measure import Values, hooked, typical
from mutransfer.roles import MATRIX_ROLES
from mutransfer.table import Row


@torch.no_grad()
def eps_shares(optimizer: object, model: nn.Module, rows: Mapping[str, Row]) -> Values:
    """eps / sqrt(v-hat) per pattern, the median over the entries that have a gradient.

    Kind is `eps_share`. What has no second moment, as under Muon or before the first step, is
    left out; infinite where every gradient so far was zero.

    Args:
        optimizer: A torch optimizer, or anything that holds some as attributes.
        model: The model.
        rows: Its table's rows, by fully qualified name.
    """
    names: dict[Tensor, str] = {p: fqn for fqn, p in model.named_parameters()}
    found: dict[tuple[str, str], list[float]] = {}
    for inner in _torch_optimizers(optimizer):
        for group in inner.param_groups:
            for parameter in group["params"]:
                state: Mapping[str, Any] = inner.state.get(parameter, {})
                if parameter not in names or "exp_avg_sq" not in state:
                    continue
                corrected = 1 - float(group["betas"][1]) ** float(state["step"])
                median = _median_above_zero(state["exp_avg_sq"]) / corrected
                share = float(group["eps"]) / math.sqrt(median) if median else math.inf
                key = ("eps_share", rows[names[parameter]].pattern)
                found.setdefault(key, []).append(share)
    return typical(found)


def _torch_optimizers(optimizer: object) -> list[torch.optim.Optimizer]:
    inner = [optimizer, *getattr(optimizer, "__dict__", {}).values()]
    return [each for each in inner if isinstance(each, torch.optim.Optimizer)]


def _median_above_zero(second: Tensor) -> float:
    """The lower median of the entries above zero; zero if there are none.

    By numpy's partition: torch's median, with the selection before it, takes twice as long.
    """
    entries = second.float().flatten().numpy(force=True)
    alive = int((entries > 0).sum())
    if not alive:
        return 0.0
    place = int((entries == 0).sum()) + (alive - 1) // 2  # zeros come first, NaN last
    return float(np.partition(entries, place)[place])


class Alignment:
    """Watches how much of an update the activations meet: |dW x| / (|dW|_F |x|).

    Kind is `alignment`, per pattern of a hidden matrix. 1 if all rows of dW and all inputs are
    along one direction, about fan_in^-1/2 if they know nothing of each other. Under AdamW it is
    why the RMS-operator norm of a right update may fall with the width, by -1/2 at most.
    Source: 2407.05872, where it decides the right exponent of the learning rate.

    Args:
        model: The model; it carries hooks only inside `watch`.
        first: Its weights at t = 0, by fully qualified name.
        rows: Its table's rows, likewise.
    """

    def __init__(
        self, model: nn.Module, first: Mapping[str, Tensor], rows: Mapping[str, Row]
    ) -> None:
        self._layers = []
        for fqn, row in rows.items():
            parent, _, leaf = fqn.rpartition(".")
            if row.role in MATRIX_ROLES and leaf == "weight":
                self._layers.append((model.get_submodule(parent), first[fqn], row.pattern))

    @contextmanager
    def watch(self) -> Iterator[Values]:
        """Collects from the forward passes inside; the values are there afterwards.

        Nothing is collected of layers that have not moved yet.
        """
        found: dict[tuple[str, str], list[float]] = {}

        def hook_of(first: Tensor, pattern: str) -> Any:
            @torch.no_grad()
            def hook(module: Any, inputs: tuple[Tensor, ...], output: object) -> None:
                if not inputs:  # called by keyword
                    return
                x, change = inputs[0].float(), module.weight.float() - first.float()
                if x.shape[-1] != change.shape[-1]:
                    return
                whole = float(change.norm() * x.norm())
                if whole != 0:
                    with torch.autocast(x.device.type, enabled=False):  # the model may be under it
                        moved = float(torch.nn.functional.linear(x, change).norm())
                    found.setdefault(("alignment", pattern), []).append(moved / whole)

            return hook

        values: Values = {}
        with hooked((layer, hook_of(first, pattern)) for layer, first, pattern in self._layers):
            yield values
        values.update(typical(found))
