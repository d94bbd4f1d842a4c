"""`transfer-check --from FILE`: runs that somebody else made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mutransfer.cli import main


def runs(optimum: dict[int, float]) -> str:
    """A CSV of parabolas over log2 lr, one per width, with the given minima; three seeds."""
    lines = ["arm,width,lr,seed,loss,epochs"]
    for width, best in optimum.items():
        for power in range(-10, -3):
            for seed in range(3):
                loss = 2 + 0.1 * (power - best) ** 2 + 0.001 * seed
                lines.append(f"mine,{width},{2.0**power},{seed},{loss},0.5")
    return "\n".join(lines) + "\n"


def test_a_file_of_runs_is_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "runs.csv"
    for optimum, code, verdict in (({64: -7.0, 128: -7.2}, 0, "PASS"),
                                   ({64: -5.0, 128: -7.5}, 1, "FAIL")):  # fmt: skip
        source.write_text(runs(optimum))
        out = tmp_path / verdict
        assert main(["transfer-check", "--from", str(source), "--out", str(out)]) == code
        assert f"transfer check: {verdict}" in capsys.readouterr().out
        record = json.loads((out / "transfer-check" / "transfer_check.json").read_text())
        assert record["verdict"] == verdict
        assert len(record["source_sha256"]) == 64
        for suffix in ("csv", "png"):
            assert (out / "transfer-check" / f"transfer_check.{suffix}").stat().st_size > 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["runs.csv", "not a readable CSV file"]),
        ("", ["runs.csv", "arm, width, lr, seed, loss"]),
        ("a,b\n1,2\n", ["no column", "'arm'"]),
    ],
)
def test_a_bad_file_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, words: list[str]
) -> None:
    source = tmp_path / "runs.csv"
    if content is not None:
        source.write_text(content)
    assert main(["transfer-check", "--from", str(source), "--out", str(tmp_path / "o")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for word in words:
        assert word in line
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(("words", "got"), [([], "neither"), (["e", "--from", "f"], "both")])
def test_one_source_of_runs_at_a_time(
    capsys: pytest.CaptureFixture[str], words: list[str], got: str
) -> None:
    assert main(["transfer-check", *words]) == 2
    assert got in capsys.readouterr().err
