"""The set-up script's decisions: which torch, which environment, when there is nothing to do."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
CPU = {"metadata": {"version": "2.13.0+cpu"}, "download_info": {"url": "https://a/torch.whl"}}
CUDA = {
    "metadata": {
        "version": "2.13.0",
        "requires_dist": ["sympy", "nvidia-cublas==13.1; platform_system == 'Linux'"],
    },
    "download_info": {"url": "https://b/torch.whl"},
}
SPEC = "torch>=2.9,<2.14"


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_tool", ROOT / "tools" / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def choose(
    tool: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    *,
    on_index: dict[str, Any] | None,
    plain: dict[str, Any] | None,
    nvidia: bool = False,
    torch: str | None = None,
) -> list[tuple[str, ...]]:
    """The pip calls that choosing torch makes, where the indexes have these builds."""
    setup = tool.Setup(folder / "venv", [], torch)
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(tool.sys, "platform", "linux")
    monkeypatch.setattr(tool, "has_nvidia", lambda: nvidia)
    monkeypatch.setattr(
        setup, "resolve", lambda spec, *options: on_index if "--index-url" in options else plain
    )
    monkeypatch.setattr(setup, "pip", lambda *arguments: calls.append(arguments))
    setup.install_torch(SPEC)
    return calls


def test_without_a_device_the_cpu_build_comes_from_its_index(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = choose(tool, monkeypatch, tmp_path, on_index=CPU, plain=CUDA)
    assert calls == [
        ("install", "--no-deps", "--index-url", tool.CPU_INDEX, "torch==2.13.0+cpu"),
    ]


def test_where_the_index_is_silent_a_cpu_build_that_pip_knows_will_do(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = choose(tool, monkeypatch, tmp_path, on_index=None, plain=CPU)
    assert calls == [("install", "--no-deps", "torch==2.13.0+cpu")]


@pytest.mark.parametrize("on_index", [None, CUDA])
def test_cuda_is_never_fetched_unasked(
    tool: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    on_index: dict[str, Any] | None,
) -> None:
    with pytest.raises(tool.SetupError, match="TORCH=pip") as caught:
        choose(tool, monkeypatch, tmp_path, on_index=on_index, plain=CUDA)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("nvidia", "torch"), [(True, None), (False, "pip")])
def test_with_a_device_or_when_asked_pip_chooses(
    tool: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    nvidia: bool,
    torch: str | None,
) -> None:
    options: dict[str, Any] = {"nvidia": nvidia, "torch": torch}
    assert choose(tool, monkeypatch, tmp_path, on_index=CPU, plain=CUDA, **options) == []


def test_a_named_index_is_used_whatever_it_has(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = choose(tool, monkeypatch, tmp_path, on_index=CUDA, plain=CPU, torch="https://c/")
    assert calls == [("install", "--no-deps", "--index-url", "https://c/", "torch==2.13.0")]
    with pytest.raises(tool.SetupError, match="https://c/"):
        choose(tool, monkeypatch, tmp_path, on_index=None, plain=CPU, torch="https://c/")


@pytest.mark.parametrize(
    ("needs", "cuda"),
    [
        (["nvidia-cudnn-cu13==9.20; platform_system == 'Linux'"], True),
        (["cuda-toolkit[cublas]==13.0; platform_machine == 'x86_64'"], True),
        (["cuda-toolkit==13.0; platform_machine == 'aarch64'"], False),
        (["nvidia-x; extra == 'gpu'", "sympy>=1.13", "triton==3.7"], False),
        ([], False),
    ],
)
def test_a_wheels_needs_tell_whether_it_is_a_cuda_build(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, needs: list[str], cuda: bool
) -> None:
    monkeypatch.setattr(tool.platform, "machine", lambda: "x86_64")
    assert tool.needs_cuda({"requires_dist": needs}) is cuda


def test_an_unknown_extra_is_an_error_that_lists_them(tool: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(tool.SetupError, match=r"'devel'; there are .*dev"):
        tool.Setup(tmp_path, ["devel"], None)


def test_what_is_current_stays_and_earlier_choices_are_kept(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = tool.Setup(tmp_path, ["dev", "hf"], "pip")
    (tmp_path / "mutransfer-setup.json").write_text(json.dumps(first.wanted))
    second = tool.Setup(tmp_path, ["dev"], None)
    assert second.wanted["extras"] == ["dev", "hf"]
    assert second.wanted["torch"] == "pip"
    monkeypatch.setattr(second, "pip", lambda *a: pytest.fail("nothing to install"))
    second.run()
    assert tool.Setup(tmp_path, ["notebooks"], None).wanted != first.wanted


def test_a_folder_that_is_no_environment_is_left_alone(tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(tool.SetupError, match="no virtual environment"):
        tool.Setup(tmp_path, [], None).run()
    assert (tmp_path / "thesis.tex").read_text() == "x"


def test_the_script_says_its_error_in_one_line(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["setup.py", "--extra", "nope"])
    assert tool.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("set-up: no extra 'nope'")
