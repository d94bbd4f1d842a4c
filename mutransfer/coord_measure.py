"""What a coordinate check measures: hooks on one forward pass collect everything at once.

Layers of one pattern pool into one value, the geometric mean over layers of the root mean
square: the typical layer, whatever a single one does; zero where any layer's is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mutransfer.errors import UserError
from mutransfer.modules import module_roles
from mutransfer.roles import MATRIX_ROLES, pattern_of
from mutransfer.table import Row, Table

Values = dict[tuple[str, str], float]
"""(kind, name) -> value, of one model at one step."""


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    """Carries forward hooks for as long as the body runs."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Recorder:
    """Watches one model: outputs of its modules, and how far they are from the first ones.

    Kinds are `activation` (modules that own parameters, the head aside), `residual` (blocks
    of a ModuleList), `attention_logits` (before the softmax, standard deviation over the
    causal part), `logits`, and `delta_` each: the change on the same batch.

    Models of several depths are watched at equal relative depths, as the stream changes along
    it: the middle block alone, and the stream after the last one. `branch` is what the middle
    block adds to the stream.

    A module may be told apart by an attribute: `is_attention_core` is true of one that takes
    scaled queries and keys as its first two arguments; `fp8_overflow` and `fp8_amax` belong to
    one that computes in FP8, and `coord_overflow.fp8_values` reads them.

    Args:
        model: The model; it carries hooks only inside `watch`.
        table: The model's table, which tells its head.
        tokens: Ids that the model reads (batch, seq), to tell the logits of a position's own
            token from the others; `None` leaves them together.
        depth: Whether models of several depths are compared.

    Attributes:
        head_dim: Size of an attention head; `None` until an attention core was watched.
        stacks: Names of the blocks, by ModuleList.

    Raises:
        UserError: The model is, or holds, a module that `torch.compile` returned.
    """

    def __init__(
        self,
        model: nn.Module,
        table: Table,
        tokens: Tensor | None = None,
        *,
        depth: bool = False,
    ) -> None:
        for name, module in model.named_modules():
            if hasattr(module, "_orig_mod"):
                raise UserError(
                    "the model is compiled, so that its parameters have other names",
                    where=f"Trainable.model.{name}".rstrip("."),
                    got=type(module).__name__,
                    cure="Return the model as it was before torch.compile; loss() may run the "
                    "compiled one. Or compile in place: module.compile().",
                )
        self.head_dim: int | None = None
        self._model, self._tokens, self._depth = model, tokens, depth
        roles = module_roles(model, table)
        self._heads = {name for name, role in roles.items() if role == "head"}
        self.stacks = stacks = [
            [f"{name}.{index}" if name else index for index, block in module.named_children()
             if next(block.children(), None) is not None]
            for name, module in model.named_modules() if isinstance(module, nn.ModuleList)
        ]  # fmt: skip
        self._blocks = {block for stack in stacks for block in stack}
        self._last = {stack[-1] for stack in stacks if stack}
        middle = {stack[len(stack) // 2] for stack in stacks if stack}
        self._aside = self._blocks - middle if depth else set()
        self._first: dict[tuple[str, str], Tensor] = {}
        self._calls: dict[tuple[str, str], int] = {}
        self._seen: set[tuple[str, str]] = set()
        self._found: dict[tuple[str, str], list[float]] = {}

    @contextmanager
    def watch(self) -> Iterator[Values]:
        """Collects from the forward passes inside; the values are there afterwards.

        The first `watch` keeps the outputs that later ones are compared with. What is compiled
        runs eagerly inside: compiled code ignores hooks that it was not traced with.

        Raises:
            UserError: No module of the model ran, or fewer than in an earlier pass.
        """
        self._calls, self._seen, self._found = {}, set(), {}
        named = ((self._hook(name, module), module) for name, module in self._model.named_modules())
        values: Values = {}
        hooks = hooked((module, hook) for hook, module in named if hook is not None)
        with hooks, torch.compiler.set_stance("force_eager"):
            yield values
        lost = [name for kind, name in self._first if (kind, name) not in self._seen]
        if lost or not self._seen:
            raise UserError(
                f"loss() ran {'less' if self._seen else 'nothing'} of the model that can be seen",
                where="Trainable.loss",
                got=f"{len(self._seen)} outputs" + (f", without {lost[0]}" if lost else ""),
                expected=f"{len(self._first)}, as before" if lost else "some",
                cure="Let it run Trainable.model itself, all of it in every call, and no copy, "
                "export or script of it.",
            )
        values.update(typical(self._found))

    def _hook(self, name: str, module: nn.Module) -> Callable[..., None] | None:
        """What to do with the output of one module; `None` where nothing is to be seen."""
        if not name:
            return self._see(lambda _, output: self._logits(output))
        if any(name.startswith(f"{block}.") for block in self._aside):
            return None
        if type(module).__name__ == "Attend" or getattr(module, "is_attention_core", False):
            return self._see(lambda inputs, _: self._attention(name, inputs))
        if name in self._blocks and not (self._depth and name in self._aside - self._last):
            return self._see(lambda inputs, output: self._block(name, inputs, output))
        if name not in self._heads and next(module.parameters(recurse=False), None) is not None:
            return self._see(lambda _, output: self._add("activation", name, output))
        return None

    @staticmethod
    def _see(look: Callable[[Any, Tensor], None]) -> Callable[..., None]:
        @torch.no_grad()
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
            if (tensor := _tensor(output)) is not None:
                with torch.autocast(tensor.device.type, enabled=False):  # the model may be under it
                    look(inputs, tensor)

        return hook

    def _attention(self, name: str, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs) < 2:
            raise UserError("an attention core takes q and k as its first two arguments",
                            where=name, got=f"{len(inputs)} arguments by position")  # fmt: skip
        q, k = inputs[:2]
        self.head_dim = q.shape[-1]
        self._add("attention_logits", name, causal_logits(q, k))

    def _block(self, name: str, inputs: tuple[Any, ...], output: Tensor) -> None:
        if not self._depth or name in self._last:
            self._add("residual", name, output)
        stream = _tensor(inputs)
        if self._depth and name not in self._aside and stream is not None:
            self._add("branch", name, output.float() - stream.float())

    def _logits(self, logits: Tensor) -> None:
        self._add("logits", "logits", logits)
        if self._tokens is None:
            return
        if self._tokens.shape != logits.shape[:-1]:
            raise UserError("tokens do not belong to the logits", where="Trainable.tokens",
                            got=tuple(self._tokens.shape), expected=tuple(logits.shape[:-1]),
                            cure="Give the ids that the model reads.")  # fmt: skip
        own = torch.zeros_like(logits, dtype=torch.bool)
        own.scatter_(-1, self._tokens.unsqueeze(-1), True)
        self._add("logits", "self-token logits", logits.masked_select(own))
        self._add("logits", "other-token logits", logits.masked_select(~own))

    def _add(self, kind: str, name: str, x: Tensor) -> None:
        """Adds one output, and its change; the n-th call of a reused module stands for itself."""
        call = self._calls[kind, name] = self._calls.get((kind, name), 0) + 1
        suffix = f" (call {call})" if call > 1 else ""
        pattern, x = module_pattern(name) + suffix, x.float()
        square = x.var(correction=0) if kind == "attention_logits" else x.square().mean()
        self._found.setdefault((kind, pattern), []).append(math.sqrt(float(square)))
        key = (kind, name + suffix)
        self._seen.add(key)
        if key not in self._first:
            self._first[key] = x.clone()
            return
        first = self._first[key]
        if first.shape != x.shape:
            raise UserError("output changes its shape between steps", where=name,
                            got=tuple(x.shape), expected=tuple(first.shape),
                            cure="loss() must run the model on one fixed batch.")  # fmt: skip
        change = math.sqrt(float((x - first).square().mean()))
        self._found.setdefault((f"delta_{kind}", pattern), []).append(change)


def _tensor(output: object) -> Tensor | None:
    """The tensor that an output is about: itself, its `logits`, or its first part."""
    if isinstance(output, Tensor):
        return output
    if isinstance(logits := getattr(output, "logits", None), Tensor):
        return logits
    return _tensor(output[0]) if isinstance(output, tuple | list) and output else None


def module_pattern(name: str) -> str:
    """`name` of a module with every layer index, the last part included, replaced by `*`."""
    return pattern_of(f"{name}.")[:-1]


def causal_logits(q: Tensor, k: Tensor) -> Tensor:
    """Logits before the softmax, of the pairs that causal attention sees.

    Shapes: q (..., n_heads, seq, head_dim), scaled, and k (..., n_kv_heads, seq, head_dim) ->
    (..., n_heads, seq * (seq + 1) / 2).
    """
    k = k.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3)
    logits = q.float() @ k.float().transpose(-2, -1)
    return logits[..., torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()]


def operator_norm(matrix: Tensor) -> float:
    """RMS-operator norm sqrt(fan_in/fan_out) * sigma_max of a (fan_out, fan_in) matrix.

    The norm that 2310.17813 holds constant in width. sigma_max is the root of the largest
    eigenvalue of the smaller Gram matrix, at the cost of its side cubed. That eigenvalue is exact
    to fp32's rounding, whatever the others are; entries over the largest one keep it in range.
    """
    fan_out, fan_in = matrix.shape
    peak = float(matrix.abs().max())
    if not math.isfinite(peak):
        return math.inf
    if not peak:
        return 0.0
    tall = (matrix if fan_out >= fan_in else matrix.T).float() / peak
    try:
        largest = float(torch.linalg.eigvalsh(tall.T @ tall)[-1])
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        # Where many columns are zero it may not converge in fp32.
        largest = float(torch.linalg.eigvalsh(tall.double().T @ tall.double())[-1])
    return peak * math.sqrt(largest * fan_in / fan_out)


@torch.no_grad()
def weight_values(
    model: nn.Module,
    first: Mapping[str, Tensor],
    rows: Mapping[str, Row],
    *,
    initial: bool,
    norms: bool = True,
) -> Values:
    """RMS of the initial weights, or how far they have moved.

    Kinds are `weight`; or `update`, the RMS of the change, and of hidden matrices
    `update_norm` (RMS-operator norm of it) and `update_ratio` (its Frobenius norm over the
    initial weight's).

    Args:
        model: The model.
        first: Its weights at t = 0, by fully qualified name.
        rows: Its table's rows, likewise.
        initial: Whether this is t = 0.
        norms: Whether to take operator norms, at the cost of a matrix side cubed.
    """
    found: dict[tuple[str, str], list[float]] = {}
    for fqn, parameter in model.named_parameters():
        pattern, rms = rows[fqn].pattern, _rms(first[fqn].float())
        if initial:
            found.setdefault(("weight", pattern), []).append(rms)
            continue
        change = parameter.float() - first[fqn].float()
        moved = _rms(change)
        found.setdefault(("update", pattern), []).append(moved)
        if rows[fqn].role in MATRIX_ROLES:
            if norms:
                found.setdefault(("update_norm", pattern), []).append(operator_norm(change))
            if rms:
                found.setdefault(("update_ratio", pattern), []).append(moved / rms)
    return typical(found)


@torch.no_grad()
def later_updates(
    model: nn.Module, second: Mapping[str, Tensor], rows: Mapping[str, Row]
) -> Values:
    """How far the entry of each weight went that went farthest since the first step.

    Kind is `later_update`. Under Adam an entry whose gradient keeps its sign moves by the
    learning rate in every step; the RMS would depend on how many entries do.

    Args:
        model: The model.
        second: Its weights at t = 1, by fully qualified name.
        rows: Its table's rows, likewise.
    """
    found: dict[tuple[str, str], list[float]] = {}
    for fqn, parameter in model.named_parameters():
        change = float((parameter.float() - second[fqn].float()).abs().max())
        found.setdefault(("later_update", rows[fqn].pattern), []).append(change)
    return typical(found)


def _rms(x: Tensor) -> float:
    return math.sqrt(float(x.square().mean()))


def typical(found: Mapping[tuple[str, str], list[float]]) -> Values:
    """The geometric mean of every entry; NaN where one of its values is."""
    return {key: geometric_mean(values) for key, values in found.items()}


def geometric_mean(values: Sequence[float]) -> float:
    """Zero where a value is zero, NaN or infinite where one is."""
    if any(math.isnan(value) for value in values):
        return math.nan
    if 0.0 in values:
        return 0.0
    return math.exp(math.fsum(map(math.log, values)) / len(values))
