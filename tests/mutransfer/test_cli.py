"""The command line: what it lists, what it imports, and how it ends."""

from __future__ import annotations

import errno
import subprocess
import sys
import types
from pathlib import Path

import pytest
import typer

import mutransfer
from mutransfer import cli
from mutransfer.cli import COMMANDS, Late, main
from mutransfer.errors import UserError

HEAVY = {"torch", "optuna", "pandas", "matplotlib", "numpy", "pydantic", "mup"}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module that a test fills with a function `run`, mounted as the command `try-it`."""
    module = types.ModuleType("tried_here")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    late = Late(module=module.__name__, attribute="run", help="For a test.")
    monkeypatch.setitem(COMMANDS, "try-it", late)
    return module


def fail_in_two_lines() -> None:
    raise UserError("no such\nfile", where="a.toml", got="x", expected="y", cure="Write it.")


def test_help_lists_every_command_and_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from mutransfer.cli import main; code = main(['--help'])\n"
        f"print(code, sorted({HEAVY} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    *text, last = done.stdout.splitlines()
    assert last == "0 []"
    rows = {line.split()[0]: line for line in text if line.startswith("  ") and line.split()}
    for name, late in COMMANDS.items():
        assert late.help in rows[name], "the line fits without being cut"


def test_python_dash_m_is_the_same_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mutransfer", "swep"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("Error: mutransfer: no such command")


def test_every_command_in_the_table_loads(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"Usage: mutransfer {name}")
        assert "Args:" not in out


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [("swep", "sweep"), ("coordcheck", "coord-check"), ("transfer", "transfer-check")],
)
def test_an_unknown_command_names_the_nearest(
    typed: str, nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([typed]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"got {typed}; expected {nearest}." in line


def test_a_command_like_no_other_lists_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zzzz"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(name in line for name in COMMANDS)


def test_no_command_shows_the_help_and_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "Commands:" in capsys.readouterr().err


def test_version_names_python_and_torch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"mutransfer {mutransfer.__version__} (Python 3.")
    assert ", torch 2." in out


def test_a_user_error_is_one_line_and_exit_2(
    command: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    command.run = fail_in_two_lines
    assert main(["try-it"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "Error: a.toml: no such file; got x; expected y. Write it.\n"


@pytest.mark.parametrize("words", [["--debug", "try-it"], ["try-it", "--debug"]])
def test_debug_shows_the_traceback_first(
    command: types.ModuleType, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command.run = fail_in_two_lines
    assert main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert any("fail_in_two_lines" in line for line in lines)
    assert lines[-1].startswith("Error: a.toml")


def test_debug_after_two_dashes_is_an_argument(command: types.ModuleType) -> None:
    seen = []
    command.run = lambda: None

    def run(name: str) -> None:
        seen.append(name)

    command.run = run
    assert main(["try-it", "--", "--debug"]) == 0
    assert seen == ["--debug"]


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1), (2, 2)])
def test_what_a_command_returns_is_the_exit_code(
    command: types.ModuleType, returned: int | None, code: int
) -> None:
    command.run = lambda: returned
    assert main(["try-it"]) == code


def test_typer_exit_carries_its_code(command: types.ModuleType) -> None:
    def run() -> None:
        raise typer.Exit(3)

    command.run = run
    assert main(["try-it"]) == 3


def test_an_interrupt_is_one_line_and_exit_130(
    command: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> None:
        raise KeyboardInterrupt

    command.run = run
    assert main(["try-it"]) == 130
    assert capsys.readouterr().err.strip() == "mutransfer: interrupted"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["try-it"], "Missing argument 'COUNT'"),
        (["try-it", "many"], "Invalid value for 'COUNT'"),
        (["try-it", "1", "--trails", "2"], "No such option: --trails (Possible options: --trials)"),
        (["try-it", "1", "2"], "unexpected extra argument"),
    ],
)
def test_a_wrong_option_or_argument_is_one_line_and_exit_2(
    command: types.ModuleType, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(count: int, trials: int = 1) -> None:
        raise AssertionError("never reached")

    command.run = run
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Error: mutransfer try-it: ")
    assert said.lower() in line.lower()
    assert line.endswith("See 'mutransfer try-it --help'.")


def test_an_absent_library_names_the_cure(
    command: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> None:
        import a_library_that_is_not_there  # noqa: F401

    command.run = run
    assert main(["try-it"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "'a_library_that_is_not_there' is not installed" in line
    assert "make setup" in line


def test_init_where_no_file_can_be_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "/dev/null/x.toml"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("Error: /dev/null: ")
    assert "Check that it can be read and written" in line


def test_a_folder_that_cannot_be_made_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for extra in ([], ["--debug"]):
        assert main(["sweep", "quickstart", "--out", str(tmp_path / "file" / "run"), *extra]) == 2
        *before, line = capsys.readouterr().err.splitlines()
        assert line.startswith(f"Error: {tmp_path}/file")
        assert "Not a directory" in line
        assert [text for text in before if text.startswith("Traceback")][:1] == (
            ["Traceback (most recent call last):"] if extra else []
        )


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device. Check"),
        (PermissionError(errno.EACCES, "Permission denied", "a.csv"), "a.csv: Permission denied. "),
        (OSError("in a library's words"), "in a library's words. Check"),
        (TimeoutError(), "TimeoutError. Check"),
    ],
)
def test_what_the_system_refuses_is_one_line_and_exit_2(
    error: OSError, said: str, command: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> None:
        raise error

    command.run = run
    assert main(["try-it"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"Error: {said}")


def test_a_bug_is_no_user_error(command: types.ModuleType) -> None:
    def run() -> None:
        raise ZeroDivisionError

    command.run = run
    with pytest.raises(ZeroDivisionError):
        main(["try-it"])


def test_help_of_a_command_stops_before_the_docstrings_sections(
    command: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(count: int = 1) -> None:
        """Counts [so far].

        Args:
            count: How many.
        """

    command.run = run
    assert main(["try-it", "--help"]) == 0
    out = capsys.readouterr().out
    assert "Counts [so far]." in out
    assert "How many" not in out


def test_the_public_names_are_lazy_and_there() -> None:
    code = (
        "import sys, mutransfer\n"
        f"assert not ({HEAVY!r} & set(sys.modules)), 'light'\n"
        "import mutransfer.coord_check\n"
        "for name in mutransfer.__all__:\n"
        "    value = getattr(mutransfer, name)\n"
        "    assert value == getattr(mutransfer, name)\n"
        "    assert callable(value) or name == '__version__', name\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="parametrise"):
        _ = mutransfer.parametrise


def test_the_tables_commands_are_the_ones_that_are_registered() -> None:
    group = typer.main.get_command(cli.app)
    assert list(group.commands) == list(COMMANDS)
