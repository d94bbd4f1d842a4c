"""What a coordinate check measures: one pass with forward hooks collects everything.

Layers of one pattern pool: a value is the root mean square over layers, elements and tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mutransfer.errors import UserError
from mutransfer.roles import MATRIX_ROLES, pattern_of
from mutransfer.table import Row

Values = dict[tuple[str, str], float]
"""(kind, name) -> value, at one step of one model."""

PROJECTIONS = 65536
"""Elements of a stored output are compared in full up to any size; see `Recorder`."""


def module_pattern(name: str) -> str:
    """`name` of a module with every layer index, a trailing one included, replaced by `*`."""
    return pattern_of(f"{name}.")[:-1]


def first_tensor(output: object) -> Tensor | None:
    """The tensor that a module's output is about: itself, its `logits`, or its first part."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(output, tuple | list) and output:
        return first_tensor(output[0])
    return None


def attention_logits(q: Tensor, k: Tensor) -> Tensor:
    """Pre-softmax logits of the causal part.

    Shapes: q (..., n_heads, seq, head_dim), k (..., n_kv_heads, seq, head_dim) ->
    (..., n_heads, seq * (seq + 1) / 2).
    """
    k = k.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3)
    seq = q.shape[-2]
    causal = torch.ones(seq, seq, dtype=torch.bool, device=q.device).tril()
    return (q.float() @ k.float().transpose(-2, -1))[..., causal]


class Recorder:
    """Watches one model: outputs of its modules, and how far they are from those at t = 0.

    Args:
        model: The model; hooks are attached for the time of `watch`.
        rows: The table's rows by fully qualified name.
        tokens: Ids that the model reads (batch, seq), for the logits of a position's own
            token; `None` where the model has no tied logits to tell apart.

    Raises:
        UserError: The model is compiled, so that hooks would not see its modules.
    """

    def __init__(self, model: nn.Module, rows: dict[str, Row], tokens: Tensor | None) -> None:
        if hasattr(model, "_orig_mod"):
            raise UserError("the model is compiled, so hooks cannot see its modules",
                            where=type(model).__name__,
                            cure="Return the model before torch.compile from the factory.")  # fmt: skip
        self._model, self._tokens = model, tokens
        heads = {fqn.rpartition(".")[0] for fqn, row in rows.items() if row.role == "head"}
        self._blocks = {
            f"{name}.{index}" if name else index
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList)
            for index, block in module.named_children()
            if next(block.children(), None) is not None
        }
        self._leaves = {
            name
            for name, module in model.named_modules()
            if name and name not in heads and next(module.parameters(recurse=False), None) is not None
        }
        self._first: dict[tuple[str, str, int], Tensor] = {}
        self._calls: dict[str, int] = {}
        self._squares: dict[tuple[str, str], list[float]] = {}
        self.head_dim: int | None = None

    @contextmanager
    def watch(self) -> Iterator[Values]:
        """Collects every module output of the forward pass inside; the values are there after."""
        self._calls, self._squares = {}, {}
        handles = []
        for name, module in self._model.named_modules():
            hook = self._hook(name, module)
            if hook is not None:
                handles.append(module.register_forward_hook(hook))
        values: Values = {}
        try:
            yield values
        finally:
            for handle in handles:
                handle.remove()
        for key, squares in self._squares.items():
            values[key] = math.sqrt(sum(squares) / len(squares))

    def _hook(self, name: str, module: nn.Module) -> Callable[..., None] | None:
        core = type(module).__name__ == "Attend" or getattr(module, "is_attention_core", False)

        def hook(module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
            with torch.no_grad():
                if core:
                    q, k = inputs[0], inputs[1]
                    self.head_dim = q.shape[-1]
                    self._add("attention logits", name, attention_logits(q, k), std=True)
                elif (x := first_tensor(output)) is not None:
                    if not name:
                        self._logits(x)
                    else:
                        self._add("residual" if name in self._blocks else "activation", name, x)

        watched = core or not name or name in self._blocks or name in self._leaves
        return hook if watched else None

    def _logits(self, logits: Tensor) -> None:
        self._add("logits", "logits", logits)
        if self._tokens is None:
            return
        if self._tokens.shape != logits.shape[:-1]:
            raise UserError("tokens do not belong to the logits", where="Trainable.tokens",
                            got=tuple(self._tokens.shape), expected=tuple(logits.shape[:-1]),
                            cure="Give the ids that the model reads, without the targets.")  # fmt: skip
        own = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
        own.scatter_(-1, self._tokens.unsqueeze(-1), True)
        self._add("logits", "self-token logits", logits[own])
        self._add("logits", "other-token logits", logits[~own])

    def _add(self, kind: str, name: str, x: Tensor, *, std: bool = False) -> None:
        """Adds the mean square of `x` and of its change; a module's n-th call is its own entry."""
        call = self._calls[f"{kind} {name}"] = self._calls.get(f"{kind} {name}", 0) + 1
        pattern = module_pattern(name) + (f" (call {call})" if call > 1 else "")
        x = x.float()
        square = float(x.var(correction=0) if std else x.square().mean())
        self._squares.setdefault((kind, pattern), []).append(square)
        first = self._first.get((kind, name, call))
        if first is None:
            self._first[kind, name, call] = x.clone()
        else:
            change = float((x - first).square().mean())
            self._squares.setdefault((f"change of {kind}", pattern), []).append(change)


def operator_norm(matrix: Tensor) -> float:
    """RMS-operator norm sqrt(fan_in/fan_out) * sigma_max of (fan_out, fan_in).

    Equation 1 of 2310.17813 (a spectral condition for feature learning). The largest
    singular value is the root of the smaller Gram matrix's largest eigenvalue.
    """
    fan_out, fan_in = matrix.shape
    tall = matrix.double() if fan_out >= fan_in else matrix.double().T
    largest = torch.linalg.eigvalsh(tall.T @ tall)[-1].clamp_min(0)
    return math.sqrt(float(largest) * fan_in / fan_out)


@torch.no_grad()
def weight_values(model: nn.Module, first: dict[str, Tensor], rows: dict[str, Row]) -> Values:
    """RMS of every weight, and of its change against `first`, by pattern.

    Hidden matrices also have the RMS-operator norm of their change.
    """
    squares: dict[tuple[str, str], list[float]] = {}
    for fqn, parameter in model.named_parameters():
        weight, pattern = parameter.float(), pattern_of(fqn)
        change = weight - first[fqn].float()
        found = {"weight": float(weight.square().mean()), "update": float(change.square().mean())}
        if rows[fqn].role in MATRIX_ROLES:
            found["update norm"] = operator_norm(change) ** 2
        for kind, square in found.items():
            squares.setdefault((kind, pattern), []).append(square)
    return {key: math.sqrt(sum(values) / len(values)) for key, values in squares.items()}
