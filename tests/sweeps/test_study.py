"""The study: whose it is, where it lies, and what a kill leaves of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from mutransfer.cli import main
from mutransfer.errors import UserError
from sweeps import study as study_module
from sweeps.experiment import Experiment, Range
from sweeps.interrupted import budget_used, requeue_interrupted
from sweeps.patience import PatientStorage
from sweeps.pool import PoolConfig
from sweeps.proposal import Proposal
from sweeps.storage import refuse_password, shown
from sweeps.study import open_study
from sweeps.sweep import run_sweep
from sweeps.workspace import Workspace

SECRET = "hunter2"


@pytest.fixture(autouse=True)
def _quiet_optuna() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.fixture(params=["journal", "sqlite"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str | None:
    return None if request.param == "journal" else f"sqlite:///{tmp_path}/study.db"


def test_a_study_on_another_text_is_refused(
    experiment: Experiment, tmp_path: Path, storage: str | None
) -> None:
    study = open_study(experiment, "a" * 64, tmp_path, storage)
    assert study.user_attrs["data"] == "a" * 64
    assert open_study(experiment, "a" * 64, tmp_path, storage).user_attrs == study.user_attrs
    with pytest.raises(UserError, match="searches on another text") as error:
        open_study(experiment, "b" * 64, tmp_path, storage)
    where = str(tmp_path / "study.journal") if storage is None else storage
    assert error.value.where == where
    assert (error.value.got, error.value.expected) == (f"the fingerprint {'a' * 64}", "b" * 64)
    assert error.value.cure is not None
    assert open_study(experiment, "a" * 64, tmp_path, storage).user_attrs == study.user_attrs


def test_a_study_of_another_experiment_is_refused_and_not_touched(
    experiment: Experiment, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    old = optuna.create_study(study_name=experiment.name, storage=url)
    old.set_user_attr("experiment", experiment.canonical | {"contrast": []})
    with pytest.raises(UserError, match=r"another experiment; got contrast: \[\], not"):
        open_study(experiment, "a" * 64, tmp_path, url)
    assert "data" not in old.user_attrs


def test_a_study_without_a_text_gets_it(experiment: Experiment, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    old = optuna.create_study(study_name=experiment.name, storage=url)
    old.set_user_attr("experiment", experiment.canonical)
    open_study(experiment, "a" * 64, tmp_path, url)
    assert old.user_attrs["data"] == "a" * 64


@pytest.mark.parametrize("torn", ['{"op_code": 4, "wor', "{"])
def test_a_torn_line_of_the_journal_is_cut_off(
    experiment: Experiment, tmp_path: Path, torn: str
) -> None:
    """Optuna reads over a torn end, then appends to it: only the start after that one fails."""
    journal = tmp_path / "study.journal"
    study = open_study(experiment, "a", tmp_path)
    study.enqueue_trial({"lr": 0.01})
    whole = journal.read_bytes()
    assert whole.endswith(b"\n")
    journal.write_bytes(whole + torn.encode())
    study = open_study(experiment, "a", tmp_path)
    study.enqueue_trial({"lr": 0.02})
    again = open_study(experiment, "a", tmp_path)
    for line in journal.read_bytes().removeprefix(whole).splitlines():
        json.loads(line)
    assert [t.system_attrs["fixed_params"] for t in again.trials] == [{"lr": 0.01}, {"lr": 0.02}]


def test_a_first_line_that_is_torn_is_no_study_yet(experiment: Experiment, tmp_path: Path) -> None:
    (tmp_path / "study.journal").write_bytes(b'{"op_co')
    open_study(experiment, "a", tmp_path)
    assert open_study(experiment, "a", tmp_path).user_attrs["data"] == "a"


class Killed(BaseException):
    """What stands for a SIGKILL."""


@pytest.mark.parametrize(
    "call",
    [
        (optuna.Study, "enqueue_trial"),
        (optuna.Trial, "set_user_attr"),
        (optuna.Study, "tell"),
    ],
    ids=lambda call: call[1],
)
def test_a_kill_while_requeueing_loses_and_doubles_nothing(
    experiment: Experiment,
    tmp_path: Path,
    call: tuple[type, str],
    monkeypatch: pytest.MonkeyPatch,
    storage: str | None,
) -> None:
    study = open_study(experiment, "a", tmp_path, storage)
    lr = study.ask().suggest_float("lr", 0.002, 0.05, log=True)

    def killed(*args: Any, **options: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(*call, killed)
        with pytest.raises(Killed):
            requeue_interrupted(study)

    study = open_study(experiment, "a", tmp_path, storage)
    assert requeue_interrupted(study) == [0]
    assert requeue_interrupted(study) == []
    old, new = study.trials
    assert old.state == TrialState.FAIL
    assert old.user_attrs["interrupted"] == "its process is gone"
    assert new.state == TrialState.WAITING
    assert new.user_attrs["continues"] == 0
    assert budget_used(study.get_trials()) == 1, "its place in the budget is its continuation's"
    assert study.ask().suggest_float("lr", 0.002, 0.05, log=True) == lr


def test_a_continuation_that_was_taken_up_already_is_none_too_many(
    experiment: Experiment, tmp_path: Path
) -> None:
    """Killed after queueing; another process of a shared storage has begun on it since."""
    study = open_study(experiment, "a", tmp_path)
    study.ask().suggest_float("lr", 0.002, 0.05, log=True)
    study.enqueue_trial({"lr": 0.01}, user_attrs={"continues": 0})
    other = study.ask()
    other.suggest_float("lr", 0.002, 0.05, log=True)
    study.tell(other, 2.0)
    assert requeue_interrupted(study) == [0]
    assert [t.state for t in study.trials] == [TrialState.FAIL, TrialState.COMPLETE]


def test_what_was_queued_for_a_trial_outlives_a_kill_before_it_is_read(
    experiment: Experiment, tmp_path: Path
) -> None:
    study = open_study(experiment, "a", tmp_path)
    study.enqueue_trial({"lr": 0.01})
    study.ask()
    assert study.trials[0].params == {}
    requeue_interrupted(study)
    assert study.ask().suggest_float("lr", 0.002, 0.05, log=True) == 0.01


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg"])
def test_an_absent_driver_names_the_extra(
    scheme: str, experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_driver(self: object, url: str, *args: object) -> None:
        raise ImportError("Failed to import DB access module")

    url = f"{scheme}://me:{SECRET}@db.example/study"
    monkeypatch.setattr(PatientStorage, "__init__", no_driver)
    with pytest.raises(UserError) as error:
        open_study(experiment, "a", tmp_path, url)
    message = str(error.value)
    for words in ("--storage", "make setup EXTRAS=postgres", "'mutransfer[postgres]'",
                  "postgresql+psycopg://", f"got {scheme}://"):  # fmt: skip
        assert words in message
    assert SECRET not in message


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("bogus", "got bogus; expected sqlite:///FILE or postgresql+psycopg://"),
        (f"postgres://me:{SECRET}@db.example/study", "got postgres://…; expected sqlite:///FILE"),
        (f"postgresql://db.example:{SECRET}/study", "got postgresql://…; expected"),
        (f"redis://:{SECRET}@db.example", "got redis://…; expected"),
        (f"me:{SECRET}@db.example/study", "got …; expected"),
        ("sqlite:////dev/null/x.db", "unable to open database file; got sqlite:////dev/null/x.db"),
    ],
)
def test_a_storage_that_is_none_is_one_line_without_a_password(
    url: str, said: str, experiment: Experiment, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Through the command line, with and without the traceback."""
    data = experiment.data.train[0]
    (tmp_path / "e.toml").write_text(
        f'[data]\ntrain = ["{data}"]\nheldout_fraction = 0.3\n[train]\nsteps = 12\n'
    )
    words = ["sweep", str(tmp_path / "e.toml"), "--out", str(tmp_path / "run")]
    monkeypatch.setenv("MUTRANSFER_STORAGE", url)
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Error: --storage: ")
    assert said in line
    assert main([*words, "--debug"]) == 2
    debug = capsys.readouterr().err
    assert debug.startswith("Traceback")
    assert SECRET not in line + debug


