"""What a run says while it goes: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class Display:
    """A progress bar over tokens, or a line per call where there is no terminal.

    Args:
        steps: Steps of the whole run.
        tokens: Tokens of the whole run.
        console: Where to; standard output by default.
    """

    def __init__(self, *, steps: int, tokens: int, console: Console | None = None) -> None:
        self.console = console or Console()
        self._steps, self._tokens = steps, tokens
        self._bar: Progress | None = None
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task("starting", total=tokens)

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

    def go_on_from(self, tokens: int) -> None:
        """Starts the bar, and its estimate of the time left, at `tokens` done already."""
        if self._bar is not None:
            self._bar.reset(self._task, completed=tokens)

    def say(self, line: str) -> None:
        """Prints a line, above the bar where there is one."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def update(
        self, *, step: int, tokens: int, phase: str, loss: float, tokens_per_s: float
    ) -> None:
        """Shows where the run stands.

        Args:
            step: Steps done.
            tokens: Tokens done.
            phase: Name of the phase.
            loss: Last training loss, in nats per token.
            tokens_per_s: Training speed since the last call.
        """
        text = f"{phase} · step {step}/{self._steps} · loss {loss:.4f} · {tokens_per_s:,.0f} tok/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=tokens, description=text)
        else:
            eta = (self._tokens - tokens) / max(tokens_per_s, 1e-9)
            self.say(f"{text} · eta {_duration(eta)}")


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds, as 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
