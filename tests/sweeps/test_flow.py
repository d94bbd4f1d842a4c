"""Sweep, transfer check, coordinate check and export of a tiny experiment, and their resumption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pandas as pd
import pytest

from mutransfer.bundle import Bundle
from mutransfer.errors import UserError
from mutransfer.rules import BaseParams
from proxies.run import RunResult
from sweeps.experiment import Experiment
from sweeps.export import run_export
from sweeps.interrupted import budget_used, requeue_interrupted
from sweeps.lease import Lease
from sweeps.pool import PoolConfig
from sweeps.study import open_study
from sweeps.sweep import at_borders, load_sweep, run_sweep
from sweeps.transfer import Grid, run_transfer_check
from sweeps.workspace import Workspace

INLINE = PoolConfig(workers=1, threads=1)


@pytest.fixture(autouse=True)
def _quiet_optuna() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def test_the_whole_flow_leaves_what_it_should(workspace: Workspace) -> None:
    from sweeps.coord import run_coord_check

    params, best = run_sweep(workspace, INLINE)
    assert params.lr == best.params["lr"]
    frame = pd.read_csv(workspace.root / "sweep" / "trials.csv")
    assert len(frame) == 3
    assert frame.epochs.max() == pytest.approx(12 * 64 / workspace.corpus.train_tokens)
    ledger = (workspace.root / "ledger.jsonl").read_text()

    again = run_sweep(workspace, INLINE)
    assert again == (params, best)
    assert (workspace.root / "ledger.jsonl").read_text() == ledger, "a run was done twice"

    run_coord_check(workspace)
    result = run_transfer_check(workspace, INLINE)
    assert {arm.arm for arm in result.arms} == {"completep-tied", "sp"}
    assert result.verdict != "PASS", "two seeds cannot pass"
    for name in ("coord-check/coord_check", "transfer-check/transfer_check"):
        for suffix in ("csv", "json", "png"):
            assert (workspace.root / f"{name}.{suffix}").stat().st_size > 0

    bundle, path = run_export(workspace)
    assert Bundle.load(path) == bundle
    assert bundle.base_hyperparameters == params
    assert bundle.table.row("layers.0.mlp.up.weight").width_ratio == 2.0
    assert bundle.batch_tokens == 64
    record = json.loads((workspace.root / "sweep" / "sweep.json").read_text())
    assert record["experiment_sha256"] == workspace.experiment.sha256


def test_export_refuses_a_transfer_check_of_another_winner(workspace: Workspace) -> None:
    from sweeps.coord import run_coord_check

    run_sweep(workspace, INLINE)
    run_coord_check(workspace)
    run_transfer_check(workspace, INLINE)
    path = workspace.root / "transfer-check" / "transfer_check.json"
    record = json.loads(path.read_text())
    record["base_hyperparameters"]["output_multiplier"] = 3.0
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"output_multiplier: .*; got 3\.0; expected 1\.0"):
        run_export(workspace)


def test_the_coordinate_check_is_made_at_the_sweep_s_winner(workspace: Workspace) -> None:
    from sweeps.coord import run_coord_check

    said: list[str] = []
    path = workspace.root / "coord-check" / "coord_check.json"

    def checked_at() -> object:
        run_coord_check(workspace, progress=lambda line, share=None: said.append(line))
        return json.loads(path.read_text())["base_hyperparameters"]

    assert checked_at() == workspace.experiment.params.model_dump()
    assert said[0].startswith("no sweep of this experiment yet")
    params, _ = run_sweep(workspace, INLINE)
    assert checked_at() == params.model_dump()
    assert any("that won the sweep" in line for line in said)


def test_workers_and_inline_find_the_same_runs(experiment: Experiment, tmp_path: Path) -> None:
    sweep = experiment.sweep.model_copy(update={"pruning": False})  # it goes by who is first
    experiment = experiment.model_copy(update={"sweep": sweep})
    config = PoolConfig(workers=2, threads=1)
    losses = {}
    for name, pool in (("inline", INLINE), ("workers", config)):
        workspace = Workspace(experiment, tmp_path / name)
        run_sweep(workspace, pool)
        _, study = load_sweep(workspace)
        assert [t.number for t in study.trials] == [0, 1, 2]
        losses[name] = study.trials[0].losses
    assert losses["inline"]["0"] == losses["workers"]["0"]


def test_results_of_another_experiment_are_refused(workspace: Workspace) -> None:
    run_sweep(workspace, INLINE)
    e = workspace.experiment
    other = Workspace(
        e.model_copy(update={"train": e.train.model_copy(update={"steps": 13})}), workspace.root
    )
    with pytest.raises(UserError, match=r"train\.steps: 12, not 13"):
        load_sweep(other)
    with pytest.raises(UserError, match=r"train\.steps: 12, not 13"):
        run_sweep(other, INLINE)


def test_steps_out_of_order_say_what_to_run(workspace: Workspace) -> None:
    with pytest.raises(UserError, match="mutransfer sweep"):
        run_transfer_check(workspace, INLINE)


def test_an_interrupted_trial_is_asked_anew_within_the_budget(workspace: Workspace) -> None:
    folder = workspace.folder("sweep")
    study = open_study(workspace.experiment, workspace.corpus.fingerprint, folder)
    trial = study.ask()
    lr = trial.suggest_float("lr", 0.002, 0.05, log=True)
    assert budget_used(study.get_trials()) == 1
    assert requeue_interrupted(study, Lease(study)) == [], "its owner is unknown, not dead"
    run_sweep(workspace, INLINE)
    _, record = load_sweep(workspace)
    assert [t.state for t in record.trials].count("INTERRUPTED") == 1
    assert record.trials[1].params["lr"] == lr
    assert sum(t.state != "INTERRUPTED" for t in record.trials) == 3


def test_the_grid_grows_towards_an_optimum_on_its_border(workspace: Workspace) -> None:
    params, _ = run_sweep(workspace, INLINE)
    with workspace.ledger() as ledger:
        grid = Grid(workspace, params.model_copy(update={"lr": 1e-4}), ledger)
        grid.train(INLINE)
        frame = grid.frame()
    top = frame.groupby("arm").lr.max()
    assert top["completep-tied"] == pytest.approx(4e-4), "one octave of grid and one of growth"
    assert not frame.duplicated(["arm", "width", "lr", "seed"]).any()


def test_the_grid_grows_downwards_where_every_learning_rate_diverges(workspace: Workspace) -> None:
    with workspace.ledger() as ledger:
        grid = Grid(workspace, workspace.experiment.params, ledger)
        for cell, _, spec in list(grid.runs()):
            wide = cell.width == 64
            ledger.add(RunResult(key=spec.key, loss=None if wide else 2.0 + cell.index**2,
                                 evaluations=(), diverged_at=1 if wide else None, tokens=64,
                                 epochs=0.1, seconds=0.0))  # fmt: skip
        grid.train(INLINE)
        frame = grid.frame()
    steps = (frame.lr / workspace.experiment.params.lr).groupby([frame.arm, frame.width]).unique()
    for arm in ("completep-tied", "sp"):
        assert sorted(steps[arm, 32]) == [0.5, 1, 2], "its optimum is inside"
        assert sorted(steps[arm, 64]) == [0.25, 0.5, 1, 2]


def test_a_sweep_on_another_text_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    """The experiment's file is the same, the text that it names is not."""
    e = workspace.experiment
    text = tmp_path / "text.txt"
    text.write_bytes(Path(e.data.train[0]).read_bytes())
    data = e.data.model_copy(update={"train": (str(text),)})
    place = Workspace(e.model_copy(update={"data": data}), workspace.root)
    run_sweep(place, INLINE, trials=1)
    text.write_bytes(text.read_bytes()[::-1])
    with pytest.raises(UserError, match="searches on another text"):
        run_sweep(Workspace(place.experiment, workspace.root), INLINE, trials=1)


