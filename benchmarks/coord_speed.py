"""How long the default coordinate check takes, and what collecting costs over training alone.

    python benchmarks/coord_speed.py

The shipped experiment `quickstart`, on random tokens: every width once per repetition, first as
bare steps and then inside the check, for AdamW and for Muon; one repetition before them does not
count. Then one whole check with all seeds, models built and verdict included. Ratios are of check
to bare steps, medians over repetitions: by the wall clock, and by the CPU time of the process,
which other people's jobs disturb less. What the parts cost is timed in checks of their own.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from machine import processor
from numpy.typing import NDArray

import mutransfer.coord_adam as adam
import mutransfer.coord_check as check
import mutransfer.coord_measure as measured
from mutransfer.apply import initialize
from mutransfer.files import write_json
from mutransfer.optimizers import Matrix, Optimizers
from proxies.decoder import meta_decoder
from proxies.tables import decoder_table
from sweeps.experiment import Experiment, load_experiment
from sweeps.pool import cores

RESULT = Path(__file__).parent / "results" / "coord_speed" / "coord_speed.json"
PARTS: dict[str, tuple[tuple[Any, str], ...]] = {
    "operator norms": ((measured, "operator_norm"),),
    "other moves of weights": ((check, "weight_values"), (check, "later_updates")),
    "eps against moments": ((check, "eps_shares"),),
    "groups against table": ((check, "check_groups"), (check, "check_after")),
}
HOOKS = {"outputs of modules": (measured, "hooked"), "alignment": (adam, "hooked")}
LAST = "pass after the last step"

Times = NDArray[np.float64]
"""Seconds by the wall clock, and of CPU."""


def now() -> Times:
    return np.array([time.perf_counter(), time.process_time()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    experiment = load_experiment("quickstart")
    c = experiment.coord_check
    result = {
        "command": f"python benchmarks/coord_speed.py --repetitions {args.repetitions} "
        f"--threads {args.threads}",
        "hardware": f"{cores()} cores, {platform.machine()}, {processor()}",
        "load_at_start": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "threads": args.threads,
        "check": c.model_dump(include={"widths", "seeds", "steps", "batch_size", "seq_len"}),
        "optimizers": {kind: compare(experiment, kind, args.repetitions)
                       for kind in ("adamw", "muon")},
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, result)
    print("\n".join(_page(result)))


def make(e: Experiment, matrix: Matrix, width: int, seed: int) -> check.Trainable:
    """A model of the check with its optimizer, on tokens that need no corpus."""
    c, config = e.coord_check, e.model_at(width)
    table = decoder_table(config, e.base, e.params, e.parametrization, base_width=e.base_width)
    model = meta_decoder(config).to_empty(device="cpu")
    initialize(model, table, seed=seed)
    batch = torch.randint(
        config.vocab_size, (c.batch_size, c.seq_len + 1),
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    return check.Trainable(
        model=model,
        optimizer=Optimizers(model, table, matrix),
        loss=lambda: model.loss(batch),
        table=table,
        tokens=batch[:, :-1],
    )


def compare(e: Experiment, matrix: Matrix, repetitions: int) -> dict[str, Any]:
    """Times of every width, of all together, and of the whole check."""
    widths = e.coord_check.widths
    runs: list[dict[int, dict[str, Times]]] = []
    for seed in range(repetitions + 1):
        bare = {width: bare_steps(e, matrix, width, seed) for width in widths}
        whole, parts = checked(e, matrix, seed), Stopwatch()
        with parts.watching():
            checked(e, matrix, seed, parts)
        runs.append({width: {"bare": bare[width], "check": whole[width], **parts.found[width]}
                     for width in widths})  # fmt: skip
    runs = runs[1:]
    summed = [
        {key: sum((run[width][key] for width in widths), np.zeros(2)) for key in run[widths[0]]}
        for run in runs
    ]
    started = now()
    check.coord_check(functools.partial(make, e, matrix), widths, seeds=e.coord_check.seeds,
                      steps=e.coord_check.steps)  # fmt: skip
    seconds = now() - started
    return {
        "whole_check_seconds": round(float(seconds[0]), 2),
        "whole_check_cpu_seconds": round(float(seconds[1]), 2),
        "all": _row(summed),
        **{str(width): _row([run[width] for run in runs]) for width in widths},
    }


def bare_steps(e: Experiment, matrix: Matrix, width: int, seed: int) -> Times:
    """The same steps, and nothing measured."""
    trainable = make(e, matrix, width, seed)
    started = now()
    for _ in range(e.coord_check.steps):
        loss = trainable.loss()
        trainable.optimizer.zero_grad()
        loss.backward()
        trainable.optimizer.step()
    return now() - started


def checked(
    e: Experiment, matrix: Matrix, seed: int, parts: Stopwatch | None = None
) -> dict[int, Times]:
    """What `coord_check` takes for one model of every width, after that is built."""
    times: dict[int, Times] = {}

    def factory(width: int, _: int) -> check.Trainable:
        trainable = make(e, matrix, width, seed)
        if parts is not None:
            trainable = parts.follow(trainable, width, e.coord_check.steps)
        times[width] = now()
        return trainable

    def progress(line: str, share: float | None = None) -> None:
        width = list(times)[-1]
        times[width] = now() - times[width]

    check.coord_check(factory, e.coord_check.widths, seeds=1, steps=e.coord_check.steps,
                      progress=progress)  # fmt: skip
    return times


class Stopwatch:
    """Adds up the time that each part of the collection takes, without the parts inside it.

    Attributes:
        found: Times by width and part.
    """

    def __init__(self) -> None:
        self.found: dict[int, dict[str, Times]] = {}
        self._width, self._inside = 0, [np.zeros(2)]

    def follow(self, trainable: check.Trainable, width: int, steps: int) -> check.Trainable:
        """Times belong to this width from now on; its pass after the last step is a part."""
        self._width = width
        self.found[width] = {part: np.zeros(2) for part in (*PARTS, *HOOKS, LAST)}
        passes = iter([*[None] * steps, LAST])
        return replace(trainable, loss=lambda: self.call(next(passes), trainable.loss))

    def call(self, part: str | None, function: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        """Calls a function; its time is that of the part, or of none."""
        self._inside.append(np.zeros(2))
        started = now()
        try:
            return function(*args, **kw)
        finally:
            spent = now() - started
            inside = self._inside.pop()
            self._inside[-1] += spent
            if part is not None:
                self.found[self._width][part] += spent - inside

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Puts itself between the check and its parts for as long as the body runs."""
        with ExitStack() as stack:
            for part, functions in PARTS.items():
                for module, name in functions:
                    timed = functools.partial(self.call, part, getattr(module, name))
                    stack.enter_context(patch.object(module, name, timed))
            for part, (module, name) in HOOKS.items():
                timed = functools.partial(self._hooked, part, getattr(module, name))
                stack.enter_context(patch.object(module, name, timed))
            yield

    def _hooked(self, part: str, hooked: Callable[..., Any], hooks: Iterable[Any]) -> Any:
        return hooked((module, functools.partial(self.call, part, hook)) for module, hook in hooks)


