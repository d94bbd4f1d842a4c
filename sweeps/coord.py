"""The coordinate check of an experiment: its decoder at several sizes on one fixed batch."""

from __future__ import annotations

from typing import Any

import torch

from mutransfer.apply import initialize
from mutransfer.coord_check import CoordCheckResult, Trainable, coord_check
from mutransfer.errors import UserError
from mutransfer.files import atomic_path
from mutransfer.optimizers import Matrix, Optimizers
from mutransfer.preflight import sizes
from mutransfer.progress import Report, part, quiet
from mutransfer.rules import BaseParams
from mutransfer.verdict import plain, worst
from proxies.data import Batches
from proxies.decoder import DecoderConfig
from proxies.population import MemberState, Population
from proxies.tables import decoder_table
from sweeps.coord_options import (
    DEFAULT,
    CoordOptions,
    build,
    loss_in,
    set_scales,
    take_over,
    train_until,
)
from sweeps.sweep import load_sweep
from sweeps.workspace import Workspace


def run_coord_check(
    workspace: Workspace, options: CoordOptions = DEFAULT, *, progress: Report = quiet
) -> dict[str, CoordCheckResult]:
    """Runs the check for the experiment's parametrization and for each contrast.

    Leaves `coord_check.csv`, `.json` and `.png` in the folder `coord-check`, and a picture
    `coord_check_<optimizer>.png` for a second optimizer. The verdict is the worst of the
    parametrization's own, one per optimizer; contrasts do not enter it. Any check but the
    default one puts `options.suffix` behind `coord_check`: `export` reads the default's alone.

    Args:
        workspace: The experiment's.
        options: Which check. A late one is made beside an early one of the same models, and
            says by how much slopes have drifted in between.
        progress: Takes one line per model.

    Returns:
        Results by name: `<parametrization> <optimizer>`, contrasts last; before each late one
        the early one that it is held against, whose name ends in ` early`.

    Raises:
        UserError: The text is too short, a width does not fit the target, or a late check would
            run into the decay of the learning rate.
    """
    import pandas as pd

    from mutransfer.coord_plot import coord_check_figure

    e, folder = workspace.experiment, workspace.folder("coord-check")
    c = e.coord_check
    late = options.late_steps(e.train, c.steps)
    params = _params(workspace, progress)
    arms = [(arm, kind) for arm in (e.parametrization, *e.contrast) for kind in c.optimizers]
    starts = (0, late) if late else (0,)
    rounds = [(arm, kind, start) for arm, kind in arms for start in starts]
    results: dict[str, CoordCheckResult] = {}
    frames = []
    for place, (arm, kind, start) in enumerate(rounds):
        name = f"{arm} {kind}"
        result = coord_check(
            CoordFactory(workspace, params, arm, kind, options, start),  # type: ignore[arg-type]
            c.depths if options.axis == "depth" else c.widths,
            seeds=c.seeds,
            steps=c.steps,
            axis=options.axis,
            progress=part(progress, place / len(rounds), (place + 1) / len(rounds)),
        )
        frames.append(result.frame.assign(arm=name, trained=start))
        if start:
            results[f"{name} early"] = results.pop(name)
            result = result.since(results[f"{name} early"])
        results[name] = result
    verdict = worst(r.verdict for n, r in results.items() if n.split()[0] == e.parametrization)
    stem = f"coord_check{options.suffix}"
    with atomic_path(folder / f"{stem}.csv") as path:
        pd.concat(frames).to_csv(path, index=False)
    checks = {name: result.to_json() for name, result in results.items()}
    found = {
        "checks": checks,
        "options": {"axis": options.axis, "late": late, "precision": options.precision},
        "base_hyperparameters": params.model_dump(),
    }
    if options == DEFAULT:
        found["replay"] = _replay(workspace, params)
    workspace.save("coord_check", verdict, found, suffix=options.suffix)
    for kind in c.optimizers:
        shown = [results[f"{arm} {kind}"] for arm in (e.parametrization, *e.contrast[:1])]
        name = stem if kind == c.optimizers[0] else f"{stem}_{kind}"
        with atomic_path(folder / f"{name}.png") as path:
            figure = coord_check_figure(*shown, precision=options.precision)
            figure.savefig(path, format="png", dpi=150)
    return results


