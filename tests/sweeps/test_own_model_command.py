"""`mutransfer coord-check --model`: files, verdicts and every way to get it wrong in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd
import pytest

from mutransfer.cli import main
from mutransfer.errors import UserError
from sweeps.own_model import load_factory, parse_widths

MODULE = """
import torch
from torch import nn
from mutransfer import param_groups, parametrize
from mutransfer.apply import initialize
from mutransfer.coord_check import Trainable
from mutransfer.rules import BaseParams

ROLES = {"0.weight": "embedding", "1.weight": "hidden", "2.weight": "head"}
number = 3


class Net(nn.Sequential):
    def __init__(self, width):
        sizes = ((8, width), (width, width), (width, 4))
        super().__init__(*(nn.Linear(*size, bias=False) for size in sizes))

    def set_multipliers(self, multipliers):
        self.output = multipliers.output

    def forward(self, x):
        return self[2](self[1](self[0](x).relu()).relu() * self.output)


def good(width, seed, wrong=1.0):
    model = Net(width)
    table = parametrize(model, Net(16), BaseParams(init_std=0.3), role=lambda name, _: ROLES[name])
    initialize(model, table, seed=seed)
    model.output *= wrong
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(seed))
    return Trainable(
        model=model, optimizer=torch.optim.AdamW(param_groups(model, table, "adamw")), table=table,
        loss=lambda: nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)),
    )


def wrong(width, seed):
    return good(width, seed, wrong=width / 16)


def raises(width, seed):
    return good(width, {}["seed"])


def returns_a_model(width, seed):
    return Net(width)


def loss_raises(width, seed):
    t = good(width, seed)
    return Trainable(model=t.model, optimizer=t.optimizer, table=t.table, loss=lambda: 1 / 0)


def loss_is_a_float(width, seed):
    t = good(width, seed)
    return Trainable(model=t.model, optimizer=t.optimizer, table=t.table, loss=lambda: 1.0)


def refuses(width, seed):
    from mutransfer import UserError
    raise UserError("no such width", got=width)
"""

RAISES = 1 + MODULE[: MODULE.index('{}["seed"]')].count("\n")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with modules that are not on the path otherwise."""
    package = tmp_path / "nets"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "small.py").write_text(MODULE)
    (package / "broken.py").write_text("import a_library_that_is_not_there\n")
    (package / "ends.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    for name in [name for name in sys.modules if name.partition(".")[0] == "nets"]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def test_a_right_model_passes_and_leaves_three_files(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["coord-check", "--model", "nets.small:good", "--widths", "16,32,64"]
    assert main([*command, "--seeds", "2", "--steps", "4", "--out", "found"]) == 0
    told = capsys.readouterr().out
    assert "under adamw: PASS\n  widths 16, 32, 64; 2 seeds; 4 steps" in told
    assert told.endswith("coordinate check: PASS   -> found/coord_check.png\n")
    assert {file.name for file in (here / "found").iterdir()} == {
        "coord_check.csv", "coord_check.json", "coord_check.png"
    }  # fmt: skip
    record = json.loads((here / "found/coord_check.json").read_text())
    assert (record["verdict"], record["model"]) == ("PASS", "nets.small:good")
    assert record["schema_version"] >= 1
    frame = pd.read_csv(here / "found/coord_check.csv")
    assert set(frame.width) == {16, 32, 64}
    assert (here / "found/coord_check.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_model_fails_with_exit_code_1_in_a_folder_of_its_name(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["coord-check", "--model", "nets.small:wrong", "--widths", "64,16,32"]) == 1
    told = capsys.readouterr().out
    assert "logits at init scale as width^+0." in told
    assert "the output multiplier is not divided by the width" in told
    folder = here / "runs" / "nets.small.wrong" / "coord-check"
    assert json.loads((folder / "coord_check.json").read_text())["verdict"] == "FAIL"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--model nets.larger:good", "--model: no such module; got nets.larger. It is looked for"),
        ("--model lost.small:good", "--model: no such module; got lost.small. It is looked for"),
        ("--model nets.small:god", "--model nets.small: no such attribute; got god"),
        ("--model nets.small", "--model: no name of a factory; got nets.small; expected package"),
        ("--model nets.small:", "--model: no name of a factory"),
        ("--model nets/small.py:good", "--model: no name of a factory"),
        ("--model nets.small:number", "--model nets.small:number: cannot be called; got int;"),
        (
            "--model nets.small:raises",
            "--model: nets.small:raises(16, 0) failed; got KeyError: 'seed' (small.py, line "
            f"{RAISES}). --debug shows the traceback.",
        ),
        (
            "--model nets.small:returns_a_model",
            "--model nets.small:returns_a_model: returned no Trainable; got Net; expected",
        ),
        (
            "--model nets.small:loss_raises",
            "--model: loss() of nets.small:loss_raises(16, 0) failed; got ZeroDivisionError: ",
        ),
        (
            "--model nets.small:loss_is_a_float",
            "--model nets.small:loss_is_a_float: loss() returned no scalar; got float; expected",
        ),
        ("--model nets.small:refuses", "no such width; got 16"),
        (
            "--model nets.broken:good",
            "--model: importing nets.broken failed; got ModuleNotFoundError: No module named "
            "'a_library_that_is_not_there' (broken.py, line 1). --debug shows the traceback.",
        ),
        ("--model nets.ends:good", "--model: importing nets.ends failed; got SystemExit: 3"),
        ("--model nets.small:good --widths 16,x", "--widths: no list of widths; got 16,x;"),
        ("--model nets.small:good --widths 16,32", "widths: too few widths"),
        ("--model nets.small:good tiny", "EXP: excluded by --model"),
        ("--model nets.small:good --late 4", "--late: excluded by --model"),
        ("--model nets.small:good --precision bf16", "--precision: excluded by --model"),
        ("tiny", "--widths: only with --model"),
    ],
)
def test_every_slip_is_one_clear_line(
    arguments: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    widths = [] if "--widths" in arguments else ["--widths", "16,32,64"]
    assert main(["coord-check", *arguments.split(), *widths]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"Error: {line}")
    assert told.count("\n") == 1


def test_neither_model_nor_experiment_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["coord-check"]) == 2
    assert "nothing to check; expected an experiment file, or --model" in capsys.readouterr().err
    assert main(["coord-check", "tiny", "--seeds", "2"]) == 2
    assert "--seeds: only with --model" in capsys.readouterr().err


def test_the_cause_is_kept_for_debug(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["coord-check", "--model", "nets.small:raises", "--widths", "16,32,64"]
    assert main([*command, "--debug"]) == 2
    assert 'return good(width, {}["seed"])' in capsys.readouterr().err


def test_widths_may_have_spaces_and_no_other_signs() -> None:
    assert parse_widths("64, 128,256") == [64, 128, 256]
    for bad in (None, "", "64,,128", "-64,128", "6.4", "²"):
        with pytest.raises(UserError, match="no list of widths"):
            parse_widths(bad)


def test_the_current_folder_comes_before_installed_modules(here: Path) -> None:
    (here / "nets" / "which.py").write_text("def factory(width, seed): return __file__\n")
    load_factory("nets.which:factory")
    assert sys.path[0] == str(here)
    load_factory("nets.which:factory")
    assert sys.path.count(str(here)) == 1