def _row(runs: list[dict[str, Times]]) -> dict[str, Any]:
    """Medians in milliseconds; shares of the parts are of the bare steps, by CPU time."""

    def median(*keys: str, clock: int = 0) -> float:
        """Of one entry; of two, of the first over the second."""
        values = [run[keys[0]] / (run[keys[1]] if keys[1:] else 1e-3) for run in runs]
        return round(statistics.median(float(value[clock]) for value in values), 3)

    parts = {
        part: median(part, "bare", clock=1) for part in runs[0] if part not in ("bare", "check")
    }
    ratio = median("check", "bare", clock=1)
    return {
        "bare_ms": median("bare"),
        "check_ms": median("check"),
        "ratio": median("check", "bare"),
        "cpu_ratio": ratio,
        "parts": {**parts, "the rest": round(ratio - 1 - sum(parts.values()), 3)},
    }


def _page(result: dict[str, Any]) -> list[str]:
    lines = [f"{result['hardware']}, torch {result['versions']['torch']}, {result['threads']} "
             f"threads, load {result['load_at_start']} at the start"]  # fmt: skip
    for kind, found in result["optimizers"].items():
        lines += ["", f"{kind}: the whole check takes {found['whole_check_seconds']} s", ""]
        lines.append(f"{'width':>24} {'bare ms':>9} {'check ms':>9} {'ratio':>6} {'by CPU':>6}")
        rows = {name: row for name, row in found.items() if isinstance(row, dict)}
        for name, row in rows.items():
            lines.append(f"{name:>24} {row['bare_ms']:9.1f} {row['check_ms']:9.1f} "
                         f"{row['ratio']:6.2f} {row['cpu_ratio']:6.2f}")  # fmt: skip
        lines += ["", f"{'over bare steps (CPU)':>24} " + " ".join(f"{name:>6}" for name in rows)]
        for part in rows["all"]["parts"]:
            shares = " ".join(f"{row['parts'][part]:6.2f}" for row in rows.values())
            lines.append(f"{part:>24} {shares}")
    return lines


if __name__ == "__main__":
    main()
