"""A workspace for the tiny experiment."""

from __future__ import annotations

from pathlib import Path

import pytest

from sweeps.experiment import Experiment
from sweeps.workspace import Workspace


@pytest.fixture
def experiment(tiny_experiment: Experiment) -> Experiment:
    """The tiny experiment."""
    return tiny_experiment


@pytest.fixture
def workspace(experiment: Experiment, tmp_path: Path) -> Workspace:
    """Its workspace, empty."""
    return Workspace(experiment, tmp_path / "run")
