"""The record of a run: `metrics.jsonl`, one JSON object per line, and the same for TensorBoard.

Kinds of lines, all with `step` and `tokens` (done so far): `train`, `heldout`, `skipped` and
`hand_over`. Lines are only ever appended; taking up a run first cuts those of steps that will
be done again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch.utils.tensorboard import SummaryWriter

Record = dict[str, Any]


class Metrics:
    """Appends to a run's record; a context manager.

    Args:
        folder: The run folder.
        step: The step that the run goes on from: what is recorded beyond it is cut.
    """

    def __init__(self, folder: Path, *, step: int) -> None:
        path = folder / "metrics.jsonl"
        _cut(path, step)
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._board.close()
        self._file.close()

    def write(self, kind: str, *, step: int, tokens: int, **values: object) -> None:
        """Records one line; numbers in it, nested ones too, become TensorBoard scalars.

        Raises:
            ValueError: A value is NaN or infinite, which JSON cannot hold.
        """
        record = {"kind": kind, "step": step, "tokens": tokens, **values}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in _scalars(kind, values):
            self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        """Makes sure that all of it is on the disk, as a checkpoint that follows it will be."""
        os.fsync(self._file.fileno())
        self._board.flush()


def read_metrics(folder: Path) -> list[Record]:
    """The record of the run in `folder`, in order; empty where there is none."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _scalars(prefix: str, values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _scalars(f"{prefix}/{key}", value)
        elif isinstance(value, int | float):
            yield f"{prefix}/{key}", float(value)


def _cut(path: Path, step: int) -> None:
    """Cuts the record where it goes beyond `step`, or where a line is not whole."""
    if not path.is_file():
        return
    end = 0
    with path.open("rb") as file:
        for line in file:
            try:
                beyond = json.loads(line)["step"] > step
            except (ValueError, KeyError, TypeError):
                beyond = True
            if beyond or not line.endswith(b"\n"):
                break
            end += len(line)
    os.truncate(path, end)
