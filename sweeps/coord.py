"""The coordinate check of an experiment: its decoder at several widths on one fixed batch."""

from __future__ import annotations

import torch

from mutransfer.apply import initialize
from mutransfer.coord_check import CoordCheckResult, Trainable, coord_check
from mutransfer.errors import UserError
from mutransfer.files import atomic_path
from mutransfer.optimizers import Matrix, Optimizers
from mutransfer.progress import Report, part, quiet
from mutransfer.rules import BaseParams
from mutransfer.verdict import worst
from proxies.data import Batches
from proxies.decoder import Decoder
from proxies.tables import decoder_table
from sweeps.sweep import load_sweep
from sweeps.workspace import Workspace


def run_coord_check(
    workspace: Workspace, *, progress: Report = quiet
) -> dict[str, CoordCheckResult]:
    """Runs the check for the experiment's parametrization and for each contrast.

    Leaves `coord_check.csv`, `.json` and `.png` in the folder `coord-check`, and a picture
    `coord_check_<optimizer>.png` for a second optimizer. The verdict is the worst of the
    parametrization's own, one per optimizer; contrasts do not enter it.

    Returns:
        Results by name: `<parametrization> <optimizer>`, contrasts last.

    Raises:
        UserError: The text is too short, or a width does not fit the target.
    """
    import pandas as pd

    from mutransfer.coord_plot import coord_check_figure

    e, folder = workspace.experiment, workspace.folder("coord-check")
    c, params = e.coord_check, _params(workspace, progress)
    arms = [(arm, kind) for arm in (e.parametrization, *e.contrast) for kind in c.optimizers]
    results: dict[str, CoordCheckResult] = {}
    for place, (arm, kind) in enumerate(arms):
        results[f"{arm} {kind}"] = coord_check(
            _Factory(workspace, params, arm, kind),  # type: ignore[arg-type]
            c.widths,
            seeds=c.seeds,
            steps=c.steps,
            progress=part(progress, place / len(arms), (place + 1) / len(arms)),
        )
    own = [results[f"{e.parametrization} {optimizer}"] for optimizer in c.optimizers]
    verdict = worst(r.verdict for r in own)
    frames = [result.frame.assign(arm=name) for name, result in results.items()]
    with atomic_path(folder / "coord_check.csv") as path:
        pd.concat(frames).to_csv(path, index=False)
    checks = {name: result.to_json() for name, result in results.items()}
    found = {"checks": checks, "base_hyperparameters": params.model_dump()}
    workspace.save("coord_check", verdict, found)
    for kind in c.optimizers:
        shown = [results[f"{arm} {kind}"] for arm in (e.parametrization, *e.contrast[:1])]
        name = "coord_check" if kind == c.optimizers[0] else f"coord_check_{kind}"
        with atomic_path(folder / f"{name}.png") as path:
            coord_check_figure(*shown).savefig(path, format="png", dpi=150)
    return results


def _params(workspace: Workspace, progress: Report) -> BaseParams:
    """What to check at: the winner of this experiment's sweep, or before it the file's values."""
    e = workspace.experiment
    try:
        params, _ = load_sweep(workspace)
        progress("checked at the hyperparameters that won the sweep")
    except UserError:
        params = e.params
        progress("no sweep of this experiment yet: checked at the experiment's own [params]")
    return params.model_copy(update={"lr": e.coord_check.lr or params.lr})


class _Factory:
    """Builds the decoder of a width, with its optimizers and one batch for all widths."""

    def __init__(
        self, workspace: Workspace, params: BaseParams, arm: str, optimizer: Matrix
    ) -> None:
        e, c = workspace.experiment, workspace.experiment.coord_check
        self._experiment, self._params = e, params
        self._arm, self._optimizer = arm, optimizer
        self._batches = Batches(
            workspace.corpus.train, seq_len=c.seq_len, batch_size=c.batch_size, seed=0
        )

    def __call__(self, width: int, seed: int) -> Trainable:
        e = self._experiment
        config = e.model_at(width)
        table = decoder_table(config, e.base, self._params, self._arm, base_width=e.base_width)
        model = Decoder(config)
        initialize(model, table, seed=seed)
        batch = torch.from_numpy(self._batches.at(seed))
        return Trainable(
            model=model,
            optimizer=Optimizers(model, table, self._optimizer),
            loss=lambda: model.loss(batch),
            table=table,
            tokens=batch[:, :-1],
        )
