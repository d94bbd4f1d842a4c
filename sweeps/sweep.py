"""The sweep: search, repeat the best over seeds, choose, and write down what was found."""

from __future__ import annotations

import math
import shutil
from contextlib import nullcontext
from pathlib import Path

import optuna

from mutransfer.bundle_evidence import Study, Trial
from mutransfer.files import atomic_path
from mutransfer.progress import Report, part, quiet
from mutransfer.rules import BaseParams
from sweeps.experiment import Experiment
from sweeps.first_points import enqueue_first
from sweeps.lease import LEASE, Lease
from sweeps.pool import PoolConfig
from sweeps.selection import confirm, read_trials, steps_taken, trials_frame
from sweeps.study import Search, open_study, params_of
from sweeps.workspace import Workspace

_BORDER = 0.02  # of a range, in the logarithm


def run_sweep(
    workspace: Workspace,
    pool: PoolConfig,
    *,
    trials: int | None = None,
    storage: str | None = None,
    lease: float = LEASE,
    progress: Report = quiet,
) -> tuple[BaseParams, Trial]:
    """Runs or resumes the sweep of an experiment and leaves its results.

    Leaves `sweep.json`, `trials.csv` and plots in the folder `sweep` of the workspace. The
    verdict is WARN where a winning value lies at an end of its range, else PASS.

    Args:
        workspace: The experiment's folder.
        pool: How the machine is shared out.
        trials: Budget of trials in all, over every start; the experiment's by default.
        storage: URL of an Optuna RDB storage, which any number of processes may work on; an
            embedded journal by default.
        lease: Seconds without a sign of life after which another process's trials are tried again.
        progress: Takes one line per event. The runs of the search and of the seeds that confirm
            the best trials count alike.

    Returns:
        The base hyperparameters that won, and their trial.

    Raises:
        UserError: Another process is at it, or no trial came out good.
    """
    e, folder = workspace.experiment, workspace.folder("sweep")
    with workspace.ledger() as ledger:
        study = open_study(e, workspace.corpus.fingerprint, folder, storage, progress)
        enqueue_first(study, e)
        budget = trials or e.sweep.trials
        runs = budget * e.sweep.seeds
        share = runs / (runs + e.sweep.confirm * (e.sweep.confirm_seeds - e.sweep.seeds))
        first, then = part(progress, 0.0, share), part(progress, share, 1.0)
        with Lease(study, lease) if storage else nullcontext() as place:
            Search(workspace, study, ledger, trials=budget, lease=place, progress=first).run(pool)
        record = confirm(workspace, read_trials(study), ledger, pool, then)
        shutil.rmtree(workspace.root / "unfinished", ignore_errors=True)  # nothing is in work
    frame = trials_frame(workspace, record, steps_taken(study, e.train.steps))
    with atomic_path(folder / "trials.csv") as path:
        frame.to_csv(path, index=False)
    best = _winner(record)
    params = params_of(e, best.params)
    borders = at_borders(e, params)
    for line in borders:
        progress(line)
    workspace.save(
        "sweep",
        "WARN" if borders else "PASS",
        {
            "at_borders": borders,
            "best_trial": best.number,
            "mean_loss": best.mean_loss,
            "standard_error": best.standard_error,
            "base_hyperparameters": params.model_dump(),
            "epochs": e.train.horizon_tokens / workspace.corpus.train_tokens,
            "study": record.model_dump(mode="json"),
        },
    )
    _draw(study, best.number, folder)
    return params, best


def at_borders(experiment: Experiment, params: BaseParams) -> list[str]:
    """A sentence for each winning value that lies at an end of its range."""
    found = []
    for name, bounds in experiment.search.items():
        value = getattr(params, name)
        place = math.log(value / bounds.low) / math.log(bounds.high / bounds.low)
        if not _BORDER <= place <= 1 - _BORDER:
            which = "lower" if place < 0.5 else "upper"
            found.append(f"{name} = {value:.4g} won at the {which} end of its range, "
                         f"{bounds.low:.4g} … {bounds.high:.4g}: widen it there")  # fmt: skip
    return found


def load_sweep(workspace: Workspace) -> tuple[BaseParams, Study]:
    """The base hyperparameters that the experiment's sweep chose, and the study behind them.

    Raises:
        UserError: There is no sweep of this experiment yet.
    """
    study = Study.model_validate(workspace.load("sweep")["study"])
    return params_of(workspace.experiment, _winner(study).params), study


def _winner(study: Study) -> Trial:
    assert study.winner is not None, "confirm() returns no study without a winner"
    return study.winner


def _draw(study: optuna.Study, best: int, folder: Path) -> None:
    from sweeps.plots import sweep_figures

    for name, figure in sweep_figures(study, best).items():
        with atomic_path(folder / f"{name}.png") as path:
            figure.savefig(path, format="png", dpi=150)
