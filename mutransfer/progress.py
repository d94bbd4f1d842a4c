"""What long work says while it goes: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class Report(Protocol):
    """Takes what long work has to say."""

    def __call__(self, line: str, share: float | None = None) -> None:
        """Takes a line and the share of the work done so far; a remark comes without one."""


def quiet(line: str, share: float | None = None) -> None:
    """A `Report` that takes no notice."""


def part(report: Report, start: float, end: float) -> Report:
    """A `Report` for work that is the part from `start` to `end` of that of `report`."""

    def within(line: str, share: float | None = None) -> None:
        report(line, None if share is None else start + share * (end - start))

    return within


class Display:
    """A `Report` for people: one progress bar with the latest line, remarks above it.

    Where there is no terminal, every line is printed with the time that is left. That is the
    time since `start_from`, in proportion to the share of the work done since then.

    Args:
        console: Where to; standard output by default.
        clock: Seconds, monotonic.
    """

    def __init__(
        self, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console, self._clock = console or Console(), clock
        self._bar: Progress | None = None
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
                get_time=clock,
            )
            self._task = self._bar.add_task("starting", total=1.0)
        self.start_from(0.0)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start_from(self, share: float) -> None:
        """Starts the bar and the clock at a `share` of the work that is done already."""
        self._began, self._first = self._clock(), share
        if self._bar is not None:
            self._bar.reset(self._task)
            self._bar.update(self._task, completed=share)

    def __call__(self, line: str, share: float | None = None) -> None:
        """Shows a line; with a share it moves the bar, without one it stays above it."""
        if share is None:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
        elif self._bar is not None:
            self._bar.update(self._task, completed=share, description=line)
        else:
            self(f"{line} · left {self._left(share)}")

    def _left(self, share: float) -> str:
        done = share - self._first
        if done <= 0:
            return "?"
        return duration((self._clock() - self._began) * (1 - share) / done)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
