"""The house rules that a machine can read: who imports whom, and whose the package names are."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mutransfer.errors import UserError
from mutransfer.house import check_siblings

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "mutransfer": set(),
    "proxies": {"mutransfer"},
    "sweeps": {"mutransfer", "proxies"},
    "full_scale": {"mutransfer", "proxies"},
}
NOBODY_IMPORTS = {"benchmarks", "examples", "notebooks", "tests", "tools"}
REACH_OTHERS_IN_FUNCTIONS = {"mutransfer/cli.py", "mutransfer/quickstart.py"}


def imported_roots(source: str) -> list[tuple[str, bool]]:
    """The top-level names that a module imports, each with whether a function does it."""
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, in_function: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name.partition(".")[0], in_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.append((node.module.partition(".")[0], in_function))
        elif isinstance(node, ast.Call) and node.args:
            called = getattr(node.func, "attr", getattr(node.func, "id", None))
            argument = getattr(node.args[0], "value", None)
            if called in {"import_module", "__import__"} and isinstance(argument, str):
                found.append((argument.partition(".")[0], in_function))
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(source), False)
    return found


def violations(path: str, source: str) -> list[str]:
    """The imports in the module at `path` (as `package/module.py`) that the table forbids."""
    package = path.partition("/")[0]
    forbidden = (set(MAY_IMPORT) - MAY_IMPORT[package] - {package}) | NOBODY_IMPORTS
    late = set(MAY_IMPORT) if path in REACH_OTHERS_IN_FUNCTIONS else set()
    return [
        f"{path} imports {root}"
        for root, in_function in imported_roots(source)
        if root in forbidden and not (in_function and root in late)
    ]


def test_nobody_imports_what_the_table_forbids() -> None:
    files = [file for package in MAY_IMPORT for file in sorted((ROOT / package).rglob("*.py"))]
    assert len(files) > len(MAY_IMPORT)
    assert [
        line
        for file in files
        for line in violations(file.relative_to(ROOT).as_posix(), file.read_text("utf-8"))
    ] == []


@pytest.mark.parametrize(
    ("path", "source", "allowed"),
    [
        ("mutransfer/roles.py", "import proxies.decoder", False),
        ("mutransfer/roles.py", "def f():\n    import proxies", False),
        ("mutransfer/roles.py", "import torch\nfrom mutransfer.rules import x", True),
        ("mutransfer/cli.py", "from sweeps import cli", False),
        ("mutransfer/cli.py", "def f():\n    from sweeps import cli", True),
        ("mutransfer/cli.py", "def f():\n    import tests.conftest", False),
        ("mutransfer/quickstart.py", "class A:\n    import full_scale", False),
        ("mutransfer/plots.py", "if TYPE_CHECKING:\n    from proxies.run import x", False),
        ("mutransfer/plots.py", "m = importlib.import_module('sweeps.study')", False),
        ("proxies/run.py", "from mutransfer.table import x", True),
        ("proxies/run.py", "from sweeps.study import x", False),
        ("sweeps/study.py", "import proxies, mutransfer", True),
        ("sweeps/study.py", "import full_scale", False),
        ("full_scale/trainer.py", "from . import phases\nimport proxies", True),
        ("full_scale/trainer.py", "def f():\n    from sweeps import study", False),
    ],
)
def test_the_reader_of_imports_tells_allowed_from_forbidden(
    path: str, source: str, allowed: bool
) -> None:
    assert (violations(path, source) == []) is allowed


def test_every_package_is_listed_in_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    folders = {
        file.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for package in MAY_IMPORT
        for file in (ROOT / package).rglob("__init__.py")
    }
    assert set(project["tool"]["setuptools"]["packages"]) == folders
    assert all((ROOT / package / "py.typed").is_file() for package in MAY_IMPORT)


def test_our_own_siblings_pass_without_being_imported() -> None:
    code = (
        "import sys; from mutransfer.house import check_siblings\n"
        "check_siblings(['proxies', 'sweeps', 'full_scale'])\n"
        "assert not {'proxies', 'sweeps', 'full_scale', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def own_elsewhere(folder: Path, distribution: str, package: str) -> None:
    """Installs a distribution that owns `package`, by hand, into `folder`."""
    info = folder / f"{distribution}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "top_level.txt").write_text(f"{package}\n")
    (info / "RECORD").write_text(f"{package}/__init__.py,,\n")


def test_another_distribution_that_owns_the_name_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_elsewhere(tmp_path, "wandb-sweeps", "sweeps")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"'sweeps'.*wandb-sweeps"):
        check_siblings(["sweeps"])
    check_siblings(["proxies"])


@pytest.mark.parametrize("place", ["sweeps/__init__.py", "sweeps.py"])
def test_a_package_of_that_name_elsewhere_is_refused_with_its_place(
    tmp_path: Path, place: str
) -> None:
    other = tmp_path / place
    other.parent.mkdir(exist_ok=True)
    other.write_text("raise RuntimeError('imported')\n")
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n"
        "from mutransfer.cli import main; sys.exit(main(['sweep', '--help']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "'sweeps'" in line
    assert str(tmp_path / "sweeps") in line


def test_a_missing_sibling_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mutransfer.house.find_spec", lambda name: None)
    with pytest.raises(UserError, match="'full_scale' is missing"):
        check_siblings(["full_scale"])
