"""Sweeps as processes, with a real server: killed, stopped, on a full disk, with a secret."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sweeps.experiment import Experiment

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
postgres: Any = importlib.import_module("postgres")

pytestmark = pytest.mark.slow
needs_postgres = pytest.mark.skipif(
    postgres.binaries() is None, reason="needs a PostgreSQL server (Debian: postgresql)"
)


def toml(experiment: Experiment, **sweep: int) -> str:
    """The tiny experiment's file, with other budgets; runs of a second."""
    target = experiment.target.model_dump(exclude={"rope_base", "norm_eps", "tied"})
    lines = [
        'contrast = []', "[target]", *(f"{key} = {value}" for key, value in target.items()),
        "[proxy]", "d_model = 32", "[data]", f'train = ["{experiment.data.train[0]}"]',
        "heldout_fraction = 0.3", "[train]", "steps = 100", "batch_size = 4", "seq_len = 16",
        "heldout_tokens = 256", "rungs = 4", "[search]", "lr = { low = 0.002, high = 0.05 }",
        "[sweep]", "confirm = 1", "confirm_seeds = 1",
        *(f"{key} = {value}" for key, value in sweep.items()),
        "[transfer_check]", "widths = [32, 64]",
    ]  # fmt: skip
    return "\n".join(lines)


def start(file: Path, *args: str, **environment: str) -> subprocess.Popen[str]:
    """`mutransfer sweep`, in a session of its own, on one thread."""
    return subprocess.Popen(
        [sys.executable, "-m", "mutransfer", "sweep", str(file), *args],
        env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=file.parent, start_new_session=True,
        # what a shell starts in the background ignores it, and so would this
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def family(process: subprocess.Popen[str]) -> list[Path]:
    """The process and all below it, in /proc."""
    found = [Path(f"/proc/{process.pid}")]
    for path in found:
        children = path.joinpath("task", path.name, "children").read_text().split()
        found += [Path("/proc", child) for child in children]
    return found


def assert_whole(run: Path, trials: int) -> None:
    """As many trials as were wanted, no two alike."""
    frame = pd.read_csv(run / "sweep" / "trials.csv")
    counting = frame[frame.state != "INTERRUPTED"]
    assert len(counting) == trials
    assert counting.lr.nunique() == trials


def read_until(process: subprocess.Popen[str], word: str) -> str:
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if word in line:
            return seen
    raise AssertionError(f"it ended without {word!r}: {seen} {process.communicate()[1]}")


@needs_postgres
def test_a_shared_study_survives_kills_and_a_database_that_goes_away(tmp_path: Path) -> None:
    """In small: benchmarks/sweep_faults.py has the figures."""
    out = tmp_path / "faults.json"
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "sweep_faults.py", "--processes", "3", "--trials",
         "24", "--kills", "5", "--lease", "8", "--away", "10", "--out", out],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["kills"] == 5
    assert sum(found["states"].values()) == 24
    for key in ("lost", "stuck", "doubled", "over_budget", "missing"):
        assert found[key] == 0, key


@needs_postgres
def test_a_password_is_seen_nowhere(experiment: Experiment, tmp_path: Path) -> None:
    """Not in a list of processes, an output, or a file; workers included."""
    file = tmp_path / "e.toml"
    file.write_text(toml(experiment, trials=4, startup=4))
    with postgres.Postgres() as server:
        process = start(file, "--workers", "2", MUTRANSFER_STORAGE=server.url)
        said = read_until(process, "trial ")
        shown = [path.joinpath("cmdline").read_bytes() for path in family(process)]
        said += "".join(process.communicate())
        assert process.returncode == 0, said
        away = start(file, "--out", str(tmp_path / "b"), MUTRANSFER_STORAGE=server.url + "/nowhere")
        said += "".join(away.communicate())
        assert away.returncode == 2
        secret = server.password
    assert len(shown) >= 3
    assert not any(secret.encode() in line for line in shown)
    assert secret not in said
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "sweep.json" for path in kept)
    assert not any(secret.encode() in path.read_bytes() for path in kept)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_sweep_and_the_same_command_goes_on(
    experiment: Experiment, tmp_path: Path, workers: int, number: signal.Signals
) -> None:
    file = tmp_path / "e.toml"
    file.write_text(toml(experiment, trials=8, startup=4))
    process = start(file, "--workers", str(workers), "--members", "2")
    said = read_until(process, "trial ")
    members = family(process)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    said += process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert "stopped; all that is finished is kept, and the same command goes on" in said
    end = time.monotonic() + 60
    while any(path.exists() for path in members):
        assert time.monotonic() < end, "a worker is left behind"
    again = start(file, "--workers", str(workers), "--members", "2")
    _, errors = again.communicate()
    assert again.returncode == 0, errors
    assert_whole(tmp_path / "runs" / "e", 8)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte, for those who may mount one."""
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("needs the right to mount a file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_the_sweep_goes_on_with_room(
    experiment: Experiment, tmp_path: Path, small_disk: Path
) -> None:
    file = tmp_path / "e.toml"
    file.write_text(toml(experiment, trials=6, startup=6))
    out, ballast = small_disk / "run", small_disk / "ballast"
    process = start(file, "--workers", "1", "--members", "1", "--out", str(out))
    read_until(process, "trial ")
    with suppress(OSError), ballast.open("wb", buffering=0) as disk:
        while True:
            disk.write(bytes(4096))
    more, errors = process.communicate(timeout=120)
    assert process.returncode == 2, more
    (line,) = errors.splitlines()
    assert "No space left on device" in line
    assert "the disk has room" in line
    ballast.unlink()
    again = start(file, "--workers", "1", "--members", "1", "--out", str(out))
    _, errors = again.communicate()
    assert again.returncode == 0, errors
    assert_whole(out, 6)
