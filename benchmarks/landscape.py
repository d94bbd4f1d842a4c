r"""Loss landscapes of real proxy runs, for the replay of samplers and pruners.

    python benchmarks/landscape.py record stdlib --out benchmarks/results/landscapes
    python benchmarks/landscape.py record wikitext2 --range 340 --centre 170 --repeat 20 --seeds 5 \
        --out benchmarks/results/landscapes

Five multipliers are searched over the ranges that experiments have by default. First come Sobol
points of the whole ranges, all with seed 0. Around the best of them, where a search spends most of
its trials, come as many again: Sobol points of the box that holds the best. Then the best of all
are repeated over more seeds, so that the standard deviation over seeds is known, and with it the
loss of the best points beyond the luck of one seed.

Every run is on record in a ledger under `runs/`: start again to go on.
"""

from __future__ import annotations

import argparse
import math
import platform
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from machine import processor
from numpy.typing import NDArray

from mutransfer.files import atomic_path, write_json
from mutransfer.progress import Display
from mutransfer.rules import BaseParams
from proxies.run import RunResult, RunSpec
from sweeps.experiment import Experiment, load_experiment
from sweeps.pool import Job, PoolConfig, run_missing
from sweeps.workspace import Workspace

SEARCH = {
    "lr": (2**-10, 2**-3),
    "init_std": (0.01, 0.2),
    "embedding_multiplier": (1.0, 32.0),
    "output_multiplier": (0.5, 32.0),
    "residual_multiplier": (0.25, 4.0),
}
LOG_LOW, LOG_HIGH = np.log([*SEARCH.values()]).T
TRAIN = {"steps": 120, "batch_size": 8, "seq_len": 64, "heldout_tokens": 16384, "rungs": 8}
LANDSCAPES = {
    "stdlib": ("quickstart", 32, TRAIN),
    "wikitext2": ("wikitext2", 64, TRAIN | {"steps": 80, "heldout_tokens": 4096}),
}
BEST = 16  # points whose bounding box is the centre


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    record = commands.add_parser("record", help="record a landscape")
    record.add_argument("name", choices=LANDSCAPES)
    record.add_argument("--range", type=int, default=512, help="points in the whole ranges")
    record.add_argument("--centre", type=int, default=256, help="points around the best of them")
    record.add_argument("--repeat", type=int, default=40, help="best points to be repeated")
    record.add_argument("--seeds", type=int, default=8, help="seeds of those")
    record.add_argument("--out", type=Path, default=Path("runs/landscapes"))
    args = parser.parse_args()
    workspace = Workspace(experiment(args.name), Path("runs/landscapes") / args.name)
    rows: list[dict[str, Any]] = []
    whole = sobol(args.range, LOG_LOW, LOG_HIGH, seed=0)
    rows += run(workspace, "range", [(p, x, 0) for p, x in enumerate(whole)])
    low, high = centre(pd.DataFrame(rows))
    inner = sobol(args.centre, low, high, seed=1)
    rows += run(workspace, "centre", [(args.range + p, x, 0) for p, x in enumerate(inner)])
    best = pd.DataFrame(rows).nsmallest(args.repeat, "loss")["point"]
    points = np.concatenate([whole, inner])
    rows += run(
        workspace, "seeds", [(p, points[p], seed) for p in best for seed in range(1, args.seeds)]
    )
    frame = pd.DataFrame(rows)
    with atomic_path(args.out / f"{args.name}.parquet") as path:
        frame.to_parquet(path, index=False)
    write_json(args.out / f"{args.name}.json", about(workspace, frame))


def experiment(name: str) -> Experiment:
    """The experiment whose proxy is run."""
    shipped, d_model, train = LANDSCAPES[name]
    given = load_experiment(shipped).canonical
    search = {key: {"low": low, "high": high} for key, (low, high) in SEARCH.items()}
    return Experiment.model_validate(
        given
        | {"name": f"landscape-{name}", "search": search, "train": given["train"] | train}
        | {"proxy": given["proxy"] | {"d_model": d_model}}
        | {"transfer_check": given["transfer_check"] | {"widths": [d_model, 2 * d_model]}}
        | {"params": BaseParams().model_dump()}
    )


def sobol(n: int, low: NDArray[Any], high: NDArray[Any], *, seed: int) -> NDArray[Any]:
    """`n` scrambled Sobol points between two corners, in the logarithm; shape `(n, 5)`."""
    engine = torch.quasirandom.SobolEngine(len(low), scramble=True, seed=seed)
    points: NDArray[Any] = low + (high - low) * engine.draw(n, dtype=torch.float64).numpy()
    return points


def centre(frame: pd.DataFrame) -> tuple[NDArray[Any], NDArray[Any]]:
    """The corners of the box that holds the best points."""
    best = np.log(frame.nsmallest(BEST, "loss")[[*SEARCH]].to_numpy())
    return best.min(axis=0), best.max(axis=0)


def run(
    workspace: Workspace, phase: str, points: list[tuple[int, NDArray[Any], int]]
) -> Iterator[dict[str, Any]]:
    """Runs what is missing and yields a row per run."""
    base = workspace.experiment.base
    jobs = []
    for point, x, seed in points:
        values = dict(zip(SEARCH, map(float, np.exp(x)), strict=True))
        spec = workspace.spec(base, BaseParams.model_validate(values), seed)
        jobs.append(Job(spec, f"point {point}, seed {seed}"))
    pool = PoolConfig(workers=1, threads=1, compile=True)
    with workspace.ledger() as ledger, Display() as display:
        display(f"{workspace.experiment.name}: {phase}, {len(jobs)} runs")
        folder = workspace.corpus.folder
        run_missing(pool, folder, ledger, jobs, lambda job: f"{phase}: {job.tag}", display)
        for job, (point, _, seed) in zip(jobs, points, strict=True):
            result = ledger.get(job.spec.key)
            assert result is not None, "it was run just now"
            yield {"point": point, "phase": phase, "seed": seed, **row(job.spec, result)}


def row(spec: RunSpec, result: RunResult) -> dict[str, Any]:
    """Hyperparameters, the loss (nats; NaN where it diverged), that at every rung, seconds."""
    at, steps = dict(result.evaluations), spec.train.steps
    rungs = [round(steps * i / spec.train.rungs) for i in range(1, spec.train.rungs + 1)]
    return {
        **{name: getattr(spec.params, name) for name in SEARCH},
        "loss": math.nan if result.loss is None else result.loss,
        **{f"loss_at_{step}": at.get(step, math.nan) for step in rungs},
        "diverged_at": result.diverged_at,
        "seconds": result.seconds,
    }


def about(workspace: Workspace, frame: pd.DataFrame) -> dict[str, Any]:
    """What the landscape was made of, and what is known of its noise."""
    seeds = frame.groupby("point")["loss"]
    repeated = seeds.filter(lambda losses: len(losses) > 1).groupby(frame["point"])
    corpus, e = workspace.corpus, workspace.experiment
    return {
        "command": shlex.join(["python", *sys.argv]),
        "experiment": e.canonical,
        "experiment_sha256": e.sha256,
        "data_fingerprint": corpus.fingerprint,
        "epochs": e.train.horizon_tokens / corpus.train_tokens,
        "runs": len(frame),
        "points": int(frame["point"].nunique()),
        "diverged": int(frame["loss"].isna().sum()),
        "seed_standard_deviation": math.sqrt(float(repeated.var().mean())),
        "best_mean_loss": float(repeated.mean().min()),
        "seconds": float(frame["seconds"].sum()),
        "machine": f"{processor()}, one thread",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


if __name__ == "__main__":
    main()
