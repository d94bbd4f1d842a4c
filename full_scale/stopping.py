"""Stopping between two steps: SIGTERM and SIGINT become a request that the loop reads."""

from __future__ import annotations

import fcntl
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from mutransfer.errors import UserError

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Request:
    """Whether somebody asked the run to stop; `by` names the signal."""

    by: str | None = None


@contextmanager
def graceful() -> Iterator[Request]:
    """Turns the first SIGTERM or SIGINT into a request; the second one acts as ever.

    Outside the main thread, where Python allows no handlers, nothing is changed.
    """
    request = Request()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        request.by = signal.Signals(number).name
        restore()

    for number in _SIGNALS:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        restore()


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Holds a run folder; the lock goes with the process, however it ends.

    Raises:
        UserError: Another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                "another process is training in this folder",
                where=str(folder),
                cure="Wait for it, or give this run another --out.",
            ) from error
        yield
