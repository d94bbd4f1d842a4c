"""The curves of a run in the terminal."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from full_scale import watch
from full_scale.watch import draw, view
from mutransfer.cli import main


def record(folder: Path, steps: int) -> None:
    lines = [
        {"kind": "train", "step": n, "tokens": 10 * n, "phase": "stable", "loss": 5 - n / 10,
         "grad_norm": 1.0, "lr_factor": 1.0, "tokens_per_s": 100.0 + n, "mfu": 0.25,
         "phase_seconds_left": 65.0, "attention_logit": 3.5, "skipped": 0}
        for n in range(1, steps + 1)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))


def shown(folder: Path) -> str:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(view(folder, 80))
    console.file.close()
    return console.export_text()


def test_a_falling_curve_falls() -> None:
    rows = draw([(x, 8.0 - x) for x in range(8)], width=8, height=1)
    assert rows == ["       8 █▇▆▅▄▃▂▁"] or rows[0].split(maxsplit=1)[1] == "█▇▆▅▄▃▂▁"
    high, low = draw([(0, 0.0), (1, 1.0)], width=2, height=2)
    assert high == "       1  █"
    assert low == "       0 ▁█"
    assert draw([(5, 2.0)], width=3, height=1)[0].endswith("▁▁▁")


def test_many_points_are_averaged_and_gaps_filled() -> None:
    assert watch._columns([(0, 1.0), (1, 3.0), (100, 5.0)], 4) == [2.0, 2.0, 2.0, 5.0]


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    record(tmp_path, 5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')  # being written
    text = shown(tmp_path)
    for part in ("not finished", "step 5", "loss 4.5000", "MFU 25.0%", "0:01:05", "lr / peak"):
        assert part in text
    (tmp_path / "run.json").write_text("{}")
    assert "not finished" not in shown(tmp_path)


def test_it_follows_a_run_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(tmp_path, 1)
    monkeypatch.setattr(watch, "Console", lambda: Console(force_terminal=True, width=80))

    def rest() -> None:
        time.sleep(0.1)
        record(tmp_path, 3)
        (tmp_path / "run.json").write_text("{}")

    thread = threading.Thread(target=rest)
    thread.start()
    watch.watch(tmp_path, every=0.02)  # returns, as the run has ended
    thread.join()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path, 4)
    assert main(["watch", str(tmp_path), "--once"]) == 0
    assert "step 4" in capsys.readouterr().out
    assert main(["watch", str(tmp_path / "absent"), "--once"]) == 2
    assert "no step of a run is on record" in capsys.readouterr().err
