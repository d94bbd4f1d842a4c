"""The Optuna study of an experiment: asked and told by one process, resumed by itself."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from mutransfer.bundle_evidence import mean_and_error
from mutransfer.errors import UserError
from mutransfer.progress import Report, quiet
from mutransfer.rules import BaseParams
from proxies.run import RunResult
from sweeps.desk import Job
from sweeps.experiment import Experiment, first_difference
from sweeps.interrupted import (
    budget_used,
    give_up,
    is_interrupted,
    requeue_interrupted,
    require_same,
    superfluous,
)
from sweeps.lease import Lease
from sweeps.ledger import Ledger
from sweeps.pool import PoolConfig, run_jobs
from sweeps.pruner import HalvingPruner
from sweeps.sampler import make_sampler, outlook
from sweeps.storage import connect, place
from sweeps.workspace import Workspace


def open_study(
    experiment: Experiment,
    data: str,
    folder: Path,
    storage: str | None = None,
    say: Report = quiet,
) -> optuna.Study:
    """Creates or resumes the study called like the experiment.

    With the embedded storage the caller holds the experiment's ledger; see `storage.connect`.

    Args:
        experiment: The experiment; a study of another one is refused.
        data: Fingerprint of its text; a study on another one is refused, as the losses of its
            trials do not compare.
        folder: Where the embedded storage, an Optuna journal, lies.
        storage: URL of an Optuna RDB storage to use in its place.
        say: Is told where the storage is away for a while.

    Raises:
        UserError: A study of this name searches another experiment or another text, or the
            storage cannot be used.
    """
    study = connect(experiment.name, folder, storage, say)
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


class Search:
    """One sitting at a study: asks, trains, tells, until the budget is used.

    A trial is one or more seeds. The seeds of a trial run one after another; a seed that is
    on record in the ledger is not run again.

    Args:
        workspace: The experiment's folder.
        study: What `open_study` returned.
        ledger: The open ledger.
        trials: Budget of trials in all, over every start and every process.
        lease: This process's place at a study that others may work on too.
        progress: Takes one line per finished trial; the search is its whole.
    """

    def __init__(
        self,
        workspace: Workspace,
        study: optuna.Study,
        ledger: Ledger,
        *,
        trials: int,
        lease: Lease | None = None,
        progress: Report = quiet,
    ) -> None:
        self.workspace, self.study, self.ledger = workspace, study, ledger
        self.trials, self.lease, self.progress = trials, lease, progress
        self._config = workspace.experiment.sweep
        self._queue: deque[Job] = deque()
        self._losses: dict[int, dict[int, float]] = {}
        self._asked: dict[int, optuna.Trial] = {}
        # as `ask` asks it for the space; what it draws, each trial's own one draws
        study.sampler = make_sampler(self._config, workspace.experiment.search, 0)

    def run(self, pool: PoolConfig) -> None:
        """Works until the budget is used and every trial is told, those of other processes too.

        On one machine at most as many trials train at once as the sampler draws at first, before
        it learns: that many it would not have drawn otherwise, had it known the others.
        """
        runs = self.trials * self._config.seeds
        waiting = False
        while True:
            self._requeue()
            run_jobs(
                pool,
                self.workspace.corpus.folder,
                self._next,
                self._done,
                self._report if self._config.pruning else None,
                at_once=pool.members or -(-self._config.startup // pool.workers),
                in_training=None if pool.members else self._config.startup,
                steps=lambda spec: runs * spec.train.steps,
                saves=self.workspace.root / "unfinished",
                say=self.progress,
            )
            if self.lease is None or not (left := self._unfinished()):
                return
            if not waiting:
                self.progress(f"other processes still have {left} trials in work: waiting for them")
                waiting = True
            time.sleep(self.lease.interval / 2)

    def _unfinished(self) -> int:
        """Trials that other processes have in work, or that wait for one."""
        states = (TrialState.RUNNING, TrialState.WAITING)
        return len(self.study.get_trials(deepcopy=False, states=states))

    def _requeue(self) -> None:
        for number in requeue_interrupted(self.study, self.lease):
            self.progress(f"trial {number} was cut off; its parameters are tried again")

    def _next(self) -> Job | None:
        while True:
            if self._queue:
                job = self._queue.popleft()
            else:
                if self.lease is not None:
                    self._requeue()
                if self._is_done():
                    return None
                if (trial := self._ask()) is None:
                    continue
                job = self._job(trial, seed=0)
            known = self.ledger.get(job.spec.key)
            if known is None:
                return job
            self._done(job, known)

    def _is_done(self) -> bool:
        """Whether there is nothing to ask for: no trial waits, and no other one is wanted."""
        trials = self.study.get_trials(deepcopy=False)
        if any(trial.state == TrialState.WAITING for trial in trials):
            return False
        used = budget_used(trials)
        return used >= self.trials or self._enough(used)

    def _enough(self, used: int) -> bool:
        """Whether the search ends early: another trial is not expected to gain much."""
        if not self._config.stop or used <= self._config.startup:
            return False
        found = outlook(self._config, self.workspace.experiment.search, self.study)
        if found is None:
            return False
        gain, noise = f"{found.gain:.4f}", f"{found.noise:.4f}"
        self.progress(f"another trial is expected to gain {gain} nats; the noise is {noise}")
        return found.enough

    def _ask(self) -> optuna.Trial | None:
        """The next trial with its parameters; `None` where another process was faster."""
        config, space = self._config, self.workspace.experiment.search
        self.study.pruner = HalvingPruner(
            self.workspace.experiment.train.evaluate_after, startup=config.startup
        )
        trial = self.study.ask()
        self.study.sampler = make_sampler(config, space, trial.number)
        try:
            if self.lease is not None:
                trial.set_user_attr("owner", self.lease.owner)
                require_same(self.study, self.workspace.experiment.canonical)
            if (why := superfluous(self.study, trial, self.trials)) is not None:
                give_up(self.study, trial, why)
                return None
            for name, bounds in space.items():
                trial.suggest_float(name, bounds.low, bounds.high, log=True)
        except UpdateFinishedTrialError:
            return None  # this process was taken for dead meanwhile
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
        try:
            trial.report(loss, step)
        except UpdateFinishedTrialError:
            return True  # this process was taken for dead, and the trial is in other hands
        return trial.should_prune()

    def _done(self, job: Job, result: RunResult | None) -> None:
        trial = self._asked[job.tag]
        if result is None:
            self._tell(trial, TrialState.PRUNED)
            return
        if self.ledger.get(result.key) is None:
            self.ledger.add(result)
        losses = self._losses[trial.number]
        if result.loss is not None:
            losses[job.spec.seed] = result.loss
        try:
            if result.loss is None:
                trial.set_user_attr("diverged_at", result.diverged_at)
            else:
                kept = {str(seed): loss for seed, loss in losses.items()}
                trial.set_user_attr("losses", kept)
        except UpdateFinishedTrialError:
            self._lose(trial)
            return
        if result.loss is None:
            self._tell(trial, TrialState.FAIL)
            return
        if len(losses) < self._config.seeds:
            self._queue.append(self._job(trial, seed=job.spec.seed + 1))
        else:
            self._tell(trial, TrialState.COMPLETE, sum(losses.values()) / len(losses))

    def _tell(self, trial: optuna.Trial, state: TrialState, value: float | None = None) -> None:
        try:
            self.study.tell(trial, value, state=state)
        except (UpdateFinishedTrialError, ValueError):
            self._lose(trial)
            return
        del self._asked[trial.number], self._losses[trial.number]
        done = sum(
            t.state.is_finished() and not is_interrupted(t)
            for t in self.study.get_trials(deepcopy=False)
        )
        outcome = f"loss {value:.4f}" if value is not None else _WORDS[state]
        line = f"trial {trial.number} {outcome} · {done} of {self.trials}"
        self.progress(f"{line} · best {_best(self.study)}", done / max(done, self.trials))

    def _lose(self, trial: optuna.Trial) -> None:
        """Forgets a trial that was given to another process, as this one was taken for dead."""
        del self._asked[trial.number], self._losses[trial.number]
        self.progress(f"trial {trial.number} was taken over by another process; it counts there")


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
