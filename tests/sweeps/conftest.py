"""A tiny experiment on text of its own."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from sweeps.experiment import Experiment
from sweeps.workspace import Workspace


def tiny_record(text: Path) -> dict[str, object]:
    """An experiment that trains in a second: two widths, 12 steps."""
    return {
        "name": "tiny",
        "target": {"d_model": 64, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16,
                   "d_ff": 160, "vocab_size": 256},
        "proxy": {"d_model": 32},
        "data": {"train": [str(text)], "heldout_fraction": 0.3},
        "train": {"steps": 12, "batch_size": 4, "seq_len": 16, "heldout_tokens": 256, "rungs": 2},
        "search": {"lr": {"low": 0.002, "high": 0.05}},
        "sweep": {"trials": 3, "startup": 2, "confirm": 1, "confirm_seeds": 2},
        "coord_check": {"widths": [32, 64, 96], "seeds": 1, "steps": 4, "batch_size": 2,
                        "seq_len": 16},
        "transfer_check": {"widths": [32, 64], "seeds": 2, "octaves": 1, "extend": 1},
    }  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text file of 60 kB with structure to learn."""
    words = ["width", "depth", "loss", "learning", "rate", "proxy", "target", "muon", "adam"]
    draw = random.Random(0)
    path = tmp_path / "text.txt"
    path.write_text("\n".join(" ".join(draw.choices(words, k=8)) for _ in range(1200)))
    return path


@pytest.fixture
def experiment(text: Path) -> Experiment:
    """The tiny experiment."""
    return Experiment.model_validate(tiny_record(text))


@pytest.fixture
def workspace(experiment: Experiment, tmp_path: Path) -> Workspace:
    """Its workspace, empty."""
    return Workspace(experiment, tmp_path / "run")
