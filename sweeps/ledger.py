"""The ledger: every finished proxy run of an experiment, one JSON line each.

It is what makes every command resume by itself: a run on record is not run again.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import ValidationError

from mutransfer.errors import UserError
from proxies.run import RunResult


class Ledger:
    """An append-only file of run results; one process at a time holds it.

    The lock belongs to the process and goes with it, so a killed one leaves none behind. A
    line that was torn by a crash is cut off.

    Args:
        path: The file; made with its folder where there is none.

    Raises:
        UserError: Another process holds it, or a line in the middle is not a result.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(
                "another process is working on this experiment",
                where=str(path),
                cure="Wait for it, stop it, or give --out another folder.",
            ) from None
        try:
            self._results = self._read()
        except UserError:
            self._file.close()
            raise

    def _read(self) -> dict[str, RunResult]:
        self._file.seek(0)
        results, good = {}, 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                result = RunResult.model_validate_json(line)
            except ValidationError as error:
                raise UserError(
                    "line is not a run result",
                    where=f"{self.path}:{number}",
                    cure="Move the file away to start anew.",
                ) from error
            results[result.key] = result
            good += len(line)
        self._file.truncate(good)
        self._file.seek(good)
        return results

    def get(self, key: str) -> RunResult | None:
        """The result of the run called `key`, if it is on record."""
        return self._results.get(key)

    def add(self, result: RunResult) -> None:
        """Puts a result on record; it is on the disk when this returns."""
        self._file.write(result.model_dump_json().encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._results[result.key] = result

    def close(self) -> None:
        """Lets go of the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
