"""What a run will take, before anything is spent: tokens, arithmetic, memory, hours, money."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from full_scale.recipe import Phase, Recipe
from mutransfer.errors import UserError
from mutransfer.hardware import Device
from proxies.allocation import Allocation, allocation
from proxies.cost import flops_again, flops_per_token
from proxies.timing import Timing, timing


@dataclass(frozen=True, kw_only=True)
class PhasePlan:
    """What one phase takes.

    Attributes:
        phase: The phase.
        flops: Useful operations.
        seconds: Wall-clock time of its steps.
        memory: Peak bytes per device, the program itself not included.
    """

    phase: Phase
    flops: int
    seconds: float
    memory: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run takes.

    Attributes:
        recipe: The run.
        phases: In order.
        gpus: Devices; 0 stands for this processor.
        device: Their kind; `None` for this processor.
        how: Where the times come from, in words.
    """

    recipe: Recipe
    phases: tuple[PhasePlan, ...]
    gpus: int
    device: Device | None
    how: str

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def flops(self) -> int:
        """Of the whole run."""
        return sum(phase.flops for phase in self.phases)

    @property
    def memory(self) -> float:
        """The most that any phase takes, in bytes per device."""
        return max(phase.memory for phase in self.phases)

    @property
    def fits(self) -> bool | None:
        """Whether the device has that memory; `None` where it is not known."""
        return None if self.device is None else self.memory <= 1e9 * self.device.memory_gb

    def cost(self, price_per_hour: float) -> float:
        """The price of the run, where one device costs so much per hour."""
        return self.seconds / 3600 * max(1, self.gpus) * price_per_hour


def plan_gpus(recipe: Recipe, *, gpus: int, device: Device, mfu: float) -> Plan:
    """A run on GPUs, whose speed is a share of the datasheet's.

    Weights, gradients and moments are divided among the GPUs; each holds the activations of its
    own micro-batch, and the embedding and two blocks gathered.

    Raises:
        UserError: The batch of a phase cannot be divided among the GPUs.
    """
    speed = gpus * mfu * device.flops(recipe.precision)
    planned = []
    for phase in recipe.phases:
        if phase.batch_size % gpus:
            raise UserError("the GPUs do not divide the batch", where=f"phase {phase.name!r}",
                            got=gpus, expected=f"a divisor of {phase.batch_size}")  # fmt: skip
        micro = min(phase.micro, phase.batch_size // gpus)
        useful = flops_per_token(recipe.model, phase.seq_len)
        again = flops_again(recipe.model, phase.seq_len, phase.memory)
        one = _allocation(recipe, phase, micro)
        held = float(one.peak)
        if gpus > 1:
            held = one.state / gpus + max(one.passes + _gathered(recipe), one.update / gpus)
        planned.append(
            PhasePlan(
                phase=phase,
                flops=useful * phase.tokens,
                seconds=(useful + again) * phase.tokens / speed,
                memory=held,
            )
        )
    return Plan(recipe=recipe, phases=tuple(planned), gpus=gpus, device=device,
                how=f"assumed: {mfu:.0%} of {gpus} × {device.name}'s "
                    f"{device.flops(recipe.precision) / 1e12:,.0f} TFLOP/s")  # fmt: skip


def plan_here(recipe: Recipe, clock: Callable[[], float] = time.perf_counter) -> Plan:
    """A run on this processor, whose speed is measured with a few short steps."""

    @cache
    def timed(micro: int, seq_len: int, optimizer: str, chunk: int | None, twice: bool) -> Timing:
        phase = next(p for p in recipe.phases if _kind(p) == (micro, seq_len, optimizer, chunk,
                                                              twice))  # fmt: skip
        return timing(recipe.model, micro_batch=micro, seq_len=seq_len, clock=clock,
                      optimizer=phase.optimizer, precision=recipe.precision,
                      memory=phase.memory)  # fmt: skip

    planned = []
    for phase in recipe.phases:
        parts = timed(*_kind(phase))
        step = phase.batch_size // phase.micro * parts.passes + parts.update
        planned.append(
            PhasePlan(
                phase=phase,
                flops=flops_per_token(recipe.model, phase.seq_len) * phase.tokens,
                seconds=phase.steps * step,
                memory=_allocation(recipe, phase, phase.micro).peak,
            )
        )
    return Plan(recipe=recipe, phases=tuple(planned), gpus=0, device=None,
                how="measured: a few steps of a shallow model on this processor")  # fmt: skip


def table(plan: Plan, price_per_hour: float | None = None) -> list[str]:
    """The plan as lines."""
    model = plan.recipe.model
    head = ("phase", "tokens", "FLOPs", "memory", "hours")
    rows = [
        (p.phase.name, f"{p.phase.tokens:,}", f"{p.flops:.3g}", f"{p.memory / 2**30:.2f} GiB",
         f"{p.seconds / 3600:,.2f}")
        for p in plan.phases
    ]  # fmt: skip
    rows.append(("in all", f"{plan.recipe.horizon_tokens:,}", f"{plan.flops:.3g}",
                 f"{plan.memory / 2**30:.2f} GiB", f"{plan.seconds / 3600:,.2f}"))  # fmt: skip
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        f"{plan.recipe.name}: {model.n_parameters:,} parameters ({model.n_nonembedding:,} "
        f"non-embedding), {plan.recipe.steps:,} steps, {plan.recipe.precision}"
    ]
    for row in (head, *rows):
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join((first.strip().ljust(widths[0]), *rest)))
    lines.append(f"time {plan.how}; evaluations, checkpoints and waiting for data come on top")
    lines.append(
        "memory of tensors, per device; the program and what its allocator keeps come on top"
    )
    if plan.fits is not None and plan.device is not None:
        verb = "fits into" if plan.fits else "DOES NOT FIT into"
        lines.append(f"{verb} {plan.device.name}'s {plan.device.memory_gb:g} GB")
    if price_per_hour is not None:
        lines.append(
            f"cost {plan.cost(price_per_hour):,.2f}: {plan.seconds / 3600 * max(1, plan.gpus):,.1f}"
            f" device hours at {price_per_hour:g}"
        )
    return lines


def _kind(phase: Phase) -> tuple[int, int, str, int | None, bool]:
    """All of a phase that a step's time depends on."""
    return phase.micro, phase.seq_len, phase.optimizer, phase.loss_chunk, phase.recompute


def _allocation(recipe: Recipe, phase: Phase, micro: int) -> Allocation:
    return allocation(recipe.model, micro_batch=micro, seq_len=phase.seq_len,
                      optimizer=phase.optimizer, precision=recipe.precision,
                      memory=phase.memory)  # fmt: skip


def _gathered(recipe: Recipe) -> int:
    """Bytes of what a GPU gathers at a time, in fp32: the embedding, the head and two blocks."""
    model = recipe.model
    return 4 * (model.n_embedding + 2 * (model.n_nonembedding - model.d_model) // model.n_layers)
