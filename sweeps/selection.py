"""From trials to one set of base hyperparameters: the best few, repeated over seeds."""

from __future__ import annotations

from collections.abc import Sequence

import optuna
import pandas as pd
from optuna.trial import TrialState

from mutransfer.bundle_evidence import Study, Trial
from mutransfer.errors import UserError
from mutransfer.progress import Report, quiet
from sweeps.desk import Job
from sweeps.interrupted import is_interrupted
from sweeps.ledger import Ledger
from sweeps.pool import PoolConfig, run_missing
from sweeps.study import params_of
from sweeps.workspace import Workspace


def read_trials(study: optuna.Study) -> list[Trial]:
    """Every trial of a study that was started, in order, as the bundle records them."""
    return [
        Trial.of(
            t.number,
            "INTERRUPTED" if is_interrupted(t) else t.state.name,  # type: ignore[arg-type]
            t.params,
            {int(seed): loss for seed, loss in t.user_attrs.get("losses", {}).items()},
        )
        for t in study.get_trials(deepcopy=False)
        if t.state != TrialState.WAITING
    ]


def confirm(
    workspace: Workspace,
    trials: Sequence[Trial],
    ledger: Ledger,
    pool: PoolConfig,
    progress: Report = quiet,
) -> Study:
    """Repeats the best trials over more seeds, so that luck does not choose the winner.

    Returns:
        The study with the losses of every seed of the confirmed trials.

    Raises:
        UserError: No trial is complete, or none has a finite loss on every seed.
    """
    e = workspace.experiment
    seeds = tuple(range(e.sweep.confirm_seeds))
    complete = [t for t in trials if t.state == "COMPLETE" and t.mean_loss is not None]
    if not complete:
        raise UserError(
            "no trial is complete",
            where="sweep",
            got=", ".join(sorted({t.state.lower() for t in trials})) or "no trials",
            cure="Search lower learning rates, or run more trials.",
        )
    best = sorted(complete, key=lambda t: (t.mean_loss, t.number))[: e.sweep.confirm]
    specs = {
        (t.number, seed): workspace.spec(e.base, params_of(e, t.params), seed)
        for t in best
        for seed in seeds
    }

    def describe(job: Job) -> str:
        number, seed = job.tag
        return f"confirming trial {number}, seed {seed}"

    jobs = [Job(spec, key) for key, spec in specs.items()]
    run_missing(pool, workspace.corpus.folder, ledger, jobs, describe, progress)
    confirmed = {}
    for t in best:
        results = {seed: ledger.get(specs[t.number, seed].key) for seed in seeds}
        losses = {seed: r.loss for seed, r in results.items() if r and r.loss is not None}
        confirmed[t.number] = Trial.of(t.number, t.state, t.params, losses)
    study = Study(
        name=e.name,
        selection="lowest_mean_loss",
        seeds=seeds,
        trials=tuple(confirmed.get(t.number, t) for t in trials),
    )
    if study.winner is None:
        raise UserError(
            "none of the best trials is finite on every seed",
            where="sweep",
            expected=f"{len(seeds)} seeds",
            cure="Search lower learning rates, or run more trials.",
        )
    return study


def trials_frame(workspace: Workspace, study: Study, steps: dict[int, int]) -> pd.DataFrame:
    """One row per trial, for `trials.csv`: hyperparameters, losses, size, tokens, epochs.

    Args:
        workspace: The experiment's folder.
        study: The confirmed study.
        steps: Steps that each trial took with its first seed, by number.
    """
    e = workspace.experiment
    rows = []
    for t in study.trials:
        tokens = steps.get(t.number, 0) * e.train.batch_tokens
        rows.append(
            {
                "number": t.number,
                "state": t.state,
                "mean_loss": t.mean_loss,
                "standard_error": t.standard_error,
                "seeds": len(t.losses),
                **(params_of(e, t.params).model_dump() if t.params else {}),
                "d_model": e.base.d_model,
                "n_nonembedding": e.base.n_nonembedding,
                "n_parameters": e.base.n_parameters,
                "tokens": tokens,
                "epochs": tokens / workspace.corpus.train_tokens,
                **{f"loss_seed_{seed}": loss for seed, loss in t.losses.items()},
            }
        )
    return pd.DataFrame(rows)


def steps_taken(study: optuna.Study, steps: int) -> dict[int, int]:
    """Steps of each trial's first seed: all, or up to where it was pruned or diverged."""
    return {
        t.number: steps
        if t.state == TrialState.COMPLETE
        else t.user_attrs.get("diverged_at") or t.last_step or 0
        for t in study.get_trials(deepcopy=False)
    }
