"""What long work says: plain lines with the time left without a terminal, a bar with one."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from mutransfer.progress import Display, duration


def a_clock(*times: float) -> Callable[[], float]:
    """Stands at the last time once all have passed."""
    left = list(times)
    return lambda: left.pop(0) if len(left) > 1 else left[0]


@pytest.mark.parametrize("terminal", [False, True])
def test_lines_and_bar(terminal: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120)
    with Display(console) as display:
        display("a [bracket] stays")
        display("decay · step [5] of 10", 0.5)
    text = out.getvalue()
    assert "a [bracket] stays" in text
    assert "decay · step [5] of 10" in text
    assert ("decay · step [5] of 10 · left 0:00:0" in text) == (not terminal)
    assert ("50%" in text) == terminal


def test_the_time_left_counts_from_where_the_work_was_taken_up() -> None:
    out = io.StringIO()
    display = Display(Console(file=out, width=200), clock=a_clock(0.0, 100.0, 160.0, 220.0))
    display.start_from(0.4)
    display("nothing new", 0.4)
    display("half", 0.5)  # a tenth in 60 s
    display("more", 0.7)  # three tenths in 120 s
    assert out.getvalue().splitlines() == [
        "nothing new · left ?", "half · left 0:05:00", "more · left 0:02:00",
    ]  # fmt: skip


def test_durations() -> None:
    assert [duration(x) for x in (0, 59.6, 3661, 360000)] == [
        "0:00:00", "0:01:00", "1:01:01", "100:00:00",
    ]  # fmt: skip
