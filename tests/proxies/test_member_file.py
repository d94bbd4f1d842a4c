"""A member's file: all of it or nothing, and never code."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from proxies.member_file import load_member, save_member
from proxies.population import MemberState
from proxies.presets import get_preset
from proxies.run import RunSpec

MODEL = get_preset("tiny-32")
SPEC = RunSpec(model=MODEL, base=MODEL, base_width=32, data="0" * 64)
STATE = MemberState(
    spec=SPEC,
    evaluations=((5, 3.25), (9, 1 / 3)),
    seconds=12.5,
    tensors={"a.weight": torch.randn(3, 4).T, "a.weight/step": torch.tensor(9.0)},
)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "m.safetensors"
    save_member(path, STATE)
    loaded = load_member(path, SPEC)
    assert loaded is not None
    assert (loaded.spec, loaded.evaluations, loaded.seconds) == (SPEC, STATE.evaluations, 12.5)
    assert loaded.tensors.keys() == STATE.tensors.keys()
    assert all(torch.equal(loaded.tensors[name], t) for name, t in STATE.tensors.items())
    assert [entry.name for entry in path.parent.iterdir()] == ["m.safetensors"]


def test_another_run_s_file_is_none(tmp_path: Path) -> None:
    save_member(tmp_path / "m", STATE)
    assert load_member(tmp_path / "m", SPEC.model_copy(update={"seed": 1})) is None


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_torn_file_is_none(tmp_path: Path, share: float) -> None:
    save_member(tmp_path / "m", STATE)
    content = (tmp_path / "m").read_bytes()
    (tmp_path / "m").write_bytes(content[: int(share * len(content))])
    assert load_member(tmp_path / "m", SPEC) is None


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return (pytest.fail, ("it was unpickled",))


def test_what_is_no_member_is_none(tmp_path: Path) -> None:
    assert load_member(tmp_path / "absent", SPEC) is None
    (tmp_path / "m").write_bytes(pickle.dumps(Bomb()))
    assert load_member(tmp_path / "m", SPEC) is None
    torch.save({"a": torch.ones(1)}, tmp_path / "m")
    assert load_member(tmp_path / "m", SPEC) is None