def test_a_winner_at_the_end_of_a_range_is_a_warning(experiment: Experiment) -> None:
    assert at_borders(experiment, BaseParams(lr=0.01)) == []
    (line,) = at_borders(experiment, BaseParams(lr=0.0494))
    assert line == "lr = 0.0494 won at the upper end of its range, 0.002 … 0.05: widen it there"
    assert "lower end" in at_borders(experiment, BaseParams(lr=0.00201))[0]


@pytest.mark.slow
def test_kill_9_in_the_middle_of_a_sweep_loses_and_doubles_nothing(
    experiment: Experiment, tmp_path: Path
) -> None:
    sweep = experiment.sweep.model_copy(update={"trials": 8, "pruning": False})
    train = experiment.train.model_copy(update={"steps": 60})
    experiment = experiment.model_copy(update={"sweep": sweep, "train": train})
    (tmp_path / "e.json").write_text(experiment.model_dump_json())
    program = (
        "import sys; from pathlib import Path\n"
        "from sweeps.experiment import Experiment\n"
        "from sweeps.pool import PoolConfig\n"
        "from sweeps.sweep import run_sweep\n"
        "from sweeps.workspace import Workspace\n"
        "e = Experiment.model_validate_json(Path(sys.argv[1], 'e.json').read_text())\n"
        "run_sweep(Workspace(e, Path(sys.argv[1], 'run')), PoolConfig(workers=1, threads=1))\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    ledger = tmp_path / "run" / "ledger.jsonl"
    kills = 0
    for wanted in (1, 3, 5):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            if ledger.exists() and ledger.read_bytes().count(b"\n") >= wanted:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.02)
        process.wait()
    assert kills == 3
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    keys = [json.loads(line)["key"] for line in ledger.read_text().splitlines()]
    assert len(keys) == len(set(keys)), "a run was done twice"
    _, study = load_sweep(Workspace(experiment, tmp_path / "run"))
    states = [t.state for t in study.trials]
    assert len(states) - states.count("INTERRUPTED") == 8
    assert "RUNNING" not in states
