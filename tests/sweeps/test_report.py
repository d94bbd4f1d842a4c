"""The report of a sweep: file, table and pictures, from the command line and from trials."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from mutransfer.bundle_evidence import Study, Trial
from mutransfer.cli import main
from mutransfer.rules import BaseParams
from sweeps.experiment import Experiment, Range
from sweeps.pool import PoolConfig
from sweeps.report import outside, run_report, table
from sweeps.report_plots import history_data, history_figure, surface_figure
from sweeps.space import from_unit, sobol, space_of
from sweeps.surface import Surface, fit_surface
from sweeps.sweep import run_sweep
from sweeps.workspace import Workspace

SPACE = space_of({"lr": Range(low=2**-10, high=2**-2), "init_std": Range(low=0.01, high=0.16)})


@pytest.fixture
def record() -> Study:
    """A bowl of 12 trials, one of them pruned and one diverged; the best 3 over 2 seeds."""
    design, found = sobol(2, 0), []
    for number in range(12):
        x = design(number)
        loss = 2.5 + 2 * (x[0] - 0.35) ** 2 + (x[1] - 0.7) ** 2
        found.append((number, from_unit(SPACE, x), loss))
    best = sorted(found, key=lambda row: row[2])[:3]
    states = {row[0]: "COMPLETE" for row in found}
    worst = sorted(found, key=lambda row: -row[2])
    states[worst[0][0]], states[worst[1][0]] = "FAIL", "PRUNED"
    trials = tuple(
        Trial.of(n, states[n], params,  # type: ignore[arg-type]
                 {} if states[n] != "COMPLETE"
                 else {0: loss, 1: loss + 0.02} if (n, params, loss) in best else {0: loss})
        for n, params, loss in found
    )  # fmt: skip
    return Study(name="x", selection="lowest_mean_loss", seeds=(0, 1), trials=trials)


@pytest.fixture
def surface(record: Study) -> Surface:
    return fit_surface(SPACE, record.trials, {"lr": 2**-7, "init_std": 0.02})


def test_the_command_leaves_everything(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = workspace.experiment.canonical
    record["sweep"] |= {"trials": 5, "confirm": 2, "startup": 5, "pruning": False}
    workspace = Workspace(Experiment.model_validate(record), workspace.root)
    run_sweep(workspace, PoolConfig(workers=1, threads=1))
    report, surface = run_report(workspace)
    folder = workspace.folder("sweep-report")
    names = {path.stem for path in folder.glob("*.png")}
    assert names == {"history", "surface", "parallel", "slices", "importance"}
    saved = json.loads((folder / "sweep_report.json").read_text())
    assert saved["schema_version"] == 1
    assert saved["verdict"] == ("WARN" if report["notes"] else "PASS")
    assert saved["experiment_sha256"] == workspace.experiment.sha256
    assert surface is not None
    assert saved["surface"]["axes"]["lr"]["optimum"] == surface.axes["lr"].optimum
    assert saved["winner"]["number"] in range(5)


def test_without_a_sweep_there_is_no_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words " * 20000)
    path = tmp_path / "e.toml"
    path.write_text(f'target = "tiny-128"\n[data]\ntrain = ["{text}"]\n')
    assert main(["sweep-report", str(path), "--out", str(tmp_path / "run")]) == 2
    assert "no result of sweep yet" in capsys.readouterr().err


def test_too_few_trials_are_a_note(workspace: Workspace) -> None:
    run_sweep(workspace, PoolConfig(workers=1, threads=1), trials=2)
    report, surface = run_report(workspace)
    assert surface is None
    assert any("too few complete trials" in note for note in report["notes"])
    saved = json.loads((workspace.folder("sweep-report") / "sweep_report.json").read_text())
    assert (saved["verdict"], saved["surface"]) == ("WARN", None)


def test_history_keeps_the_lowest(record: Study) -> None:
    data = history_data(record)
    assert list(data["number"]) == list(range(12))
    best = math.inf
    for t, row in zip(record.trials, data.itertuples(), strict=True):
        if t.state == "COMPLETE":
            assert t.mean_loss is not None
            best = min(best, t.mean_loss)
            assert row.loss == t.mean_loss
        else:
            assert math.isnan(row.loss)  # type: ignore[arg-type]
        assert row.best == best or math.isinf(best)


def test_pictures_have_axes_units_and_legends(record: Study, surface: Surface) -> None:
    history = history_figure(record).axes[0]
    assert history.get_ylabel() == "held-out loss (nats)"
    texts = {text.get_text() for text in history.get_legend().get_texts()}
    assert {"pruned (1)", "diverged (1)", "lowest so far"} <= texts
    lines = surface_figure(surface, record).axes
    assert [axes.get_xlabel() for axes in lines] == ["lr", "init_std"]
    assert lines[0].get_ylabel() == "held-out loss (nats)"


def test_the_table_marks_what_is_not_told_from_its_default(record: Study, surface: Surface) -> None:
    from rich.console import Console

    report = {
        "trials": 12,
        "winner": record.winner.model_dump() if record.winner else {},
        "importance": {"shares": {"lr": 0.75}},
    }
    console = Console(width=120)
    with console.capture() as captured:
        console.print(table(report, surface))
    text = captured.get()
    assert "75%" in text
    marked = [name for name, axis in surface.axes.items() if not axis.told_from_default]
    for line in text.splitlines():
        words = line.split()
        if words and words[0] in surface.axes:
            assert ("=" in words) == (words[0] in marked)


def test_a_winner_outside_the_interval_is_said(surface: Surface) -> None:
    axis = surface.axes["lr"]
    inside = BaseParams(lr=axis.optimum, init_std=surface.axes["init_std"].optimum)
    assert outside(surface, inside) == []
    (line,) = outside(surface, inside.model_copy(update={"lr": axis.high * 1.5}))
    assert line.startswith("lr = ")
