"""Checkpoints: whole or absent, known by their sums, never of another run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from full_scale import checkpoint
from full_scale.checkpoint import Checkpoint, Identity, State
from mutransfer.errors import UserError

IDENTITY = Identity(bundle="b" * 64, recipe="r" * 64, data="d" * 64)


def make(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    return Checkpoint(
        model={"w": torch.randn(3, 4, generator=generator).T, "g": torch.ones(3)},
        optimizer={"w/exp_avg": torch.zeros(4, 3), "w/step": torch.tensor(float(step))},
        state=State(identity=IDENTITY, step=step, tokens=10 * step, optimizer="adamw"),
    )


def test_round_trip(tmp_path: Path) -> None:
    saved = make(12)
    path = checkpoint.save(tmp_path, saved)
    assert path.name == "step-00000012"
    assert checkpoint.verify(path) is None
    loaded = checkpoint.load(path, IDENTITY)
    assert loaded.state == saved.state
    for ours, theirs in ((loaded.model, saved.model), (loaded.optimizer, saved.optimizer)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert sorted(f.name for f in tmp_path.iterdir()) == [path.name]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", "flip"),
        ("optimizer.safetensors", "cut"),
        ("state.json", "remove"),
        ("manifest.json", "remove"),
        ("manifest.json", "cut"),
    ],
)
def test_a_broken_checkpoint_is_passed_over(tmp_path: Path, name: str, damage: str) -> None:
    good, bad = checkpoint.save(tmp_path, make(1)), checkpoint.save(tmp_path, make(2))
    assert checkpoint.newest(tmp_path, pytest.fail) == bad
    content = (bad / name).read_bytes()
    if damage == "remove":
        (bad / name).unlink()
    elif damage == "cut":
        (bad / name).write_bytes(content[:-5])
    else:
        (bad / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    said: list[str] = []
    assert checkpoint.newest(tmp_path, said.append) == good
    assert len(said) == 1
    assert bad.name in said[0]


def test_an_unfinished_save_does_not_count_and_goes_away(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path, pytest.fail) is None
    unfinished = tmp_path / ".step-00000003.tmp"
    unfinished.mkdir()
    (unfinished / "model.safetensors").write_bytes(b"half")
    assert checkpoint.newest(tmp_path, pytest.fail) is None
    checkpoint.save(tmp_path, make(4))
    assert not unfinished.exists()


def test_saving_over_a_broken_one_replaces_it(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, make(2))
    (path / "state.json").write_text("{}", encoding="utf-8")
    checkpoint.save(tmp_path, make(2))
    assert checkpoint.verify(path) is None


def test_none_whole_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    (checkpoint.save(tmp_path, make(1)) / "manifest.json").unlink()
    with pytest.raises(UserError, match="no checkpoint is whole"):
        checkpoint.newest(tmp_path, lambda line: None)


def test_prune_keeps_the_last_whole_one(tmp_path: Path) -> None:
    paths = [checkpoint.save(tmp_path, make(step)) for step in (1, 2, 3, 4)]
    checkpoint.prune(tmp_path, 3)
    assert checkpoint.found(tmp_path) == paths[1:]
    for path in paths[2:]:
        (path / "model.safetensors").write_bytes(b"")
    checkpoint.prune(tmp_path, 2)
    assert checkpoint.found(tmp_path) == paths[1:]  # step 2 is the only whole one
    checkpoint.save(tmp_path, make(5))
    checkpoint.prune(tmp_path, 1)
    assert [path.name for path in checkpoint.found(tmp_path)] == ["step-00000005"]


def test_order_is_by_number(tmp_path: Path) -> None:
    for step in (100_000_000, 99_999_999):
        checkpoint.save(tmp_path, make(step))
    assert [path.name for path in checkpoint.found(tmp_path)] == ["step-99999999", "step-100000000"]


@pytest.mark.parametrize("field", ["bundle", "recipe", "data"])
def test_another_run_is_refused(tmp_path: Path, field: str) -> None:
    path = checkpoint.save(tmp_path, make(1))
    other = IDENTITY.model_copy(update={field: "0" * 64})
    with pytest.raises(UserError, match=f"belongs to another {field};") as error:
        checkpoint.load(path, other)
    assert f"expected {field} 000000000000" in str(error.value)


def test_the_state_is_read_strictly(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, make(1))
    text = (path / "state.json").read_text(encoding="utf-8")
    (path / "state.json").write_text(text.replace('"step": 1', '"step": -1'), encoding="utf-8")
    with pytest.raises(UserError, match="greater than or equal to 0"):
        checkpoint.load(path, IDENTITY)
    (path / "state.json").write_text(text.replace("tokens", "toks"), encoding="utf-8")
    with pytest.raises(UserError, match="unknown field 'toks'"):
        checkpoint.load(path, IDENTITY)
