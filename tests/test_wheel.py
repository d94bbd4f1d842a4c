"""The wheel, installed where nothing else is: four packages from it, their data, no more."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("full_scale", "mutransfer", "proxies", "sweeps")
SHIPPED = {".py", ".toml", ".typed"}

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of what belongs to it: no stale build folder has a say."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation")
    run(*pip, "--wheel-dir", str(folder), str(source), cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_it_holds_the_source_and_the_data_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        info = {name.partition("/")[2] for name in archive.namelist() if ".dist-info/" in name}
    expected = {
        file.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.suffix in SHIPPED or file.name == "py.typed"
    }
    assert names == expected
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert any(name.startswith("sweeps/experiments/") for name in names)
    assert any(name.startswith("full_scale/recipes/") for name in names)
    assert "licenses/LICENSE" in info
    assert {name for name in info if name.endswith(".txt")} == {"entry_points.txt", "top_level.txt"}


def test_each_package_comes_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    python = venv / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps")
    run(*pip, str(wheel), cwd=tmp_path)
    code = """
import importlib, importlib.metadata as metadata, json, sys
from mutransfer.house import check_siblings
check_siblings(["proxies", "sweeps", "full_scale"])
names = ["full_scale", "mutransfer", "proxies", "sweeps"]
print(json.dumps({
    "places": [importlib.import_module(name).__file__ for name in names],
    "owners": [metadata.packages_distributions()[name] for name in names],
    "version": [importlib.import_module("mutransfer").__version__, metadata.version("mutransfer")],
    "scripts": [e.value for e in metadata.entry_points(group="console_scripts", name="mutransfer")],
}))
"""
    found = json.loads(run(python, "-c", code, cwd=tmp_path))
    (site,) = venv.glob("lib/python*/site-packages")
    assert found["places"] == [str(site / package / "__init__.py") for package in PACKAGES]
    assert found["owners"] == [["mutransfer"]] * len(PACKAGES)
    assert found["version"][0] == found["version"][1]
    assert found["scripts"] == ["mutransfer.cli:main"]
    assert (venv / "bin" / "mutransfer").is_file()
