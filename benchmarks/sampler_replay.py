"""How many trials samplers take to the optimum of a recorded landscape, and pruners how many steps.

    python benchmarks/sampler_replay.py samplers stdlib --out benchmarks/results/sampler_replay
    python benchmarks/sampler_replay.py pruners stdlib --out benchmarks/results/sampler_replay
    python benchmarks/sampler_replay.py stopping stdlib --out benchmarks/results/sampler_replay

A sampler proposes a point, the nearest recorded one (in the unit cube of the logarithms) that is
not yet used is taken, and its recorded losses of seed 0 are told, rungs first. The samplers are
those of `sweeps.sampler`, as a sweep runs them, one trial after another. In one replay all start
from the same points, the design's; replays differ in the design and in the samplers' seeds.

The regret of a search is that of its best trial in the mean over the recorded seeds, as a sweep
confirms its best trials over seeds; a point that was not repeated is not among the best. Counted
are the trials (and the steps) until the regret is below one standard deviation over seeds. A
search that is not there after `--limit` trials counts as that many. `stopping` counts the trials
until `sweep.stop` would end the search, with the regret there (null: of a point not repeated).
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import platform
import shlex
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import torch
from choosers import choice, choosing
from landscape import SEARCH
from machine import processor
from numpy.typing import NDArray
from optuna.trial import TrialState

from mutransfer.files import write_json
from mutransfer.progress import Display
from sweeps.experiment import Range, SweepConfig
from sweeps.pruner import HalvingPruner
from sweeps.sampler import make_sampler, outlook
from sweeps.space import space_of, to_unit

LANDSCAPES = Path(__file__).parent / "results" / "landscapes"
SPACE = {name: Range(low=low, high=high) for name, (low, high) in SEARCH.items()}
GOAL = 1.0  # standard deviations over seeds
RESAMPLES = 10_000
SAMPLERS = ("random", "qmc", "tpe", "gp", "surrogate")
PRUNERS = ("none", "median", "2", "3", "4")


@dataclass(frozen=True, kw_only=True)
class Landscape:
    """Recorded points: places in the unit cube, losses of seed 0 in nats (NaN where diverged),
    the same at the rungs, and the regret in standard deviations over seeds (inf if unknown)."""

    params: list[dict[str, float]]
    places: NDArray[Any]
    losses: NDArray[Any]
    rungs: dict[int, NDArray[Any]]
    steps: int
    regret: NDArray[Any]


def load(name: str) -> Landscape:
    """Reads a landscape."""
    frame = pd.read_parquet(LANDSCAPES / f"{name}.parquet")
    first = frame[frame["seed"] == 0].set_index("point").sort_index()
    repeated = frame.groupby("point")["loss"].agg(["mean", "count", "var"])
    repeated = repeated[repeated["count"] > 1]
    deviation = math.sqrt(repeated["var"].mean())
    regret = (repeated["mean"] - repeated["mean"].min()) / deviation
    params = first[[*SEARCH]].to_dict("records")
    at = {int(column.removeprefix("loss_at_")): first[column].to_numpy()
          for column in frame if column.startswith("loss_at_")}  # fmt: skip
    return Landscape(
        params=params,
        places=np.stack([to_unit(space_of(SPACE), p) for p in params]),
        losses=first["loss"].to_numpy(),
        rungs={step: at[step] for step in sorted(at)[:-1]},
        steps=max(at),
        regret=regret.reindex(first.index).fillna(math.inf).to_numpy(),
    )


@dataclass(frozen=True, kw_only=True)
class Task:
    """One replay: `pruner` is `none`, `median` or the factor of successive halving."""

    landscape: str
    sampler: Any
    pruner: str
    seed: int
    startup: int
    limit: int
    nearest: bool = False
    enough: bool = False

    @property
    def arm(self) -> str:
        """What is compared."""
        return f"{self.sampler}{' (nearest)' * self.nearest}, {self.pruner}"


def replay(task: Task, land: Landscape) -> dict[str, Any]:
    """One search: the trials to the goal, and the steps that they trained."""
    config = SweepConfig(sampler=task.sampler, seed=task.seed, startup=task.startup)
    space = space_of(SPACE)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.pruner = pruner_of(task, land)
    left = np.ones(len(land.losses), dtype=bool)
    steps, best = 0, math.inf
    for number in range(task.limit):
        # the start is every sampler's own, as in a sweep, by the nearest point
        study.sampler = make_sampler(config, SPACE, number)
        model = None
        if number >= task.startup and not task.nearest:
            names = np.flatnonzero(left)
            candidates = [land.params[k] for k in names]
            model = choosing(task.sampler, task.seed + 1000 * number, space, candidates)
        if model is None:
            trial = study.ask(space)
            place = to_unit(space, trial.params)
        else:
            study.sampler = optuna.samplers.RandomSampler(seed=0)
            trial = study.ask()
            place = to_unit(space, choice(model, study, trial, space))
        gap = ((land.places - place) ** 2).sum(axis=1)
        point = int(np.where(left, gap, math.inf).argmin())
        left[point] = False
        move(study, trial, land.params[point])
        state, done = train(trial, land, point)
        value = float(land.losses[point]) if state == TrialState.COMPLETE else None
        study.tell(trial, value, state=state)
        steps += done
        if state == TrialState.COMPLETE:
            best = min(best, float(land.regret[point]))
        if stops(task, config, study, best):
            return {"trials": number + 1, "steps": steps, "reached": True, "regret": best}
    return {"trials": task.limit, "steps": steps, "reached": False, "regret": best}


def stops(task: Task, config: SweepConfig, study: optuna.Study, best: float) -> bool:
    """Whether a search ends: at the goal, or where `sweep.stop` would end it."""
    if not task.enough:
        return best < GOAL
    if len(study.trials) <= task.startup:
        return False
    found = outlook(config, SPACE, study)
    return found is not None and found.enough


def move(study: optuna.Study, trial: optuna.Trial, params: dict[str, float]) -> None:
    """Puts a trial under way where the recorded point lies."""
    for name, distribution in space_of(SPACE).items():
        study._storage.set_trial_param(trial._trial_id, name, params[name], distribution)


def train(trial: optuna.Trial, land: Landscape, point: int) -> tuple[TrialState, int]:
    """Tells a trial its rungs; returns how it ended and after how many steps."""
    for step, losses in land.rungs.items():
        if math.isnan(losses[point]):
            return TrialState.FAIL, step
        trial.report(float(losses[point]), step)
        if trial.should_prune():
            return TrialState.PRUNED, step
    failed = math.isnan(land.losses[point])
    return TrialState.FAIL if failed else TrialState.COMPLETE, land.steps


def pruner_of(task: Task, land: Landscape) -> optuna.pruners.BasePruner:
    """The pruner; all compare losses at equal steps."""
    if task.pruner == "none":
        return optuna.pruners.NopPruner()
    if task.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=task.startup)
    steps = [*land.rungs, land.steps]
    return HalvingPruner(steps, startup=task.startup, factor=int(task.pruner))


_loaded: dict[str, Landscape] = {}


def work(task: Task) -> dict[str, Any]:
    """A replay in a process of its own."""
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    if task.landscape not in _loaded:
        _loaded[task.landscape] = load(task.landscape)
    return {"arm": task.arm, "seed": task.seed, **replay(task, _loaded[task.landscape])}


def summary(frame: pd.DataFrame, column: str, reference: str) -> dict[str, Any]:
    """Quartiles by arm, and the ratio of medians to the reference's with its 95% interval.

    The interval is by bootstrap over replays, which are drawn in pairs, as they share their start.
    """
    table = frame.pivot(index="seed", columns="arm", values=column)
    draws = np.random.default_rng(0).integers(len(table), size=(RESAMPLES, len(table)))
    medians = {arm: np.median(table[arm].to_numpy()[draws], axis=1) for arm in table}
    found = {}
    for arm in frame["arm"].unique():
        values = table[arm]
        low, high = np.quantile(medians[arm] / medians[reference], [0.025, 0.975])
        found[arm] = {
            "median": float(values.median()),
            "quartiles": [float(values.quantile(q)) for q in (0.25, 0.75)],
            "mean": float(values.mean()),
            "missed": float(1 - frame.loc[frame["arm"] == arm, "reached"].mean()),
            f"ratio to {reference}": float(values.median() / table[reference].median()),
            "interval": [float(low), float(high)],
        }
    return found


def quantiles(regret: pd.Series[float]) -> dict[str, float | None]:
    """Of the regret, in standard deviations over seeds."""
    found = {q: float(regret.quantile(q, interpolation="nearest")) for q in (0.25, 0.5, 0.75, 0.9)}
    return {str(q): value if math.isfinite(value) else None for q, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("samplers", "pruners", "stopping"))
    parser.add_argument("landscape")
    parser.add_argument("--replays", type=int, default=100)
    parser.add_argument("--startup", type=int, default=SweepConfig().startup)
    parser.add_argument("--limit", type=int, default=150)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--sampler", action="append", choices=SAMPLERS)
    parser.add_argument("--pruner", action="append", choices=PRUNERS)
    parser.add_argument("--nearest", action="store_true", help="take the point nearest a proposal")
    parser.add_argument("--out", type=Path, default=Path("runs/sampler_replay"))
    args = parser.parse_args()
    started = time.monotonic()
    samplers = args.sampler or (SAMPLERS if args.what == "samplers" else ("tpe",))
    pruners = args.pruner or (PRUNERS if args.what == "pruners" else ("none",))
    tasks = [
        Task(landscape=args.landscape, sampler=sampler, pruner=pruner, seed=seed,
             startup=args.startup, limit=args.limit, enough=args.what == "stopping",
             nearest=args.nearest)
        for seed in range(args.replays) for sampler in samplers for pruner in pruners
    ]  # fmt: skip
    frame = pd.DataFrame(run(tasks, args.workers))
    column, reference = "trials", f"tpe{' (nearest)' * args.nearest}, {pruners[0]}"
    if args.what == "pruners":
        column, reference = "steps", f"{samplers[0]}, median"
    until = f"the regret is below {GOAL:g} standard deviation over seeds"
    if args.what == "stopping":
        until = "no trial is expected to gain half the noise"
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "counted": f"{column} until {until}",
        "arms": summary(frame, column, reference),
        "replays": args.replays,
        "startup": args.startup,
        "limit": args.limit,
        "by_replay": {arm: rows.sort_values("seed")[column].to_list()
                      for arm, rows in frame.groupby("arm", sort=False)},
        "regret_at_the_end": quantiles(frame["regret"]) if args.what == "stopping" else None,
        "seconds": time.monotonic() - started,
        "machine": f"{processor()}, {args.workers} processes of one thread",
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "optuna": optuna.__version__},
    }  # fmt: skip
    write_json(args.out / f"{args.landscape}_{args.what}{'_nearest' * args.nearest}.json", result)
    for arm, row in result["arms"].items():
        print(arm, row)


def run(tasks: Sequence[Task], workers: int) -> list[dict[str, Any]]:
    """All replays, with their progress."""
    context, rows = multiprocessing.get_context("spawn"), []
    with ProcessPoolExecutor(workers, mp_context=context) as pool, Display() as display:
        for row in pool.map(work, tasks):
            rows.append(row)
            line = f"replay {row['seed']}, {row['arm']}: {row['trials']} trials"
            display(line, len(rows) / len(tasks))
    return rows


if __name__ == "__main__":
    main()
