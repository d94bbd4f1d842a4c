"""The coordinate check: do activations, updates and logits keep their size as width grows?

Models of several widths (or depths) take a few steps on one batch each. The slope of every
quantity over width is held against μP's, and every optimizer group against the table. Method:
Tensor Programs V (2203.03466), Appendix D.1; the norms of updates after 2310.17813; depth after
CompleteP (2505.01618).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Protocol

import pandas as pd
import torch
from torch import Tensor, nn

from mutransfer.coord_adam import Alignment, eps_shares
from mutransfer.coord_expect import Axis, Thresholds
from mutransfer.coord_ladder import Rung, make_ladder
from mutransfer.coord_measure import Recorder, Values, later_updates, weight_values
from mutransfer.coord_overflow import fp8_values
from mutransfer.coord_result import CoordCheckResult
from mutransfer.coord_verdict import Unjudged, judge
from mutransfer.errors import UserError
from mutransfer.progress import Report, quiet
from mutransfer.symbolic import Finding, check_after, check_groups, optimizer_kind
from mutransfer.table import Table

__all__ = ["CoordCheckResult", "Stepper", "Thresholds", "Trainable", "coord_check"]


UNSEEN = "there is no attention, or no module that shows its queries and keys (is_attention_core)"


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
        trained: Optimizer steps that the factory has trained the model for already. The check
            goes on from there, and does not judge what is right at init alone.
    """

    model: nn.Module
    optimizer: Stepper
    loss: Callable[[], Tensor]
    table: Table
    tokens: Tensor | None = None
    trained: int = 0

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
    axis: Axis = "width",
    thresholds: Thresholds | None = None,
    progress: Report = quiet,
) -> CoordCheckResult:
    """Trains a ladder of models for a few steps and judges how their coordinates scale.

    Args:
        factory: (width, seed) -> a fresh model with its optimizer and batch, or one that it
            trained for `Trainable.trained` steps. Learning rates should be at or above the best
            one, gradients not clipped.
        widths: At least three different ones; four that span a factor of 8 are a good choice.
            Numbers of blocks, where the axis is `depth`; the factory is called with those.
        seeds: Models per width.
        steps: Optimizer steps; measured at 0 and every power of two up to this.
        axis: What the factory's first argument is, and what the models differ in.
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
    rungs: dict[int, Rung] = {}
    for width in widths:
        for seed in range(seeds):
            trainable = factory(width, seed)
            model, table = trainable.model, trainable.table
            found = check_groups(trainable.groups, table, model, trained=trainable.trained > 0)
            recorder = Recorder(model, table, trainable.tokens, depth=axis == "depth")
            for t, values in measure(trainable, recorder, steps):
                rows += [(*key, t, width, seed, value) for key, value in values.items()]
            found += check_after(trainable.groups, table, model)
            for finding in found:
                key = (finding.name, finding.field)
                findings.setdefault(key, replace(finding, width=width))
            rungs[width] = Rung(model, table, optimizer_kind(trainable.groups),
                                trainable.tokens is not None, recorder.head_dim,
                                trainable.trained)  # fmt: skip
            share = (widths.index(width) * seeds + seed + 1) / (len(widths) * seeds)
            progress(f"{table.parametrization}: {axis} {width}, seed {seed + 1} of {seeds}", share)
    frame = pd.DataFrame(rows, columns=["kind", "name", "t", "width", "seed", "value"])
    ladder = make_ladder(rungs, axis)
    quantities, exceptions = judge(frame, ladder, thresholds or Thresholds())
    if "attention_logits" not in set(frame["kind"]):
        exceptions += (Unjudged(kind="attention_logits", name="none", reason=UNSEEN),)
    return CoordCheckResult(
        parametrization=table.parametrization,
        optimizer=ladder.optimizer,
        axis=axis,
        trained=ladder.trained,
        widths=tuple(widths),
        seeds=seeds,
        steps=steps,
        frame=frame,
        quantities=quantities,
        exceptions=exceptions,
        symbolic=tuple(findings.values()),
    )


def measure(
    trainable: Trainable, recorder: Recorder, steps: int, *, sizes_only: bool = False
) -> Iterator[tuple[int, Values]]:
    """Trains, and yields what there is to see before step 0 and after 1, 2, 4, 8, ….

    The measured passes are the training's own forward passes; only the last is one more.

    Args:
        trainable: The model.
        recorder: What watches it.
        steps: Optimizer steps.
        sizes_only: Whether to leave out what costs a large model minutes and a copy of itself:
            operator norms, alignment, eps and later updates.
    """
    model = trainable.model
    rows = trainable.table.resolve(model)
    first = second = {fqn: p.detach().clone() for fqn, p in model.named_parameters()}
    alignment = Alignment(model, first, rows)
    for t in range(steps + 1):
        if t & (t - 1) == 0:
            with ExitStack() as stack:
                values = stack.enter_context(recorder.watch())
                aligned = {} if sizes_only else stack.enter_context(alignment.watch())
                stack.enter_context(torch.set_grad_enabled(t < steps))
                loss = trainable.loss()
            values["loss", "loss"] = float(loss.detach())
            values |= weight_values(model, first, rows, initial=t == 0, norms=not sizes_only)
            if not sizes_only:
                values |= aligned | eps_shares(trainable.optimizer, model, rows)
                values |= fp8_values(model)
                if t == 1:
                    second = {fqn: p.detach().clone() for fqn, p in model.named_parameters()}
                elif t:
                    values |= later_updates(model, second, rows)
            yield t, values
        elif t < steps:
            loss = trainable.loss()
        if t < steps:
            trainable.optimizer.zero_grad()
            loss.backward()
            trainable.optimizer.step()


class _Callable(ModuleType):
    """Lets `mutransfer.coord_check(...)` mean the function, whoever imported the module first."""

    def __call__(self, *args: Any, **kwargs: Any) -> CoordCheckResult:
        return coord_check(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
