"""The coordinate check: do activations, updates and logits keep their size as width grows?

Models of several widths take a few steps on one batch each. The slope of every quantity over
width is held against μP's, and every optimizer group against the table. Method: Tensor
Programs V (2203.03466), Appendix D.1; the norms of updates after 2310.17813.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Protocol

import pandas as pd
import torch
from torch import Tensor, nn

from mutransfer.coord_expect import Ladder, Thresholds
from mutransfer.coord_measure import Recorder, Values, weight_values
from mutransfer.coord_result import CoordCheckResult
from mutransfer.coord_verdict import judge
from mutransfer.errors import UserError
from mutransfer.progress import Report, quiet
from mutransfer.symbolic import Finding, check_groups, check_schedule, optimizer_kind
from mutransfer.table import Table

__all__ = ["CoordCheckResult", "Stepper", "Thresholds", "Trainable", "coord_check"]


class Stepper(Protocol):
    """What the check asks of an optimizer; `groups` or torch's own `param_groups` beside it."""

    def step(self) -> object:
        """Takes one step."""

    def zero_grad(self) -> None:
        """Drops all gradients."""


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """A model ready to train, as a factory returns it; the check builds none itself.

    Attributes:
        model: Initialized, on its device, not compiled.
        optimizer: A `mutransfer.optimizers.Optimizers`, a torch optimizer over
            `param_groups`, or anything with `step`, `zero_grad` and `groups`.
        loss: Loss of the model, in nats, on one fixed batch; calls `model` itself.
        table: The model's table.
        tokens: The batch's input ids (batch, seq), where the logits are (batch, seq, vocab).
    """

    model: nn.Module
    optimizer: Stepper
    loss: Callable[[], Tensor]
    table: Table
    tokens: Tensor | None = None

    @property
    def groups(self) -> list[Mapping[str, Any]]:
        """All parameter groups.

        Raises:
            UserError: The optimizer has none.
        """
        for name in ("groups", "param_groups"):
            if (groups := getattr(self.optimizer, name, None)) is not None:
                return list(groups)
        raise UserError("the optimizer shows no parameter groups", where="Trainable.optimizer",
                        got=type(self.optimizer).__name__, expected="a list `groups`")  # fmt: skip


def coord_check(
    factory: Callable[[int, int], Trainable],
    widths: Sequence[int],
    *,
    seeds: int = 3,
    steps: int = 8,
    thresholds: Thresholds | None = None,
    progress: Report = quiet,
) -> CoordCheckResult:
    """Trains a ladder of models for a few steps and judges how their coordinates scale.

    Args:
        factory: (width, seed) -> a fresh model with its optimizer and batch. Learning rates
            should be at or above the best one, weight decay off, gradients not clipped.
        widths: At least three different ones; four that span a factor of 8 are a good choice.
        seeds: Models per width.
        steps: Optimizer steps; measured at 0 and every power of two up to this.
        thresholds: Tolerances, where the defaults do not do.
        progress: Takes one line per model.

    Raises:
        UserError: Too few widths, seeds or steps, or the factory's models do not fit the check
            or each other.
    """
    widths = sorted(set(widths))
    if len(widths) < 3 or widths[0] < 1:
        raise UserError("too few widths for a slope and its error", where="widths", got=widths,
                        expected="at least 3 different ones")  # fmt: skip
    for name, value, least in (("seeds", seeds, 1), ("steps", steps, 2)):
        if value < least:
            raise UserError("too few", where=name, got=value, expected=f"at least {least}")
    rows: list[tuple[str, str, int, int, int, float]] = []
    findings: dict[tuple[str, str], Finding] = {}
    models: dict[int, _Model] = {}
    for width in widths:
        for seed in range(seeds):
            trainable = factory(width, seed)
            found = check_groups(trainable.groups, trainable.table, trainable.model)
            recorder = Recorder(trainable.model, trainable.table, trainable.tokens)
            for t, values in _train(trainable, recorder, steps):
                rows += [(*key, t, width, seed, value) for key, value in values.items()]
            found += check_schedule(trainable.groups)
            for finding in found:
                key = (finding.name, finding.field)
                findings.setdefault(key, replace(finding, width=width))
            models[width] = _Model(trainable, recorder.head_dim)
            share = (widths.index(width) * seeds + seed + 1) / (len(widths) * seeds)
            arm = trainable.table.parametrization
            progress(f"{arm}: width {width}, seed {seed + 1} of {seeds}", share)
    frame = pd.DataFrame(rows, columns=["kind", "name", "t", "width", "seed", "value"])
    ladder = _ladder(models)
    quantities, exceptions = judge(frame, ladder, thresholds or Thresholds())
    return CoordCheckResult(
        parametrization=trainable.table.parametrization,
        optimizer=ladder.optimizer,
        widths=tuple(widths),
        seeds=seeds,
        steps=steps,
        frame=frame,
        quantities=quantities,
        exceptions=exceptions,
        symbolic=tuple(findings.values()),
    )


