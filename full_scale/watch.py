"""The curves of a run in the terminal, while it goes on or after it has ended."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from full_scale.metrics import Record
from mutransfer.errors import UserError
from mutransfer.progress import duration

_BLOCKS = " ▁▂▃▄▅▆▇█"
_HEIGHT = 6
_SHOWN = (("loss", "loss (nats per token)"), ("lr_factor", "lr / peak"), ("tokens_per_s", "tok/s"))

Points = list[tuple[float, float]]


def watch(folder: Path, *, once: bool = False, every: float = 2.0) -> None:
    """Shows a run's loss, learning rate and speed; refreshes until the run has ended.

    Args:
        folder: Of the run.
        once: Whether to show it as it stands and return.
        every: Seconds between two looks.

    Raises:
        UserError: There is no record of a run.
    """
    console = Console()
    if once or not console.is_terminal:
        console.print(view(folder, console.width))
        return
    with Live(view(folder, console.width), console=console, auto_refresh=False) as live:
        while not (folder / "run.json").is_file():
            time.sleep(every)
            live.update(view(folder, console.width), refresh=True)
        live.update(view(folder, console.width), refresh=True)


def view(folder: Path, width: int) -> RenderableType:
    """The run as it stands, in so many columns.

    Raises:
        UserError: There is no record of a run.
    """
    records = whole_records(folder)
    train = [record for record in records if record["kind"] == "train"]
    if not train:
        raise UserError("no step of a run is on record", where=str(folder / "metrics.jsonl"),
                        cure="Name the run folder of `mutransfer train`.")  # fmt: skip
    parts: list[RenderableType] = [Text(line) for line in status(folder, records)]
    for key, title in _SHOWN:
        points = [(r["tokens"], r[key]) for r in train if r.get(key) is not None]
        if points:
            rows = draw(points, width - 14, _HEIGHT if key == "loss" else 3)
            parts.append(Panel(Text("\n".join(rows)), title=title, title_align="left"))
    return Group(*parts)


def whole_records(folder: Path) -> list[Record]:
    """The record so far; a last line that is being written is left out."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


def status(folder: Path, records: list[Record]) -> list[str]:
    """Where the run stands, in a few lines."""
    last: dict[str, Any] = {record["kind"]: record for record in records}
    train = last["train"]
    state = "finished" if (folder / "run.json").is_file() else "not finished"
    lines = [
        f"{folder} · {state} · phase {train['phase']} · step {train['step']:,} · "
        f"{train['tokens']:,} tokens · loss {train['loss']:.4f} · grad norm "
        f"{train['grad_norm']:.3g} · {train['tokens_per_s']:,.0f} tok/s"
    ]
    more = []
    if train.get("mfu") is not None:
        more.append(f"MFU {train['mfu']:.1%}")
    if train.get("attention_logit") is not None:
        more.append(f"largest attention logit {train['attention_logit']:.3g}")
    if train.get("phase_seconds_left"):
        more.append(f"phase left {duration(train['phase_seconds_left'])}")
    if "heldout" in last:
        more.append(f"held-out loss {last['heldout']['loss']:.4f}")
    if "hand_over" in last:
        more.append(f"on Muon since step {last['hand_over']['step']:,}")
    if train["skipped"]:
        more.append(f"{train['skipped']} steps skipped")
    return [*lines, " · ".join(more)] if more else lines


def draw(points: Points, width: int, height: int) -> list[str]:
    """A curve as rows of text, the highest first, with its values' range at the left.

    Args:
        points: (x, value), by rising x; what falls into one column is averaged.
        width: Columns of the curve.
        height: Rows.
    """
    columns = _columns(points, max(1, width))
    known = [value for value in columns if value is not None]
    low, high = min(known), max(known)
    span = (high - low) or 1.0
    eighths = [
        None if value is None else max(1, math.ceil((value - low) / span * 8 * height))
        for value in columns
    ]
    rows = []
    for row in reversed(range(height)):
        filled = (0 if e is None else min(8, max(0, e - 8 * row)) for e in eighths)
        label = high if row == height - 1 else low if row == 0 else None
        name = "" if label is None else f"{label:.4g}"
        rows.append(f"{name:>8} " + "".join(_BLOCKS[f] for f in filled))
    return rows


def _columns(points: Points, width: int) -> list[float | None]:
    """The mean value in each column; the one before where there is none."""
    first, last = points[0][0], points[-1][0]
    found: list[list[float]] = [[] for _ in range(width)]
    for x, value in points:
        place = (x - first) / (last - first) if last > first else 0.0
        found[min(width - 1, int(place * width))].append(value)
    columns: list[float | None] = []
    for values in found:
        before = columns[-1] if columns else None
        columns.append(sum(values) / len(values) if values else before)
    return columns
