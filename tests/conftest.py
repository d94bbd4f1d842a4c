"""What all tests share: one thread, no display, reproducible search, who skips itself, bundles."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before torch and matplotlib are imported, and inherited by every process that a test starts.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", MPLBACKEND="Agg")

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from sweeps.experiment import Experiment

settings.register_profile("house", deadline=None, derandomize=True, database=None)
settings.load_profile("house")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def tiny_experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """An experiment that trains in a second: two widths, 12 steps, 60 kB of text of its own."""
    from sweeps.experiment import Experiment

    words = ["width", "depth", "loss", "learning", "rate", "proxy", "target", "muon", "adam"]
    draw = random.Random(0)
    text = tmp_path_factory.mktemp("tiny") / "text.txt"
    text.write_text("\n".join(" ".join(draw.choices(words, k=8)) for _ in range(1200)))
    record = {
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
    return Experiment.model_validate(record)


@pytest.fixture(scope="session")
def real_bundle(tiny_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle that the tiny experiment ends with: swept, checked twice and exported."""
    import optuna

    from mutransfer.progress import quiet
    from sweeps.coord import run_coord_check
    from sweeps.export import run_export
    from sweeps.pool import PoolConfig
    from sweeps.sweep import run_sweep
    from sweeps.transfer import run_transfer_check
    from sweeps.workspace import Workspace

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    workspace = Workspace(tiny_experiment, tmp_path_factory.mktemp("flow"))
    inline = PoolConfig(workers=1, threads=1)
    run_sweep(workspace, inline, progress=quiet)
    run_coord_check(workspace, progress=quiet)
    run_transfer_check(workspace, inline, progress=quiet)
    return run_export(workspace)[1]


@pytest.fixture
def passed() -> dict[str, Any]:
    """`evidence` and `provenance` of a bundle whose lr, 2^-7, is trial 1's; both checks PASS."""
    from mutransfer.bundle_evidence import Trial
    from mutransfer.rules import BaseParams

    trials = (
        Trial.of(0, "COMPLETE", {"lr": 2**-5}, {0: 2.4}),
        Trial.of(1, "COMPLETE", {"lr": 2**-7}, {0: 2.5, 1: 2.75, 2: 2.625}),
        Trial.of(2, "COMPLETE", {"lr": 2**-6}, {0: 2.7, 1: 2.9, 2: 2.8}),
        Trial.of(3, "PRUNED", {"lr": 2**-9}, {}),
    )
    provenance: dict[str, Any] = {name: {"source": "fixed"} for name in BaseParams.model_fields}
    line = {
        "optimizer": "adamw",
        "kind": "activation",
        "name": "embedding",
        "t": 0,
        "verdict": "PASS",
    }
    return {
        "provenance": provenance | {"lr": {"source": "study", "study": "test", "trials": [1]}},
        "evidence": {
            "study": {
                "name": "test",
                "selection": "lowest_mean_loss",
                "seeds": [0, 1, 2],
                "trials": [trial.model_dump(mode="json") for trial in trials],
            },
            "coord_check": {
                "verdict": "PASS",
                "lr": 2**-7,
                "symbolic_findings": 0,
                "result_sha256": "c" * 64,
                "widths": [32, 64, 128],
                "replay": {
                    "width": 32,
                    "n_layers": 2,
                    "seed": 0,
                    "steps": 4,
                    "tokens": [[1, 2, 3]],
                    "sizes": [
                        {
                            "optimizer": "adamw",
                            "kind": "weight",
                            "name": "embedding.weight",
                            "t": 0,
                            "value": 0.1,
                        }
                    ],
                },
                "slopes": [
                    {**line, "slope": 0.01, "low": -0.05, "high": 0.06, "expected": 0.0},
                    {**line, "slope": None, "low": None, "high": None, "expected": None},
                ],
            },
            "transfer_check": {
                "verdict": "PASS",
                "drift": 0.25,
                "drift_low": 0.0,
                "drift_high": 0.75,
                "regret": 0.002,
                "regret_low": -0.001,
                "regret_high": 0.01,
                "optima": [
                    {"width": 32, "log2_lr": -7.0, "low": -7.5, "high": -6.5},
                    {"width": 64, "log2_lr": -7.25, "low": -7.75, "high": -6.75},
                    {"width": 128, "log2_lr": -6.875, "low": -7.25, "high": -6.5},
                ],
                "seeds": [0, 2, 4],
                "result_sha256": "d" * 64,
            },
        },
    }
