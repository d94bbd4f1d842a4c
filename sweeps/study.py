"""The Optuna study of an experiment: asked and told by one process, resumed by itself."""

from __future__ import annotations

import os
import socket
from collections import deque
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from mutransfer.bundle_evidence import mean_and_error
from mutransfer.errors import UserError
from mutransfer.progress import Report, quiet
from mutransfer.rules import BaseParams
from proxies.run import RunResult
from sweeps.experiment import Experiment, first_difference
from sweeps.ledger import Ledger
from sweeps.pool import Job, PoolConfig, run_jobs
from sweeps.pruner import HalvingPruner
from sweeps.sampler import make_sampler, outlook
from sweeps.storage import connect, place
from sweeps.workspace import Workspace


def open_study(
    experiment: Experiment, data: str, folder: Path, storage: str | None = None
) -> optuna.Study:
    """Creates or resumes the study called like the experiment.

    With the embedded storage the caller holds the experiment's ledger; see `storage.connect`.

    Args:
        experiment: The experiment; a study of another one is refused.
        data: Fingerprint of its text; a study on another one is refused, as the losses of its
            trials do not compare.
        folder: Where the embedded storage, an Optuna journal, lies.
        storage: URL of an Optuna RDB storage to use in its place.

    Raises:
        UserError: A study of this name searches another experiment or another text, or the
            storage cannot be used.
    """
    study = connect(experiment.name, folder, storage)
    known = study.user_attrs
    cure = "Give the experiment another name, or --out another folder."
    if known.get("experiment", experiment.canonical) != experiment.canonical:
        raise UserError(
            "a study of this name searches another experiment",
            where=place(folder, storage),
            got=first_difference(known["experiment"], experiment.canonical),
            cure=cure,
        )
    if known.get("data", data) != data:
        raise UserError(
            "a study of this name searches on another text",
            where=place(folder, storage),
            got=f"the fingerprint {known['data']}",
            expected=data,
            cure=cure,
        )
    for name, value in (("experiment", experiment.canonical), ("data", data)):
        if name not in known:
            study.set_user_attr(name, value)
    return study


def budget_used(study: optuna.Study) -> int:
    """Trials that count: all but those that were cut off and asked anew."""
    return sum(
        "interrupted" not in t.user_attrs and t.state != TrialState.WAITING
        for t in study.get_trials(deepcopy=False)
    )


def requeue_interrupted(study: optuna.Study, *, exclusive: bool) -> list[int]:
    """Gives up trials whose process is gone and queues their parameters again.

    The parameters are queued first, so that a process killed in here loses none: the next one
    finds the trial still running, and sees that it is continued already.

    Args:
        study: The study.
        exclusive: Whether this process is known to be the only one at work, as it is with the
            embedded storage, whose ledger is locked. Otherwise only trials of dead processes
            of this host are taken.

    Returns:
        The numbers of the trials.
    """
    found = []
    trials = study.get_trials(deepcopy=False)
    continued = {trial.user_attrs.get("continues") for trial in trials}
    for trial in trials:
        if trial.state != TrialState.RUNNING:
            continue
        if exclusive or _owner_is_dead(trial.user_attrs.get("owner", "")):
            if trial.number not in continued:
                # cut off again before it had taken up all that was queued for it
                params = trial.system_attrs.get("fixed_params", {}) | trial.params
                if params:  # cut off before it had drawn any, there is nothing to lose
                    study.enqueue_trial(params, user_attrs={"continues": trial.number})
            optuna.Trial(study, trial._trial_id).set_user_attr("interrupted", True)
            study.tell(trial.number, state=TrialState.FAIL)
            found.append(trial.number)
    return found


def _owner() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


def _owner_is_dead(owner: str) -> bool:
    host, _, pid = owner.rpartition(":")
    if host != socket.gethostname() or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


