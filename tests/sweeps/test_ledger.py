"""The ledger: on the disk when it says so, whole lines only, one holder."""

from __future__ import annotations

from pathlib import Path

import pytest

from mutransfer.errors import UserError
from proxies.run import RunResult
from sweeps.ledger import Ledger


def result(key: str) -> RunResult:
    return RunResult(key=key, loss=1.0, evaluations=((1, 1.0),), diverged_at=None, tokens=1,
                     epochs=0.1, seconds=0.0)  # fmt: skip


def test_results_survive_and_a_torn_line_does_not(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        ledger.add(result("a"))
        ledger.add(result("b"))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": "c", "lo')
    with Ledger(path) as ledger:
        assert ledger.get("a") == result("a")
        assert ledger.get("c") is None
        ledger.add(result("d"))
    lines = path.read_bytes().splitlines()
    assert [RunResult.model_validate_json(line).key for line in lines] == ["a", "b", "d"]


def test_a_bad_line_in_the_middle_is_an_error_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"key": 1}\n')
    with pytest.raises(UserError, match=r"ledger\.jsonl:1"):
        Ledger(path)


def test_a_second_holder_is_refused(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l"), pytest.raises(UserError, match="another process"):
        Ledger(tmp_path / "l")
    with Ledger(tmp_path / "l") as again:
        assert again.get("a") is None
