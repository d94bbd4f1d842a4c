"""A sweep's study is a plain Optuna study: optuna-dashboard starts on it and serves it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from sweeps.pool import PoolConfig
from sweeps.sweep import run_sweep
from sweeps.workspace import Workspace

pytest.importorskip("optuna_dashboard")
SECONDS = 60.0  # that the server may take to start


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(url: str, server: subprocess.Popen[bytes]) -> Any:
    """The JSON at an address, once the server answers."""
    end = time.monotonic() + SECONDS
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)
        except (urllib.error.URLError, ConnectionError):
            assert server.poll() is None, "the dashboard ended"
            assert time.monotonic() < end, "the dashboard does not answer"
            time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["journal", "sqlite"])
def test_the_dashboard_serves_a_sweep(workspace: Workspace, tmp_path: Path, storage: str) -> None:
    url = None if storage == "journal" else f"sqlite:///{tmp_path}/study.db"
    _, best = run_sweep(workspace, PoolConfig(workers=1, threads=1), storage=url)
    source = url or str(workspace.folder("sweep") / "study.journal")
    port = free_port()
    code = "import sys; from optuna_dashboard._cli import main; sys.exit(main())"
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, source, "--host", "127.0.0.1",
         "--port", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        address = f"http://127.0.0.1:{port}/api/studies"
        (study,) = get(address, server)["study_summaries"]
        assert study["study_name"] == workspace.experiment.name
        detail = get(f"{address}/{study['study_id']}", server)
        assert len(detail["trials"]) == workspace.experiment.sweep.trials
        assert best.number in {trial["number"] for trial in detail["trials"]}
    finally:
        server.terminate()
        server.wait(timeout=30)
