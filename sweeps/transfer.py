"""The transfer check of an experiment: trains the grid, extends it, judges it."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from mutransfer.errors import UserError
from mutransfer.files import atomic_path, write_json
from mutransfer.progress import Report, quiet
from mutransfer.rules import BaseParams
from mutransfer.transfer import transfer_check
from mutransfer.transfer_frame import COLUMNS
from mutransfer.transfer_result import TransferResult
from proxies.run import RunSpec
from sweeps.desk import Job
from sweeps.ledger import Ledger
from sweeps.pool import PoolConfig, run_missing
from sweeps.sweep import load_sweep
from sweeps.workspace import Workspace


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One learning rate of one arm at one width; `index` counts grid steps from the sweep's lr."""

    arm: str
    width: int
    index: int


class Grid:
    """The runs of a transfer check: seeds of every cell, around the learning rate of the sweep.

    Every arm starts with the same grid at every width. Where the best cell of a width is its
    first or last, the grid grows by one octave on that side, up to the experiment's limit, so
    that an optimum is found rather than missed.
    """

    def __init__(self, workspace: Workspace, params: BaseParams, ledger: Ledger) -> None:
        self._workspace, self._params, self._ledger = workspace, params, ledger
        e, c = workspace.experiment, workspace.experiment.transfer_check
        self._step = c.per_octave
        self._seeds = dict.fromkeys(e.contrast, range(c.contrast_seeds or c.seeds))
        self._seeds[e.parametrization] = range(c.seeds)
        self._limit = (c.octaves + c.extend) * c.per_octave
        reach = range(-c.octaves * c.per_octave, c.octaves * c.per_octave + 1)
        self._cells = {
            (arm, width): set(reach)
            for arm in (e.parametrization, *e.contrast)
            for width in c.widths
        }

    def lr(self, cell: Cell) -> float:
        """The base learning rate of a cell."""
        return self._params.lr * math.pow(2.0, cell.index / self._step)

    def spec(self, cell: Cell, seed: int) -> RunSpec:
        """One run of a cell."""
        return self._workspace.spec(
            self._workspace.experiment.model_at(cell.width),
            self._params.model_copy(update={"lr": self.lr(cell)}),
            seed,
            cell.arm,
        )

    def runs(self) -> Iterator[tuple[Cell, int, RunSpec]]:
        """Every run of the grid as it stands, narrow models first."""
        for (arm, width), indices in sorted(self._cells.items(), key=lambda item: item[0][1]):
            for index in sorted(indices):
                cell = Cell(arm=arm, width=width, index=index)
                for seed in self._seeds[arm]:
                    yield cell, seed, self.spec(cell, seed)

    def train(self, pool: PoolConfig, progress: Report = quiet) -> None:
        """Trains what is missing until no grid wants to grow."""
        growing = True
        while growing:
            jobs = [Job(spec, (cell, seed)) for cell, seed, spec in self.runs()]
            folder = self._workspace.corpus.folder
            run_missing(pool, folder, self._ledger, jobs, self._describe, progress)
            growing = self._grow()

    def _describe(self, job: Job) -> str:
        cell, seed = job.tag
        return f"{cell.arm} d_model {cell.width} lr {self.lr(cell):.3g} seed {seed}"

    def frame(self) -> pd.DataFrame:
        """One row per run: arm, width, lr, seed, loss (NaN if diverged), epochs."""
        rows = []
        for cell, seed, spec in self.runs():
            result = self._ledger.get(spec.key)
            assert result is not None
            rows.append(
                {
                    "arm": cell.arm,
                    "width": cell.width,
                    "lr": self.lr(cell),
                    "seed": seed,
                    "loss": math.nan if result.loss is None else result.loss,
                    "epochs": result.epochs,
                    "n_nonembedding": spec.model.n_nonembedding,
                    "n_parameters": spec.model.n_parameters,
                }
            )
        return pd.DataFrame(rows)

    def _grow(self) -> bool:
        """Widens the grids whose best cell is on a border; false if there are none.

        Where every learning rate of a width diverges, lower ones are tried.
        """
        before = sum(map(len, self._cells.values()))
        for (arm, width), indices in self._cells.items():
            means = {i: self._mean(Cell(arm=arm, width=width, index=i)) for i in indices}
            first, last = min(indices), max(indices)
            best = min(indices, key=means.__getitem__)
            if math.isinf(means[best]):
                best = first
            if best == first and first > -self._limit:
                indices.update(range(max(first - self._step, -self._limit), first))
            elif best == last and last < self._limit:
                indices.update(range(last + 1, min(last + self._step, self._limit) + 1))
        return sum(map(len, self._cells.values())) > before

    def _mean(self, cell: Cell) -> float:
        losses = []
        for seed in self._seeds[cell.arm]:
            result = self._ledger.get(self.spec(cell, seed).key)
            assert result is not None
            losses.append(math.inf if result.loss is None else result.loss)
        return sum(losses) / len(losses)


def run_transfer_check(
    workspace: Workspace, pool: PoolConfig, *, progress: Report = quiet
) -> TransferResult:
    """Runs or resumes the transfer check of an experiment and leaves its results.

    Leaves `transfer_check.csv`, `.json` and `.png` in the folder `transfer-check`.

    Raises:
        UserError: There is no sweep yet, or another process is at work here.
    """
    e, folder = workspace.experiment, workspace.folder("transfer-check")
    params, _ = load_sweep(workspace)
    with workspace.ledger() as ledger:
        grid = Grid(workspace, params, ledger)
        grid.train(pool, progress)
        frame = grid.frame()
    result = transfer_check(frame, proxy_width=e.proxy.d_model, contrast=e.contrast)
    _leave(frame, result, folder)
    record = result.to_json() | {
        "seeds": list(range(e.transfer_check.seeds)),
        "base_hyperparameters": params.model_dump(),
    }
    workspace.save("transfer_check", result.verdict, record)
    return result


def judge_file(source: Path, folder: Path) -> TransferResult:
    """Judges runs from a CSV file, whoever made them, and leaves the same files.

    Args:
        source: Columns as `mutransfer.transfer_check` wants them. The proxy is each arm's
            smallest width; an arm called `sp` is a contrast.
        folder: Where the results go.

    Raises:
        UserError: The file cannot be read, or `transfer_check` refuses its runs.
    """
    try:
        content = source.read_bytes()
        frame = pd.read_csv(io.BytesIO(content))
    except (OSError, ValueError) as error:
        raise UserError(f"not a readable CSV file ({error})", where=str(source),
                        expected=f"a header with {', '.join(COLUMNS)}") from error  # fmt: skip
    result = transfer_check(frame)
    folder.mkdir(parents=True, exist_ok=True)
    _leave(frame, result, folder)
    origin = {"source": str(source), "source_sha256": hashlib.sha256(content).hexdigest()}
    write_json(folder / "transfer_check.json", result.to_json() | origin)
    return result


def _leave(frame: pd.DataFrame, result: TransferResult, folder: Path) -> None:
    from mutransfer.transfer_plot import transfer_figure

    with atomic_path(folder / "transfer_check.csv") as path:
        frame.to_csv(path, index=False)
    with atomic_path(folder / "transfer_check.png") as path:
        transfer_figure(frame, result).savefig(path, format="png", dpi=150)