@pytest.mark.parametrize(
    ("url", "message", "said"),
    [
        (f"postgresql+psycopg://me:{SECRET}@db.example/study",
         'connection to server at "db.example", port 5432 failed: no password supplied',
         'connection to server at "…", port 5432 failed: no password supplied'),
        (f"postgresql+psycopg://me:x@{SECRET}@db.example/study",
         f'could not translate host name "{SECRET}@db.example" to address',
         'could not translate host name "…@…" to address'),
        ("postgresql+psycopg://me:a%2Bb%2Fc@h/study", "no use of 'a+b/c'", "no use of '…'"),
    ],
)  # fmt: skip
def test_a_database_that_refuses_is_quoted_without_the_words_of_its_url(
    url: str, message: str, said: str, experiment: Experiment, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from sqlalchemy.exc import OperationalError

    def refuse(self: object, url: str, *args: object) -> None:
        raise OperationalError(None, None, Exception(message))

    monkeypatch.setattr(PatientStorage, "__init__", refuse)
    with pytest.raises(UserError) as error:
        open_study(experiment, "a", tmp_path, url)
    assert f"the database refuses: {said};" in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql+psycopg://me:{SECRET}@db.example/study",
        f"postgresql://db.example/study?password={SECRET}&x=1",
        f"sqlite+pysqlcipher://:{SECRET}@/study.db",
    ],
)
def test_a_password_on_the_command_line_is_refused(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "quickstart", "--out", str(tmp_path / "run"), "--storage", url]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Error: --storage: a password on the command line can be read")
    assert "MUTRANSFER_STORAGE" in line
    assert SECRET not in line
    assert not (tmp_path / "run").exists()
    for harmless in ("postgresql+psycopg://me@db.example/study", "sqlite:///a:b@c.db"):
        refuse_password(harmless)