class Search:
    """One sitting at a study: asks, trains, tells, until the budget is used.

    A trial is one or more seeds. The seeds of a trial run one after another; a seed that is
    on record in the ledger is not run again.

    Args:
        workspace: The experiment's folder.
        study: What `open_study` returned.
        ledger: The open ledger.
        trials: Budget of trials in all, over every start.
        progress: Takes one line per finished trial; the search is its whole.
    """

    def __init__(
        self,
        workspace: Workspace,
        study: optuna.Study,
        ledger: Ledger,
        *,
        trials: int,
        progress: Report = quiet,
    ) -> None:
        self.workspace, self.study, self.ledger = workspace, study, ledger
        self.trials, self.progress = trials, progress
        self._config = workspace.experiment.sweep
        self._queue: deque[Job] = deque()
        self._losses: dict[int, dict[int, float]] = {}
        self._asked: dict[int, optuna.Trial] = {}

    def run(self, pool: PoolConfig) -> None:
        """Works until the budget is used and every trial is told."""
        run_jobs(
            pool,
            self.workspace.corpus.folder,
            self._next,
            self._done,
            self._report if self._config.pruning else None,
        )

    def _next(self) -> Job | None:
        while True:
            if self._queue:
                job = self._queue.popleft()
            elif budget_used(self.study) < self.trials and not self._enough():
                job = self._job(self._ask(), seed=0)
            else:
                return None
            known = self.ledger.get(job.spec.key)
            if known is None:
                return job
            self._done(job, known)

    def _enough(self) -> bool:
        """Whether the search ends early: another trial is not expected to gain much."""
        if not self._config.stop or budget_used(self.study) <= self._config.startup:
            return False
        found = outlook(self._config, self.workspace.experiment.search, self.study)
        if found is None:
            return False
        gain, noise = f"{found.gain:.4f}", f"{found.noise:.4f}"
        self.progress(f"another trial is expected to gain {gain} nats; the noise is {noise}")
        return found.enough

    def _ask(self) -> optuna.Trial:
        config, space = self._config, self.workspace.experiment.search
        self.study.sampler = make_sampler(config, space, _next_number(self.study))
        self.study.pruner = HalvingPruner(
            self.workspace.experiment.train.evaluate_after, startup=config.startup
        )
        trial = self.study.ask()
        trial.set_user_attr("owner", _owner())
        for name, bounds in space.items():
            trial.suggest_float(name, bounds.low, bounds.high, log=True)
        self._losses[trial.number] = {}
        self._asked[trial.number] = trial
        return trial

    def _job(self, trial: optuna.Trial, seed: int) -> Job:
        e = self.workspace.experiment
        spec = self.workspace.spec(e.base, params_of(e, trial.params), seed)
        return Job(spec=spec, tag=trial.number)

    def _report(self, job: Job, step: int, loss: float) -> bool:
        """Reports the first seed's rungs; every trial has the same schedule, so steps compare."""
        trial = self._asked[job.tag]
        if job.spec.seed != 0 or step >= job.spec.train.steps:
            return False
        trial.report(loss, step)
        return trial.should_prune()

    def _done(self, job: Job, result: RunResult | None) -> None:
        trial = self._asked[job.tag]
        if result is None:
            self._tell(trial, TrialState.PRUNED)
            return
        if self.ledger.get(result.key) is None:
            self.ledger.add(result)
        if result.loss is None:
            trial.set_user_attr("diverged_at", result.diverged_at)
            self._tell(trial, TrialState.FAIL)
            return
        losses = self._losses[trial.number]
        losses[job.spec.seed] = result.loss
        trial.set_user_attr("losses", {str(seed): loss for seed, loss in losses.items()})
        if len(losses) < self._config.seeds:
            self._queue.append(self._job(trial, seed=job.spec.seed + 1))
        else:
            self._tell(trial, TrialState.COMPLETE, sum(losses.values()) / len(losses))

    def _tell(self, trial: optuna.Trial, state: TrialState, value: float | None = None) -> None:
        self.study.tell(trial, value, state=state)
        del self._asked[trial.number], self._losses[trial.number]
        done = sum(
            t.state.is_finished() and "interrupted" not in t.user_attrs
            for t in self.study.get_trials(deepcopy=False)
        )
        outcome = f"loss {value:.4f}" if value is not None else _WORDS[state]
        line = f"trial {trial.number} {outcome} · {done} of {self.trials}"
        self.progress(f"{line} · best {_best(self.study)}", done / max(done, self.trials))


def _next_number(study: optuna.Study) -> int:
    """The number of the trial that `ask` gives next: the first one queued, or a new one."""
    trials = study.get_trials(deepcopy=False)
    queued = (trial.number for trial in trials if trial.state == TrialState.WAITING)
    return min(queued, default=len(trials))


_WORDS = {TrialState.PRUNED: "pruned", TrialState.FAIL: "diverged"}


def _best(study: optuna.Study) -> str:
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not done:
        return "none yet"
    best = min(done, key=_value)
    _, error = mean_and_error(list(best.user_attrs.get("losses", {}).values()))
    spread = "" if error is None else f" ± {error:.4f}"
    return f"{_value(best):.4f}{spread} (trial {best.number})"


def _value(trial: FrozenTrial) -> float:
    assert trial.value is not None
    return trial.value


def params_of(experiment: Experiment, searched: dict[str, Any]) -> BaseParams:
    """The base hyperparameters of a trial: what was searched over what was fixed."""
    return BaseParams.model_validate(experiment.params.model_dump() | searched)
