"""Successive halving: its rungs, who goes on, and who counts."""

from __future__ import annotations

import optuna
import pytest
from optuna.trial import TrialState

from sweeps.pruner import HalvingPruner


@pytest.fixture(autouse=True)
def _quiet_optuna() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.mark.parametrize(
    ("evaluations", "factor", "rungs"),
    [
        ((30, 60, 90, 118, 119, 120), 2, (30, 60)),
        ((30, 60, 90, 118, 119, 120), 3, (60,)),
        ((15, 30, 45, 60, 75, 90, 105, 120), 2, (15, 30, 60)),
        ((15, 30, 45, 60, 75, 90, 105, 120), 4, (30,)),
        ((6, 10, 11, 12), 2, (6,)),
        ((10,), 2, ()),
    ],
)
def test_rungs_halve_the_run(
    evaluations: tuple[int, ...], factor: int, rungs: tuple[int, ...]
) -> None:
    assert HalvingPruner(evaluations, startup=1, factor=factor).rungs == rungs


def at_rung(study: optuna.Study, losses: list[float]) -> list[bool]:
    """Trials that all run at once report one after the other; each is asked at once."""
    trials = [study.ask() for _ in losses]
    answers = []
    for trial, loss in zip(trials, losses, strict=True):
        trial.report(loss, 4)
        answers.append(trial.should_prune())
    return answers


def study(**options: int) -> optuna.Study:
    return optuna.create_study(pruner=HalvingPruner((4, 8), **options))


def test_the_worse_half_stops_though_none_has_ended() -> None:
    losses = [3.0, 2.0, 2.5, 4.0, 1.0, 2.0]
    assert at_rung(study(startup=2), losses) == [False, False, False, True, False, False]
    assert at_rung(study(startup=3), [1.0, 2.0, 3.0, 4.0]) == [False, False, False, True]


def test_a_third_goes_on_with_factor_3() -> None:
    losses = [1.0, 2.0, 3.0, 4.0, 5.0, 2.5, 1.5]
    pruner = HalvingPruner((3, 8), startup=5, factor=3)
    assert pruner.rungs == (3,)
    s = optuna.create_study(pruner=pruner)
    answers = []
    for loss in losses:
        trial = s.ask()
        trial.report(loss, 3)
        answers.append(trial.should_prune())
    assert answers == [False] * 5 + [True, False]


def test_between_rungs_nobody_stops() -> None:
    s = study(startup=0)
    at_rung(s, [1.0, 1.0, 1.0])
    trial = s.ask()
    trial.report(9.0, 5)
    assert not trial.should_prune()


def test_a_trial_that_was_cut_off_does_not_count_twice() -> None:
    s = study(startup=2)
    cut = s.ask()
    cut.report(1.0, 4)
    cut.set_user_attr("interrupted", True)
    s.tell(cut, state=TrialState.FAIL)
    again, other = s.ask(), s.ask()
    again.report(1.0, 4)
    other.report(3.0, 4)
    third = s.ask()
    third.report(2.0, 4)
    assert not third.should_prune()


def test_one_that_diverged_later_counts() -> None:
    s = study(startup=1)
    bad = s.ask()
    bad.report(1.0, 4)
    s.tell(bad, state=TrialState.FAIL)
    trial = s.ask()
    trial.report(2.0, 4)
    assert trial.should_prune()