@pytest.mark.parametrize(
    ("url", "seen"),
    [
        ("sqlite:///runs/study.db", "sqlite:///runs/study.db"),
        ("sqlite:///study.db?key=hunter2", "sqlite:///study.db"),
        ("sqlite+pysqlcipher://:hunter2@/study.db", "sqlite+pysqlcipher://…"),
        ("sqlite://:hunter2@/study.db", "sqlite://…"),
        ("mysql://me:hunt://er2@h/d", "mysql://…"),
        ("me:hunter2@postgresql://h/d", "…"),
        ("runs/study.db", "runs/study.db"),
    ],
)
def test_what_is_shown_of_a_url(url: str, seen: str) -> None:
    assert shown(url) == seen


def test_a_trial_cut_off_before_it_drew_anything_is_not_tried_again(
    experiment: Experiment, tmp_path: Path
) -> None:
    study = open_study(experiment, "text", tmp_path)
    study.ask()
    assert requeue_interrupted(study) == [0]
    assert [trial.state for trial in study.get_trials()] == [TrialState.FAIL]
    assert budget_used(study.get_trials()) == 0


@pytest.mark.parametrize(("gain", "trials"), [(0.0, 2), (0.6, 3)])
def test_a_search_ends_early_where_it_may_and_nothing_is_to_be_gained(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, gain: float, trials: int
) -> None:
    found = Proposal(place=np.zeros(1), gain=gain, noise=1.0)
    monkeypatch.setattr(study_module, "outlook", lambda *given: found)
    record = workspace.experiment.canonical
    record["sweep"] |= {"stop": True, "startup": 1}
    workspace = Workspace(Experiment.model_validate(record), workspace.root)
    said: list[str] = []
    run_sweep(workspace, PoolConfig(workers=1, threads=1),
              progress=lambda line, share=None: said.append(line))  # fmt: skip
    assert len(open_study(workspace.experiment, workspace.corpus.fingerprint,
                          workspace.folder("sweep")).trials) == trials  # fmt: skip
    assert f"another trial is expected to gain {gain:.4f} nats; the noise is 1.0000" in said


def test_no_two_trials_have_one_sampler_seed_after_a_kill(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two trials are cut off while one had drawn nothing, the other a part of its parameters."""
    numbers: list[int] = []
    sampler = study_module.make_sampler
    monkeypatch.setattr(
        study_module, "make_sampler", lambda *given: numbers.append(given[-1]) or sampler(*given)
    )
    e = workspace.experiment
    search = e.search | {"init_std": Range(low=0.01, high=0.1), "beta2": Range(low=0.9, high=0.99)}
    e = e.model_copy(update={"search": search})
    workspace = Workspace(e, workspace.root)
    study = open_study(e, workspace.corpus.fingerprint, workspace.folder("sweep"))
    study.ask()
    study.ask().suggest_float("lr", 0.002, 0.05, log=True)
    assert requeue_interrupted(study) == [0, 1]
    run_sweep(workspace, PoolConfig(workers=1, threads=1))
    trials = [t for t in study.get_trials() if "interrupted" not in t.user_attrs]
    assert len(trials) == e.sweep.trials
    assert trials[0].user_attrs["continues"] == 1
    assert numbers == [0] + [trial.number for trial in trials]
    for name in search:
        values = [trial.params[name] for trial in trials]
        assert len(set(values)) == len(values), name
