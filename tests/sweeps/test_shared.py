"""Many processes at one study: who is there, who was first, and a database that is away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy.exc import IntegrityError, OperationalError, PendingRollbackError

from mutransfer.errors import UserError
from sweeps import patience
from sweeps.experiment import Experiment
from sweeps.interrupted import budget_used, requeue_interrupted
from sweeps.lease import Lease
from sweeps.patience import PatientStorage, is_away
from sweeps.pool import PoolConfig
from sweeps.study import Search, open_study
from sweeps.sweep import load_sweep, run_sweep
from sweeps.workspace import Workspace

INLINE = PoolConfig(workers=1, threads=1)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/shared.db"


@pytest.fixture
def study(experiment: Experiment, tmp_path: Path, url: str) -> optuna.Study:
    return open_study(experiment, "text", tmp_path, url)


def again(experiment: Experiment, tmp_path: Path, url: str) -> optuna.Study:
    """The same study, as another process has it."""
    return open_study(experiment, "text", tmp_path, url)


# --- leases


def test_who_misses_four_beats_of_another_is_gone(study: optuna.Study) -> None:
    one, two = Lease(study), Lease(study)
    one.beat()
    for _ in range(4):
        two.beat()
        assert not two.is_gone(one.owner, 0)
    one.beat()
    for _ in range(4):
        two.beat()
        assert not two.is_gone(one.owner, 0)
    two.beat()
    assert two.is_gone(one.owner, 0)
    one.beat()
    two.beat()
    assert not two.is_gone(one.owner, 0), "it was only slow"
    assert not two.is_gone(two.owner, 0)


def test_nobody_is_gone_while_the_database_is_away(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither can beat, so that neither counts."""
    one, two = Lease(study), Lease(study)
    one.beat()
    two.beat()

    def away(*args: object) -> None:
        raise OperationalError(None, None, Exception("away"))

    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "set_user_attr", away)
        for _ in range(9):
            with pytest.raises(OperationalError):
                two.beat()
    two.beat()
    assert not two.is_gone(one.owner, 0)


def test_a_process_that_leaves_is_gone_at_once(study: optuna.Study) -> None:
    two = Lease(study)
    with Lease(study, seconds=1000.0) as one:
        two.beat()
        assert not two.is_gone(one.owner, 0)
    two.beat()
    assert two.is_gone(one.owner, 0)


def test_a_trial_without_an_owner_has_a_lease_too(study: optuna.Study) -> None:
    """Its process died between two words to the database."""
    study.enqueue_trial({"lr": 0.01})
    study.ask()
    place = Lease(study)
    place.beat()
    assert requeue_interrupted(study, place) == []
    for _ in range(4):
        place.beat()
    assert requeue_interrupted(study, place) == [0]
    assert study.trials[1].state == TrialState.WAITING
    study.ask()
    assert requeue_interrupted(study, place) == [], "another trial, another clock"


# --- budget and continuations


def search(experiment: Experiment, root: Path, study: optuna.Study, trials: int) -> Search:
    """One that is only asked for trials: it needs no ledger."""
    nothing: Any = None
    return Search(Workspace(experiment, root), study, nothing, trials=trials, lease=Lease(study))


def test_of_many_that_ask_at_once_the_first_have_the_budget(
    experiment: Experiment, tmp_path: Path, url: str, study: optuna.Study
) -> None:
    """Each looked before any of them asked."""
    askers = [
        search(experiment, tmp_path / str(i), again(experiment, tmp_path, url), trials=3)
        for i in range(5)
    ]
    assert not any(asker._is_done() for asker in askers)
    trials = [asker._ask() for asker in askers]
    assert [trial is None for trial in trials] == [False, False, False, True, True]
    assert budget_used(study.get_trials()) == 3
    assert askers[0]._is_done()
    assert {t.user_attrs.get("interrupted") for t in study.trials[3:]} == {"the budget is used"}


def test_of_two_that_requeue_at_once_the_second_is_dropped(
    experiment: Experiment, tmp_path: Path, url: str, study: optuna.Study
) -> None:
    lr = study.ask().suggest_float("lr", 0.002, 0.05, log=True)
    before = study.get_trials()
    requeue_interrupted(study)
    study.enqueue_trial({"lr": lr}, user_attrs={"continues": before[0].number})  # the other
    asker = search(experiment, tmp_path / "run", again(experiment, tmp_path, url), trials=3)
    first, second, third = asker._ask(), asker._ask(), asker._ask()
    assert first is not None
    assert first.params["lr"] == lr
    assert second is None
    assert third is not None
    assert third.params["lr"] != lr
    dropped = study.trials[2].user_attrs["interrupted"]
    assert dropped == "another one continues the same trial"


