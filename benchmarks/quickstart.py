"""How long the quickstart takes, and how much memory all of its processes have together.

    python benchmarks/quickstart.py --out benchmarks/results/quickstart/quickstart.json

Memory is the sum of the proportional set sizes (Linux: shared pages count once) of the command and
of the processes that it starts, looked at twice a second.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from mutransfer.files import read_json, write_json
from mutransfer.quickstart import summary
from sweeps.pool import cores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart-benchmark.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "quickstart"
        started, peak = time.monotonic(), 0
        process = subprocess.Popen([sys.executable, "-m", "mutransfer", "quickstart", "--out", run])
        while process.poll() is None:
            peak = max(peak, sum(map(_pss, _tree(process.pid))))
            time.sleep(0.5)
        seconds = time.monotonic() - started
        checks = {name: read_json(run / name.replace("_", "-") / f"{name}.json")
                  for name in ("coord_check", "transfer_check")}  # fmt: skip
        result = {
            "exit_code": process.returncode,
            "seconds": round(seconds, 1),
            "peak_mib": round(peak / 2**20),
            "verdicts": {name: check["verdict"] for name, check in checks.items()},  # type: ignore[index]
            "summary": summary(run),
            "machine": f"{cores()} cores, {platform.machine()}",
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
    write_json(args.out, result)
    print(result)


def _tree(pid: int) -> list[int]:
    """A process and all that it started, as far as they live."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*"):
            try:
                found += [int(child) for child in (task / "children").read_text().split()]
            except OSError:
                continue
    return found


def _pss(pid: int) -> int:
    """Proportional set size in bytes; 0 of a process that is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


if __name__ == "__main__":
    main()