def _train(trainable: Trainable, recorder: Recorder, steps: int) -> Iterator[tuple[int, Values]]:
    """Trains, and yields what there is to see before step 0 and after 1, 2, 4, 8, ….

    The measured passes are the training's own forward passes; only the last is one more.
    """
    model = trainable.model
    first = {fqn: p.detach().clone() for fqn, p in model.named_parameters()}
    for t in range(steps + 1):
        if t & (t - 1) == 0:
            with recorder.watch() as values, torch.set_grad_enabled(t < steps):
                loss = trainable.loss()
            values["loss", "loss"] = float(loss.detach())
            values |= weight_values(model, first, trainable.table, initial=t == 0)
            yield t, values
        elif t < steps:
            loss = trainable.loss()
        if t < steps:
            trainable.optimizer.zero_grad()
            loss.backward()
            trainable.optimizer.step()


class _Model:
    """What is left of a trained model for the ladder: roles, shapes, optimizer."""

    def __init__(self, trainable: Trainable, head_dim: int | None) -> None:
        rows = trainable.table.rows
        self.roles = {row.pattern: row.role for row in rows}
        self.shapes = {row.pattern: row.shape for row in rows}
        self.parameters = {fqn for fqn, _ in trainable.model.named_parameters()}
        self.optimizer = optimizer_kind(trainable.groups)
        self.tokens = trainable.tokens is not None
        self.head_dim = head_dim or 1


def _ladder(models: Mapping[int, _Model]) -> Ladder:
    """How the models grow, from the narrowest to the widest.

    Raises:
        UserError: They are not the same model at several widths.
    """
    small, large = models[min(models)], models[max(models)]
    for width, model in models.items():
        for what in ("roles", "parameters", "optimizer", "tokens"):
            if getattr(model, what) != getattr(small, what):
                raise UserError("the factory's models differ in more than width", where=what,
                                got=f"another at width {width} than at {min(models)}",
                                expected="the same at every width")  # fmt: skip
    if small.shapes == large.shapes:
        raise UserError("the factory's models do not grow with the width", where="factory",
                        got=f"equal shapes at {min(models)} and {max(models)}",
                        cure="Build the model that (width, seed) asks for.")  # fmt: skip

    def exponent(low: float, high: float) -> float:
        return math.log(high / low) / math.log(max(models) / min(models))

    return Ladder(
        optimizer=small.optimizer,
        roles=small.roles,
        fan_in={name: exponent(s[-1], large.shapes[name][-1]) for name, s in small.shapes.items()},
        fan_out={name: exponent(s[0], large.shapes[name][0]) for name, s in small.shapes.items()},
        head_dim=exponent(small.head_dim, large.head_dim),
        tokens=small.tokens,
    )


class _Callable(ModuleType):
    """Lets `mutransfer.coord_check(...)` mean the function, whoever imported the module first."""

    def __call__(self, *args: Any, **kwargs: Any) -> CoordCheckResult:
        return coord_check(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
