"""The central claim: tune the default small and carry over, against SP tuned at full width.

    python benchmarks/central_claim.py --trials 24 --out runs/central-claim

Both arms have the same number of trials, the same knobs, ranges, sampler, seeds and tokens.
Arm A searches `completep-tied` at the smallest width of the experiment and is carried to the
largest untouched. Arm B searches `sp` at the largest width itself. Both winners then train at
the largest width on fresh seeds; reported is the mean paired difference A - B in held-out
loss with its 95% t interval. Every run is on record in a ledger: start again to go on.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from pathlib import Path

import optuna
import torch

from mutransfer.files import write_json
from proxies.run import RunResult
from sweeps.experiment import Experiment, load_experiment
from sweeps.pool import Job, PoolConfig, run_jobs
from sweeps.sweep import run_sweep
from sweeps.workspace import Workspace

T_975 = {4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiment", default="wikitext2")
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=5, choices=range(5, 11))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/central-claim"))
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    started = time.monotonic()
    pool = PoolConfig(workers=args.workers)

    given = load_experiment(args.experiment).canonical
    wide = max(given["transfer_check"]["widths"])
    budget = given["sweep"] | {"trials": args.trials, "startup": max(1, args.trials // 3),
                               "confirm": 3, "confirm_seeds": 3}  # fmt: skip
    arms = {
        "tuned small": given | {"name": "tuned-small", "sweep": budget},
        "sp tuned large": given
        | {"name": "sp-tuned-large", "sweep": budget, "parametrization": "sp",
           "proxy": given["proxy"] | {"d_model": wide}},
    }  # fmt: skip
    losses: dict[str, list[float]] = {}
    chosen = {}
    for arm, record in arms.items():
        workspace = Workspace(Experiment.model_validate(record), args.out / record["name"])
        params, trial = run_sweep(workspace, pool, progress=lambda line, a=arm: say(a, line))
        chosen[arm] = {"trial": trial.number, "mean_loss_where_tuned": trial.mean_loss,
                       "params": params.model_dump()}  # fmt: skip
        model = workspace.experiment.model_at(wide)
        specs = {s: workspace.spec(model, params, s) for s in range(1000, 1000 + args.seeds)}
        with workspace.ledger() as ledger:

            def done(job: Job, result: RunResult | None, a: str = arm) -> None:
                assert result is not None
                ledger.add(result)
                say(a, f"fresh seed {job.tag}: {result.loss}")

            todo = iter([Job(spec, seed) for seed, spec in specs.items()
                         if ledger.get(spec.key) is None])  # fmt: skip
            run_jobs(pool, workspace.corpus.folder, lambda t=todo: next(t, None), done)
            results = [ledger.get(spec.key) for spec in specs.values()]
        losses[arm] = [r.loss if r and r.loss is not None else math.inf for r in results]

    difference = [a - b for a, b in zip(*losses.values(), strict=True)]
    mean = statistics.fmean(difference)
    half = T_975[len(difference) - 1] * statistics.stdev(difference) / math.sqrt(len(difference))
    result = {
        "claim": "mean of (tuned small and carried over) - (sp tuned large), nats",
        "mean": mean,
        "low": mean - half,
        "high": mean + half,
        "seeds": len(difference),
        "d_model": wide,
        "trials_per_arm": args.trials,
        "losses": losses,
        "chosen": chosen,
        "seconds": time.monotonic() - started,
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "optuna": optuna.__version__, "machine": f"{args.workers} workers, CPU"},
    }  # fmt: skip
    write_json(args.out / "central_claim.json", result)
    print(json.dumps({k: v for k, v in result.items() if k != "chosen"}, indent=2))


def say(arm: str, line: str) -> None:
    print(f"{arm}: {line}", flush=True)


if __name__ == "__main__":
    main()