def _replay(workspace: Workspace, params: BaseParams) -> dict[str, Any]:
    """The narrowest model under each optimizer, for `mutransfer preflight` to measure again."""
    e, c = workspace.experiment, workspace.experiment.coord_check
    width, found = min(c.widths), []
    optimizers: tuple[Matrix, ...] = ("adamw", "muon")
    for optimizer in optimizers:
        trainable = CoordFactory(workspace, params, e.parametrization, optimizer)(width, 0)
        found += [
            {"optimizer": optimizer, "kind": kind, "name": name, "t": t, "value": value}
            for (kind, name, t), value in sizes(trainable, c.steps, eps=True).items()
        ]
    replay: dict[str, Any] = plain(
        {
            "width": width,
            "n_layers": e.model_at(width).n_layers,
            "seed": 0,
            "steps": c.steps,
            "tokens": _batches(workspace).at(0).tolist(),
            "sizes": found,
        }
    )
    return replay


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


def _batches(workspace: Workspace) -> Batches:
    """Batch n is what the models of seed n see, at every width."""
    c = workspace.experiment.coord_check
    return Batches(workspace.corpus.train, seq_len=c.seq_len, batch_size=c.batch_size, seed=0)


class CoordFactory:
    """Builds the decoder of a size, with its optimizers and one batch for all sizes.

    Args:
        workspace: The experiment's.
        params: Base hyperparameters.
        arm: Name of the rules.
        optimizer: Of the hidden matrices.
        options: What a size is, and what models compute in.
        late: Steps of a proxy run that every model is trained for.
    """

    def __init__(
        self,
        workspace: Workspace,
        params: BaseParams,
        arm: str,
        optimizer: Matrix,
        options: CoordOptions = DEFAULT,
        late: int = 0,
    ) -> None:
        e = workspace.experiment
        self._workspace, self._experiment, self._params = workspace, e, params
        self._members: list[MemberState] | None = None
        self._corpus, self._options, self._late = workspace.corpus, options, late
        self._arm, self._optimizer = arm, optimizer
        self._batches = _batches(workspace)

    def __call__(self, size: int, seed: int) -> Trainable:
        e, precision = self._experiment, self._options.precision
        deep = self._options.axis == "depth"
        config = e.model_at(e.proxy.d_model, size) if deep else e.model_at(size)
        table = decoder_table(config, e.base, self._params, self._arm, base_width=e.base_width)
        model = build(config, precision)
        initialize(model, table, seed=seed)
        optimizers, loss_of = Optimizers(model, table, self._optimizer), loss_in(model, precision)
        batch = torch.from_numpy(self._batches.at(seed))
        if precision == "fp8":
            set_scales(loss_of, batch, optimizers)
        if self._late and precision == "fp8":
            train_until(self._late, e.train, model, optimizers, loss_of, self._corpus, seed)
        elif self._late:
            take_over(self._late, e.train, model, optimizers, self._trained(config)[seed])
        return Trainable(
            model=model,
            optimizer=optimizers,
            loss=lambda: loss_of(batch),
            table=table,
            tokens=batch[:, :-1],
            trained=self._late,
        )

    def _trained(self, config: DecoderConfig) -> list[MemberState]:
        """All seeds of a size after the steps of a late check, trained as one population."""
        if self._members is None or self._members[0].spec.model != config:
            specs = [
                self._workspace.spec(config, self._params, seed, self._arm)
                for seed in range(self._experiment.coord_check.seeds)
            ]
            train = self._experiment.train.model_copy(update={"precision": self._options.precision})
            population = Population(
                self._corpus,
                [spec.model_copy(update={"train": train}) for spec in specs],
                matrix=self._optimizer,
            )
            for _ in range(self._late):
                population.step()
            self._members = [population.state(member) for member in population.members]
        return self._members
