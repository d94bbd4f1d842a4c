"""What a run says: plain lines without a terminal, a bar with one."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from full_scale.progress import Display


@pytest.mark.parametrize("terminal", [False, True])
def test_lines_and_bar(terminal: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120)
    with Display(steps=10, tokens=1000, console=console) as display:
        display.go_on_from(100)
        display.say("a [bracket] stays")
        display.update(step=5, tokens=500, phase="decay", loss=1.23456, tokens_per_s=0.125)
    text = out.getvalue()
    assert "a [bracket] stays" in text
    assert "decay · step 5/10 · loss 1.2346 · 0 tok/s" in text
    assert ("eta 1:06:40" in text) == (not terminal)
    assert ("50%" in text) == terminal
