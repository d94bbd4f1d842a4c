"""The report of a sweep: the optimum with its interval, and what each hyperparameter matters."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna

from mutransfer.bundle_evidence import Study
from mutransfer.errors import UserError
from mutransfer.files import atomic_path
from mutransfer.rules import BaseParams
from sweeps.plot_data import importance_data
from sweeps.space import space_of
from sweeps.study import open_study
from sweeps.surface import Surface, fit_surface
from sweeps.sweep import at_borders, load_sweep
from sweeps.workspace import Workspace

if TYPE_CHECKING:
    from rich.table import Table


def run_report(
    workspace: Workspace, storage: str | None = None
) -> tuple[dict[str, Any], Surface | None]:
    """Writes `sweep_report.json` and the pictures of a sweep that is done.

    The verdict is WARN where a winning value lies at an end of its range or outside the interval of
    the optimum, or where no surface can be fitted; else PASS.

    Args:
        workspace: The experiment's folder.
        storage: URL of the study's storage, if it is not the embedded one.

    Returns:
        What the file holds, and the surface, if there is one.

    Raises:
        UserError: There is no sweep of this experiment yet.
    """
    e = workspace.experiment
    params, record = load_sweep(workspace)
    with workspace.ledger():
        folder = workspace.folder("sweep")
        study = open_study(e, workspace.corpus.fingerprint, folder, storage)
    surface, notes = None, at_borders(e, params)
    try:
        surface = fit_surface(space_of(e.search), record.trials, e.params.model_dump())
    except UserError as error:
        notes.append(str(error))
    else:
        notes += outside(surface, params)
    shares, importance = importance_data(study)
    winner = record.winner
    assert winner is not None, "load_sweep returns no study without a winner"
    report = {
        "notes": notes,
        "trials": len(record.trials),
        "winner": winner.model_dump(mode="json"),
        "surface": None if surface is None else asdict(surface),
        "importance": {"shares": shares.to_dict(), "how": importance},
    }
    workspace.save("sweep_report", "WARN" if notes else "PASS", report)
    draw(study, record, surface, workspace.folder("sweep-report"))
    return report, surface


def outside(surface: Surface, params: BaseParams) -> list[str]:
    """A sentence for each winning value outside the interval of the optimum."""
    return [
        f"{name} = {getattr(params, name):.4g} won, outside the interval of the optimum, "
        f"{axis.low:.4g} … {axis.high:.4g}: more trials would tell"
        for name, axis in surface.axes.items()
        if not axis.low <= getattr(params, name) <= axis.high
    ]


def table(report: dict[str, Any], surface: Surface) -> Table:
    """The surface as a table for the terminal."""
    from rich.table import Table

    found = Table(
        title=f"optimum of {report['trials']} trials, 95% intervals", title_justify="left"
    )
    found.add_column("hyperparameter")
    for name in ("optimum", "interval", "winner", "default", "×2 costs", "curvature", "importance"):
        found.add_column(name, justify="right")
    won, shares = report["winner"]["params"], report["importance"]["shares"]
    for name, axis in surface.axes.items():
        found.add_row(
            name,
            f"{axis.optimum:.3g}",
            f"{axis.low:.3g} … {axis.high:.3g}",
            f"{won[name]:.3g}",
            f"{axis.default:.3g}" + ("" if axis.told_from_default else " ="),
            f"{axis.octave:.4f}",
            f"{axis.curvature:.4f}",
            f"{shares[name]:.0%}" if name in shares else "–",
        )
    same = [name for name, axis in surface.axes.items() if not axis.told_from_default]
    found.caption = (
        f"loss at the optimum {surface.loss:.4f} [{surface.loss_low:.4f}, "
        f"{surface.loss_high:.4f}] nats; over seeds ± {surface.noise:.4f}. ×2 costs: nats, to the "
        "worse side. curvature: nats per octave²."
    )
    if same:
        found.caption += f" = not told from the default: {', '.join(same)}."
    found.caption_justify = "left"
    return found


def draw(study: optuna.Study, record: Study, surface: Surface | None, folder: Path) -> None:
    """Writes the pictures: history, lines through the optimum, and those of a sweep."""
    from sweeps.plots import sweep_figures
    from sweeps.report_plots import history_figure, surface_figure

    assert record.winner is not None
    figures = sweep_figures(study, record.winner.number)
    figures["history"] = history_figure(record)
    if surface is not None:
        figures["surface"] = surface_figure(surface, record)
    for name, figure in figures.items():
        with atomic_path(folder / f"{name}.png") as path:
            figure.savefig(path, format="png", dpi=150)