def test_a_trial_that_ends_as_it_is_given_up_is_not_continued(
    experiment: Experiment, tmp_path: Path, url: str, study: optuna.Study,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Its process was slow, and tells just before the other process does."""
    trial = study.ask()
    trial.suggest_float("lr", 0.002, 0.05, log=True)
    other = again(experiment, tmp_path, url)
    get_trials = optuna.Study.get_trials

    def then_it_ends(self: optuna.Study, *args: Any, **options: Any) -> Any:
        monkeypatch.undo()
        found = get_trials(self, *args, **options)
        study.tell(trial, 2.0)
        return found

    monkeypatch.setattr(optuna.Study, "get_trials", then_it_ends)
    assert requeue_interrupted(other) == []
    assert [t.state for t in study.trials] == [TrialState.COMPLETE]
    assert budget_used(study.get_trials()) == 1


def test_a_result_told_in_the_middle_of_giving_up_counts(
    experiment: Experiment, tmp_path: Path, url: str, study: optuna.Study,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Its process tells between the two words of the one that gives it up."""
    trial = study.ask()
    trial.suggest_float("lr", 0.002, 0.05, log=True)
    other = again(experiment, tmp_path, url)
    write = optuna.Trial.set_user_attr

    def then_it_ends(self: optuna.Trial, key: str, value: object) -> None:
        write(self, key, value)
        study.tell(trial, 2.0)

    with monkeypatch.context() as patch:
        patch.setattr(optuna.Trial, "set_user_attr", then_it_ends)
        assert requeue_interrupted(other) == []
    assert study.trials[0].user_attrs["interrupted"] == "its process is gone"
    assert requeue_interrupted(other) == []
    assert [t.state for t in study.trials] == [TrialState.COMPLETE]
    assert budget_used(study.get_trials()) == 1


def test_what_is_to_be_continued_keeps_its_place_in_the_budget(
    experiment: Experiment, tmp_path: Path, url: str, study: optuna.Study,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Another process asks after it was given up and before it is queued again."""
    asker = search(experiment, tmp_path / "run", again(experiment, tmp_path, url), trials=1)
    study.ask().suggest_float("lr", 0.002, 0.05, log=True)
    enqueue = optuna.Study.enqueue_trial

    def too_early(self: optuna.Study, *args: Any, **options: Any) -> None:
        assert asker._is_done()
        assert asker._ask() is None, "it had looked before"
        enqueue(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "enqueue_trial", too_early)
        assert requeue_interrupted(study) == [0]
    continuing = asker._ask()
    assert continuing is not None
    assert continuing.user_attrs["continues"] == 0
    assert budget_used(study.get_trials()) == 1


def test_a_twin_whose_process_dies_is_not_continued(
    experiment: Experiment, tmp_path: Path, url: str, study: optuna.Study
) -> None:
    """Two processes queued the same trial; who asked for the second died before it dropped it."""
    lr = study.ask().suggest_float("lr", 0.002, 0.05, log=True)
    requeue_interrupted(study)
    study.enqueue_trial({"lr": lr}, user_attrs={"continues": 0})
    first, _ = study.ask(), study.ask()
    study.tell(first, 2.0)
    assert requeue_interrupted(study) == [2]
    assert len(study.trials) == 3


def test_processes_at_one_study_have_one_lease(study: optuna.Study) -> None:
    with Lease(study, seconds=60.0):
        wrong = Lease(study, seconds=4.0)
        with pytest.raises(UserError, match=r"^--lease: .*one lease; got 4\.0; expected 60"):
            wrong.__enter__()


def test_two_experiments_that_open_a_study_at_once(
    experiment: Experiment, tmp_path: Path, study: optuna.Study
) -> None:
    """Each saw none and wrote its own: the one that was overwritten hears of it as it asks."""
    asker = search(experiment, tmp_path / "run", study, trials=3)
    study.set_user_attr("experiment", {"name": "another"})
    with pytest.raises(UserError, match="another experiment has opened a study of the same name"):
        asker._ask()


def test_a_trial_that_is_given_up_while_it_is_asked_for_is_left(
    experiment: Experiment, tmp_path: Path, url: str, study: optuna.Study,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    asker = search(experiment, tmp_path / "run", study, trials=3)
    suggest = optuna.Trial.suggest_float

    def too_late(self: optuna.Trial, *args: Any, **options: Any) -> float:
        requeue_interrupted(again(experiment, tmp_path, url))
        return suggest(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(optuna.Trial, "suggest_float", too_late)
        assert asker._ask() is None
    assert asker._ask() is not None
    assert budget_used(study.get_trials()) == 1


def test_a_process_that_was_only_slow_loses_its_trial(
    experiment: Experiment, tmp_path: Path, url: str, study: optuna.Study
) -> None:
    """It was taken for dead and its trial went on elsewhere: the result counts once."""
    e = experiment.model_copy(
        update={"sweep": experiment.sweep.model_copy(update={"pruning": False})}
    )
    study = open_study(e, Workspace(e, tmp_path / "a").corpus.fingerprint, tmp_path, url + "2")
    workspace = Workspace(e, tmp_path / "a")
    said: list[str] = []
    with workspace.ledger() as ledger, Lease(study) as place:
        slow = Search(
            workspace, study, ledger, trials=2, lease=place,
            progress=lambda line, share=None: said.append(line),
        )  # fmt: skip
        job = slow._next()
        assert job is not None
        assert requeue_interrupted(study) == [0]  # somebody else's verdict
        slow._queue.append(job)
        slow.run(INLINE)
    assert "trial 0 was taken over by another process; it counts there" in said
    counting = [t for t in study.trials if "interrupted" not in t.user_attrs]
    assert [t.state for t in counting] == [TrialState.COMPLETE] * 2
    assert counting[0].params == study.trials[0].params


def test_the_last_one_waits_for_the_trials_of_the_others(
    experiment: Experiment, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And takes over what a dead one had, from a folder of its own."""
    waiting = "other processes still have 1 trials in work: waiting for them"
    is_gone = Lease.is_gone  # the lease does not end before the others are done
    monkeypatch.setattr(Lease, "is_gone", lambda *args: waiting in said and is_gone(*args))
    corpus = Workspace(experiment, tmp_path / "a").corpus
    study = open_study(experiment, corpus.fingerprint, tmp_path, url)
    dead = Lease(study)
    dead.beat()
    trial = study.ask()
    lr = trial.suggest_float("lr", 0.002, 0.05, log=True)
    trial.set_user_attr("owner", dead.owner)
    said: list[str] = []
    run_sweep(
        Workspace(experiment, tmp_path / "b"), INLINE, storage=url, lease=1.0,
        progress=lambda line, share=None: said.append(line),
    )  # fmt: skip
    assert said.count(waiting) == 1
    assert "trial 0 was cut off; its parameters are tried again" in said
    _, record = load_sweep(Workspace(experiment, tmp_path / "b"))
    assert [t.state for t in record.trials].count("INTERRUPTED") == 1
    assert sum(t.state != "INTERRUPTED" for t in record.trials) == experiment.sweep.trials
    assert record.trials[-1].params["lr"] == lr


# --- a database that is away


def broken(times: int, error: Exception) -> Any:
    left = [times]
    method = RDBStorage.get_all_studies

    def call(self: RDBStorage) -> Any:
        if left[0]:
            left[0] -= 1
            raise error
        return method(self)

    return patience._patiently(call)


def test_a_database_that_comes_back_was_never_away(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    slept: list[float] = []
    monkeypatch.setattr(patience.time, "sleep", slept.append)
    storage = PatientStorage(url, lambda line, share=None: said.append(line))
    away = OperationalError(None, None, Exception("away"))
    monkeypatch.setattr(PatientStorage, "get_all_studies", broken(9, away))
    assert storage.get_all_studies() == []
    assert slept == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0]
    assert said == ["the database does not answer; asked again for 10 min"]


def test_what_is_not_the_connection_s_fault_is_raised_at_once(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = IntegrityError(None, None, Exception("twice"))
    monkeypatch.setattr(PatientStorage, "get_all_studies", broken(1, wrong))
    with pytest.raises(IntegrityError):
        PatientStorage(url).get_all_studies()


def test_patience_ends(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PATIENCE", 0.0)
    away = OperationalError(None, None, Exception("away"))
    monkeypatch.setattr(PatientStorage, "get_all_studies", broken(2, away))
    with pytest.raises(OperationalError):
        PatientStorage(url).get_all_studies()


def test_a_broken_connection_is_found_behind_other_errors() -> None:
    error = PendingRollbackError("roll back first")
    assert not is_away(error)
    error.__context__ = OperationalError(None, None, Exception("closed"))
    assert is_away(error)
    outer = RuntimeError("invalid data in the commit")
    outer.__cause__ = error
    assert is_away(outer)


def test_every_operation_of_the_storage_is_patient() -> None:
    """Those that Optuna adds would not be."""
    public = {
        name for name in vars(RDBStorage) if not name.startswith("_") and callable(
            getattr(RDBStorage, name))
    }  # fmt: skip
    asked = {name for name in public if name.startswith(("get_", "set_", "create_", "delete_"))}
    patient = {name for name in vars(PatientStorage) if not name.startswith("__")}
    left = {name for name in asked - patient if "heartbeat" not in name and "callback" not in name}
    # these are built of the others, or not used
    assert left <= {"get_current_version", "get_head_version", "get_all_versions", "get_best_trial",
                    "get_n_trials", "get_trial_param",
                    "get_trial_system_attrs", "get_trial_user_attrs",
                    "get_trial_number_from_id"}  # fmt: skip
