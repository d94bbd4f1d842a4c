"""Base-shape files: written by mup itself, which is also the oracle for the ratios."""

from __future__ import annotations

from pathlib import Path

import mup
import pytest
from torch import nn

from mutransfer.apply import parametrize
from mutransfer.base_shapes import base_from_shapes, read_base_shapes
from mutransfer.errors import UserError
from mutransfer.roles import Role
from mutransfer.rules import BaseParams


class Net(nn.Module):
    """Two hidden layers of another width each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(10, width)
        self.wide = nn.Linear(width, 3 * width, bias=False)
        self.back = nn.Linear(3 * width, width, bias=False)
        self.readout = mup.MuReadout(width, 5, bias=False)


def role(name: str, shape: tuple[int, ...]) -> Role:
    known: dict[str, Role] = {"embed.weight": "embedding", "embed.bias": "bias",
                              "readout.weight": "head"}  # fmt: skip
    return known.get(name, "hidden")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "base.bsh"
    mup.make_base_shapes(Net(8), Net(16), str(path))
    return path


def test_ratios_are_mup_s_own(file: Path) -> None:
    model, theirs = Net(64), mup.set_base_shapes(Net(64), str(file))
    table = parametrize(model, base_from_shapes(file, model), BaseParams(), "mup", role=role)
    for name, parameter in theirs.named_parameters():
        row = table.row(name)
        assert row.width_ratio == parameter.infshape.width_mult() == 8.0, name
        assert row.shape == tuple(parameter.shape)
    optimizer = mup.MuAdamW(theirs.parameters(), lr=BaseParams().lr)
    groups = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in theirs.named_parameters():
        assert table.row(name).optimizers.adamw.lr == pytest.approx(groups[id(parameter)]), name


def test_the_table_is_that_of_the_base_model_itself(file: Path) -> None:
    model = Net(48)
    ours = parametrize(model, Net(8), BaseParams(), role=role)
    assert parametrize(model, base_from_shapes(file, model), BaseParams(), role=role) == ours


def test_finite_dimensions_are_none(file: Path) -> None:
    found = read_base_shapes(file)
    assert found["embed.weight"] == (8, None)
    assert found["wide.weight"] == (24, 8)
    assert found["readout.weight"] == (None, 8)


def test_a_file_of_a_wrapped_model_fits_the_model_inside(file: Path) -> None:
    text = file.read_text()
    lines = [line if line[0] in "# -" else f"module.{line}" for line in text.splitlines()]
    file.write_text("\n".join(lines))
    assert all(name.startswith("module.") for name in read_base_shapes(file))
    names = [name for name, _ in base_from_shapes(file, Net(32)).named_parameters()]
    assert sorted(names) == sorted(name for name, _ in Net(32).named_parameters())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("!!python/object/apply:os.system ['touch hacked']", "not a readable file of base shapes"),
        ("- 1", "not a file of base shapes; got list"),
        ("embed.weight: [8, -1]", r"embed\.weight: not base dimensions"),
        ("embed.weight: [8, 1.5]", r"embed\.weight: not base dimensions"),
        ("a: [1", "not a readable file"),
        ("other.weight: [8, 8]", "of another model"),
    ],
)
def test_other_files_are_refused(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.bsh").write_text(text)
    with pytest.raises(UserError, match=message):
        base_from_shapes(tmp_path / "base.bsh", Net(8))
    assert not (tmp_path / "hacked").exists()


def test_another_number_of_dimensions_is_refused(file: Path) -> None:
    text = file.read_text()
    file.write_text(text.replace("embed.bias:\n- 8", "embed.bias:\n- 8\n- 8"))
    with pytest.raises(UserError, match=r"embed\.bias: .*another model; got \(8, 8\)"):
        base_from_shapes(file, Net(16))
