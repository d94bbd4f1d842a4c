"""The quickstart, as a newcomer runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mutransfer.quickstart import summary


@pytest.mark.slow
def test_quickstart_shows_what_it_promises(tmp_path: Path) -> None:
    out = tmp_path / "quickstart"
    done = subprocess.run(
        [sys.executable, "-m", "mutransfer", "quickstart", "--out", str(out)],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    checks = json.loads((out / "coord-check" / "coord_check.json").read_text())["checks"]
    assert {name: check["verdict"] for name, check in checks.items()} == {
        "completep-tied adamw": "PASS", "completep-tied muon": "PASS",
        "sp adamw": "FAIL", "sp muon": "FAIL",
    }  # fmt: skip
    own, sp = json.loads((out / "transfer-check" / "transfer_check.json").read_text())["arms"]
    assert own["verdict"] != "FAIL"
    assert (own["drift"] or 0.0) < sp["drift_low"], (
        "μP's optimum moves less than SP's at least does"
    )
    preflight = json.loads((out / "preflight" / "preflight.json").read_text())
    assert preflight["verdict"] == "PASS"
    assert (preflight["target"], preflight["widths"]) == (128, [32, 64])
    run = json.loads((out / "train" / "run.json").read_text())
    assert [phase["name"] for phase in run["phases"]] == [
        "warmup", "stable-1", "stable-2", "decay", "long-context",
    ]  # fmt: skip
    losses = [phase["heldout_loss"] for phase in run["phases"]]
    assert losses == sorted(losses, reverse=True), "every phase learns"
    sweep = json.loads((out / "sweep" / "sweep.json").read_text())
    assert run["heldout_loss"] == losses[-1] < sweep["mean_loss"], "more than the proxy did"
    assert run["hand_over"] is not None
    said = done.stdout[done.stdout.index("what it showed") :]
    for line in summary(out):
        assert line in said
    for name in ("coord-check/coord_check", "transfer-check/transfer_check",
                 "preflight/preflight", "train/loss"):  # fmt: skip
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
