"""What an experiment will take, before anything is spent: runs, tokens, memory, hours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mutransfer.hardware import Device
from proxies.allocation import allocation
from proxies.cost import flops_per_token
from proxies.decoder import DecoderConfig
from proxies.timing import timing
from sweeps.experiment import Experiment


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Runs of one model that a step of the flow makes.

    Attributes:
        step: `sweep` or `transfer-check`.
        d_model: Width of the model.
        runs: How many; for the sweep, were none pruned.
        tokens: Of all of them.
        flops: Of all of them.
        memory: Peak bytes of one run, the program itself not included.
        seconds: Of all of them, one after another.
    """

    step: str
    d_model: int
    runs: int
    tokens: int
    flops: int
    memory: int
    seconds: float


def plan_experiment(
    experiment: Experiment,
    *,
    gpus: int = 0,
    device: Device | None = None,
    mfu: float = 0.4,
    seconds_per_step: Callable[[DecoderConfig], float] | None = None,
) -> tuple[Runs, ...]:
    """The runs of sweep and transfer check, without what a grid grows by.

    Args:
        experiment: The experiment.
        gpus: Devices; 0 for this processor, on which a few steps are timed.
        device: Their kind.
        mfu: Share of their peak that is assumed to be used.
        seconds_per_step: In place of timing, on this processor.
    """
    e, train = experiment, experiment.train
    counts = [("sweep", e.base.d_model, _sweep_runs(e))]
    counts += [("transfer-check", width, _grid_runs(e)) for width in e.transfer_check.widths]
    planned = []
    for step, width, runs in counts:
        model = e.model_at(width)
        tokens = runs * train.steps * train.batch_tokens
        flops = tokens * flops_per_token(model, train.seq_len)
        if gpus and device is not None:
            seconds = flops / (gpus * mfu * device.flops("fp32"))
        else:
            seconds = runs * train.steps * (seconds_per_step or _timed(e))(model)
        planned.append(
            Runs(
                step=step,
                d_model=width,
                runs=runs,
                tokens=tokens,
                flops=flops,
                memory=_memory(e, model),
                seconds=seconds,
            )
        )
    return tuple(planned)


def table(planned: tuple[Runs, ...], price_per_hour: float | None = None) -> list[str]:
    """The plan as lines."""
    lines = [
        f"{'step':<15}{'width':>7}{'runs':>7}{'tokens':>16}{'FLOPs':>11}{'memory':>11}{'hours':>9}"
    ]
    lines += [
        f"{p.step:<15}{p.d_model:>7,}{p.runs:>7,}{p.tokens:>16,}{p.flops:>11.3g}"
        f"{p.memory / 2**20:>7,.0f} MiB{p.seconds / 3600:>9.2f}"
        for p in planned
    ]
    hours = sum(p.seconds for p in planned) / 3600
    lines.append(
        f"in all {sum(p.tokens for p in planned):,} tokens, "
        f"{sum(p.flops for p in planned):.3g} FLOPs, {hours:.2f} hours one run after another; "
        "pruned trials take less, growing grids more; evaluations come on top"
    )
    if price_per_hour is not None:
        lines.append(f"cost {hours * price_per_hour:,.2f} at {price_per_hour:g} per hour")
    return lines


def _sweep_runs(e: Experiment) -> int:
    """Trials on their seeds, and the further seeds of the best."""
    confirmed = min(e.sweep.confirm, e.sweep.trials)
    return e.sweep.trials * e.sweep.seeds + confirmed * (e.sweep.confirm_seeds - e.sweep.seeds)


def _grid_runs(e: Experiment) -> int:
    """Runs of one width: every learning rate of every arm on its seeds."""
    c = e.transfer_check
    rates = 2 * c.octaves * c.per_octave + 1
    return rates * (c.seeds + len(e.contrast) * (c.contrast_seeds or c.seeds))


def _memory(e: Experiment, model: DecoderConfig) -> int:
    return allocation(model, micro_batch=e.train.batch_size, seq_len=e.train.seq_len,
                      measured=False).peak  # fmt: skip


def _timed(e: Experiment) -> Callable[[DecoderConfig], float]:
    def seconds(model: DecoderConfig) -> float:
        parts = timing(model, micro_batch=e.train.batch_size, seq_len=e.train.seq_len)
        return parts.passes + parts.update

    return seconds
