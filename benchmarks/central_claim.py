"""The central claim: tune the default small and carry over, against SP tuned at full width.

    python benchmarks/central_claim.py --trials 40 --out runs/central-claim

Both arms have the same number of trials, the same knobs, ranges, sampler, seeds and tokens.
The first searches `completep-tied` at the smallest width of the experiment and is carried to the
largest untouched. The second searches `sp` at the largest width itself. Both winners then train at
the largest width on fresh seeds; reported is the mean paired difference in held-out loss with its
95% t interval.

The ranges are wider than the experiment's. At 8x the width, `sp` needs what μP does for itself:
a learning rate and an output multiplier 8x lower and an embedding learning rate ratio 8x higher.
Ranges that leave those out would let `sp` lose for a reason of our making.

A winner at an end of a range raises the question of what lies beyond: there, each arm's winner is
trained on the fresh seeds with that value at half and a quarter (or twice and four times) as well.

Every run is on record in a ledger: start again to go on.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import torch

from mutransfer.files import write_json
from mutransfer.progress import Display
from mutransfer.rules import BaseParams
from mutransfer.student import student_t
from sweeps.desk import Job
from sweeps.experiment import Experiment, load_experiment
from sweeps.pool import PoolConfig, run_missing
from sweeps.sweep import run_sweep
from sweeps.workspace import Workspace

SEARCH = {
    "lr": {"low": 2**-13, "high": 2**-3},
    "embedding_lr_ratio": {"low": 2**-2, "high": 2**6},
    "init_std": {"low": 0.01, "high": 0.3},
    "embedding_multiplier": {"low": 1.0, "high": 32.0},
    "output_multiplier": {"low": 2**-5, "high": 2**5},
    "residual_multiplier": {"low": 0.25, "high": 4.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiment", default="wikitext2")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=5)
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
    shared = given | {"search": SEARCH, "sweep": budget}
    arms = {
        "tuned small": shared | {"name": "tuned-small"},
        "sp tuned large": shared | {"name": "sp-tuned-large", "parametrization": "sp",
                                    "contrast": [], "proxy": given["proxy"] | {"d_model": wide}},
    }  # fmt: skip
    losses: dict[str, list[float]] = {}
    chosen, beyond = {}, {}
    for arm, record in arms.items():
        workspace = Workspace(Experiment.model_validate(record), args.out / record["name"])
        with Display() as display:
            display(arm)
            params, trial = run_sweep(workspace, pool, progress=display)
        chosen[arm] = {
            "trial": trial.number,
            "d_model_where_tuned": workspace.experiment.base.d_model,
            "mean_loss_where_tuned": trial.mean_loss,
            "params": params.model_dump(),
            "place_in_range": {name: _place(name, getattr(params, name)) for name in SEARCH},
        }
        losses[arm] = train_fresh(workspace, wide, params, args.seeds, pool)
        beyond[arm] = [
            {"changed": changed, "losses": train_fresh(workspace, wide, other, args.seeds, pool)}
            for changed, other in beyond_the_ends(params)
        ]

    difference = [a - b for a, b in zip(*losses.values(), strict=True)]
    mean = statistics.fmean(difference)
    error = statistics.stdev(difference) / math.sqrt(len(difference))
    half = student_t(len(difference) - 1) * error
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
        "beyond_the_ends_of_the_ranges": beyond,
        "search": SEARCH,
        "seconds": time.monotonic() - started,
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "optuna": optuna.__version__, "machine": f"{args.workers} workers, CPU"},
    }  # fmt: skip
    write_json(args.out / "central_claim.json", result)
    print(json.dumps(result, indent=2))


def train_fresh(
    workspace: Workspace, d_model: int, params: BaseParams, seeds: int, pool: PoolConfig
) -> list[float]:
    """Held-out losses at a width on seeds that no search has seen."""
    model = workspace.experiment.model_at(d_model)
    jobs = [Job(workspace.spec(model, params, s), s) for s in range(1000, 1000 + seeds)]
    with workspace.ledger() as ledger, Display() as display:
        run_missing(pool, workspace.corpus.folder, ledger, jobs,
                    lambda job: f"fresh seed {job.tag}", display)  # fmt: skip
        results = [ledger.get(job.spec.key) for job in jobs]
    return [r.loss if r and r.loss is not None else math.inf for r in results]


def beyond_the_ends(params: BaseParams) -> Iterator[tuple[dict[str, float], BaseParams]]:
    """The winner again, with a value at an end of its range moved beyond that end."""
    for name in SEARCH:
        place = _place(name, getattr(params, name))
        if 0.05 < place < 0.95:
            continue
        for octaves in (1, 2):
            value = getattr(params, name) * 2.0 ** (octaves if place > 0.5 else -octaves)
            yield {name: value}, params.model_copy(update={name: value})


def _place(name: str, value: float) -> float:
    """Where a value lies in its range, from 0 to 1, in the logarithm."""
    low, high = SEARCH[name]["low"], SEARCH[name]["high"]
    return math.log(value / low) / math.log(high / low)


if __name__ == "__main__":
    main()
