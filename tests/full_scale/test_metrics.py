"""The record of a run: appended to, cut where it is done again, mirrored for TensorBoard."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from full_scale.metrics import Metrics, read_metrics


def write(folder: Path, start: int, stop: int) -> None:
    with Metrics(folder, step=start) as metrics:
        for step in range(start + 1, stop + 1):
            metrics.write("train", step=step, tokens=10 * step, loss=1 / step, lr={"gain": 0.5})


def test_taking_up_cuts_what_will_be_done_again(tmp_path: Path) -> None:
    write(tmp_path, 0, 6)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    write(tmp_path, 4, 5)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    write(tmp_path, 0, 1)
    assert read_metrics(tmp_path) == [
        {"kind": "train", "step": 1, "tokens": 10, "loss": 1.0, "lr": {"gain": 0.5}}
    ]


@pytest.mark.parametrize("rest", ['{"kind": "tr', '{"step": 2}', "\n", "[]\n"])
def test_a_line_that_is_not_whole_is_cut(tmp_path: Path, rest: str) -> None:
    write(tmp_path, 0, 2)
    whole = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    (tmp_path / "metrics.jsonl").write_text(whole + rest, encoding="utf-8")
    with Metrics(tmp_path, step=2):
        pass
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8") == whole


def test_what_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    refused = pytest.raises(ValueError, match="not JSON compliant")
    with Metrics(tmp_path, step=0) as metrics, refused:
        metrics.write("train", step=1, tokens=1, loss=float("nan"))
    assert read_metrics(tmp_path) == []
    assert read_metrics(tmp_path / "absent") == []


def test_tensorboard_shows_the_run_that_was_taken_up(tmp_path: Path) -> None:
    write(tmp_path, 0, 5)
    write(tmp_path, 3, 6)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert board.Tags()["scalars"] == ["train/loss", "train/lr/gain"]
    events = board.Scalars("train/loss")
    assert [event.step for event in events] == [1, 2, 3, 4, 5, 6]
    assert events[3].value == pytest.approx(1 / 4)
