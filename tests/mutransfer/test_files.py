"""Files are whole or untouched; JSON is strict both ways; errors are one line."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mutransfer.errors import UserError
from mutransfer.files import atomic_path, read_json, write_json, write_text


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail_midway(path: Path) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        assert temporary.parent == path.parent
        raise RuntimeError("midway")


def test_an_exception_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="midway"):
        fail_midway(path)
    assert path.read_text() == "old"
    assert listing(tmp_path) == ["result.json"]


def test_an_exception_leaves_no_file_where_there_was_none(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    with pytest.raises(RuntimeError, match="midway"):
        fail_midway(path)
    assert listing(tmp_path) == []


def test_the_new_file_appears_only_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_text(path, "old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert listing(tmp_path) == ["result.json"]


def test_a_writer_that_dies_leaves_the_old_file_and_the_next_one_succeeds(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_text(path, "old")
    code = (
        "import os, sys\n"
        "from mutransfer.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os._exit(9)\n"
    )
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    dead = subprocess.run([sys.executable, "-c", code, str(path)], env=environment, check=False)
    assert dead.returncode == 9
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"
    assert listing(tmp_path) == ["result.json"]


def test_parents_are_made(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "c.txt", "μP")
    assert (tmp_path / "a" / "b" / "c.txt").read_bytes() == "μP".encode()


def test_json_round_trip(tmp_path: Path) -> None:
    value = {"μ": [1, 2.5, -1e-300, True, None, "…"], "nested": {"lr": 0.1 + 0.2}}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    assert (tmp_path / "x.json").read_text(encoding="utf-8").startswith('{\n  "μ": [')


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_writing_a_number_that_is_none_is_refused_and_keeps_the_old(
    tmp_path: Path, value: float
) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"loss": 1.0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": value})
    assert read_json(path) == {"loss": 1.0}
    assert listing(tmp_path) == ["x.json"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": NaN}', "NaN"),
        ('{"a": [Infinity]}', "Infinity"),
        ('{"a": -Infinity}', "-Infinity"),
        ('{"a": 1e999}', "1e999"),
        ('{"a": -1e999}', "-1e999"),
        ('{"a": 1, "a": 1}', "duplicate key 'a'"),
        ('{"b": {"x": 1, "y": 2, "x": 3}}', "duplicate key 'x'"),
        ('{"a": 1', "delimiter"),
        ("{'a': 1}", "property name"),
        ('{"a": 1} // comment', "Extra data"),
        ("", "Expecting value"),
        ("\ufeff{}", "BOM"),
        ("[" * 200_000, "recursion"),
        ("1" * 5000, "digits"),
    ],
)
def test_what_is_not_strict_json_is_refused_in_one_line(
    tmp_path: Path, text: str, reason: str
) -> None:
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=f"(?i){reason}") as error:
        read_json(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(UserError, match="utf-8"):
        read_json(tmp_path / "x.json")


def test_size_is_bounded_inclusively(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps("x" * 8))
    assert read_json(path, max_bytes=10) == "x" * 8
    with pytest.raises(UserError, match="too large; got 10 bytes; expected at most 9"):
        read_json(path, max_bytes=9)


@pytest.mark.parametrize("name", ["absent.json", "."])
def test_what_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_json(tmp_path / name)


def test_a_user_error_is_one_line_with_all_its_parts() -> None:
    error = UserError(
        "unknown field", where="x.toml", got="lrr\n  = 1", expected=["lr"], cure="Fix it."
    )
    assert str(error) == "x.toml: unknown field; got lrr = 1; expected ['lr']. Fix it."
    assert isinstance(error, ValueError)
    assert str(UserError("odd")) == "odd"
    assert str(UserError("odd", got=0, cure="Do.")) == "odd; got 0. Do."


def test_a_user_error_stays_short() -> None:
    text = str(UserError("odd", got="x" * 301, expected="y" * 300))
    assert text == f"odd; got {'x' * 299}…; expected {'y' * 300}"
