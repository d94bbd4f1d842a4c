"""Trials that were given up: they do not count, and most are tried again under another number."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from mutransfer.errors import UserError
from sweeps.lease import Lease

GONE = "its process is gone"


def is_interrupted(trial: FrozenTrial) -> bool:
    """Whether it was given up; not if its process told a result in the middle of that."""
    return trial.state == TrialState.FAIL and "interrupted" in trial.user_attrs


def budget_used(trials: Sequence[FrozenTrial]) -> int:
    """How many places of the budget these trials take up.

    All but those that were given up; of these, one that is still to be queued again keeps its
    place until the trial that continues it has it.
    """
    continued = _continued(trials)
    return sum(not is_interrupted(t) or _to_continue(t, trials, continued) for t in trials)


def give_up(study: optuna.Study, trial: FrozenTrial | optuna.Trial, why: str) -> bool:
    """Ends a trial that does not count; false where it has ended already."""
    try:
        optuna.Trial(study, trial._trial_id).set_user_attr("interrupted", why)
        study.tell(trial.number, state=TrialState.FAIL)
    except (UpdateFinishedTrialError, ValueError):
        return False
    return True


def requeue_interrupted(study: optuna.Study, lease: Lease | None = None) -> list[int]:
    """Gives up trials whose process is gone, and queues the parameters of all such ones again.

    Giving up has one winner, whoever else tries or finishes the trial at that moment. Queueing has
    not: a process that is killed in between leaves it to the next one, and what two of them queue
    at once is dropped as it is asked for (`superfluous`).

    Args:
        study: The study.
        lease: Who is at work; `None` where this process is known to be the only one, as it is with
            the embedded storage, whose ledger is locked.

    Returns:
        The numbers of the trials that were given up or queued.
    """
    found = set()
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        gone = lease is None or lease.is_gone(trial.user_attrs.get("owner"), trial.number)
        if gone and give_up(study, trial, GONE):
            found.add(trial.number)
    trials = study.get_trials(deepcopy=False)
    continued = _continued(trials)
    for trial in trials:
        if _to_continue(trial, trials, continued):
            study.enqueue_trial(_params(trial), user_attrs={"continues": trial.number})
            found.add(trial.number)
    return sorted(found)


def superfluous(study: optuna.Study, trial: optuna.Trial, budget: int) -> str | None:
    """Why a trial that was just asked for must not be run, if so.

    Many processes may ask at once. Trials have one order, that of their numbers, by which all of
    them decide alike and for themselves: the budget belongs to the first ones that count, and
    what is to be continued to the first that does.
    """
    trials = study.get_trials(deepcopy=False)
    if why := _twin(trial, trials):
        return why
    if "continues" in trial.user_attrs:
        return None  # it has the place of the one that it continues
    rivals = [t for t in trials if t.number < trial.number or "continues" in t.user_attrs]
    return "the budget is used" if budget_used(rivals) >= budget else None


def _continued(trials: Iterable[FrozenTrial]) -> set[int]:
    return {t.user_attrs["continues"] for t in trials if "continues" in t.user_attrs}


def _to_continue(
    trial: FrozenTrial, trials: Sequence[FrozenTrial], continued: Collection[int]
) -> bool:
    """Whether it is still to be queued again; what had drawn nothing leaves nothing to lose."""
    return (
        is_interrupted(trial)
        and trial.user_attrs["interrupted"] == GONE
        and trial.number not in continued
        and bool(_params(trial))
        and not _twin(trial, trials)
    )


def _params(trial: FrozenTrial) -> dict[str, float]:
    """What it had drawn, and what was queued for it, as far as it had not been taken up yet."""
    params: dict[str, float] = trial.system_attrs.get("fixed_params", {}) | trial.params
    return params


def _twin(trial: FrozenTrial | optuna.Trial, trials: Iterable[FrozenTrial]) -> str | None:
    """Why an earlier trial has this one's task already, if so."""
    for name, why in (
        ("continues", "another one continues the same trial"),
        ("first", "another one was queued first with the same point"),
    ):
        task = trial.user_attrs.get(name)
        if task is not None and any(
            t.number < trial.number and t.user_attrs.get(name) == task for t in trials
        ):
            return why
    return None


def require_same(study: optuna.Study, experiment: dict[str, object]) -> None:
    """Refuses to go on with a study that another experiment has opened at the same moment.

    Raises:
        UserError: It has.
    """
    if study.user_attrs.get("experiment") != experiment:
        raise UserError(
            "another experiment has opened a study of the same name at this moment",
            where=study.study_name,
            cure="Give one of them another name.",
        )
