"""Right slopes over depth, and that models are compared at equal relative depths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mutransfer.apply import initialize, parametrize
from mutransfer.coord_depth import depth_expectation
from mutransfer.coord_expect import Expectation, Ladder, Thresholds
from mutransfer.coord_measure import Recorder
from mutransfer.coord_text import SUBJECTS
from mutransfer.roles import Role
from mutransfer.rules import BaseParams

ROLES: dict[str, Role] = {
    "embedding.weight": "embedding",
    "layers.*.q.weight": "hidden",
    "layers.*.o.weight": "hidden_out",
    "layers.*.norm.weight": "gain",
}
LIMITS = Thresholds()


def ladder(optimizer: str = "adamw") -> Ladder:
    same = dict.fromkeys(ROLES, 0.0)
    return Ladder(optimizer=optimizer, roles=ROLES, fan_in=same, fan_out=same, tokens=True,
                  axis="depth")  # fmt: skip


def right(kind: str, name: str, optimizer: str = "adamw") -> Expectation:
    found = depth_expectation(kind, name, ladder(optimizer), LIMITS)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("kind", "name", "slope", "two_sided"),
    [
        *(("weight", name, 0, True) for name in ROLES),
        *(("update", name, 0, True) for name in ROLES),
        *(("later_update", name, 0, True) for name in ROLES),
        ("update_norm", "layers.*.q.weight", 0, True),
        ("activation", "layers.*.q", 0, True),
        ("activation", "layers.*.o", 0, True),
        ("attention_logits", "layers.*.attend", 0, True),
        ("logits", "self-token logits", 0, True),
        ("logits", "other-token logits", 0, True),
        ("branch", "layers.*", -0.5, False),
        ("residual", "layers.*", 0, False),
        ("delta_branch", "layers.*", -1, True),
        ("delta_residual", "layers.*", 0, True),
        ("delta_activation", "layers.*.q", 0, True),
        ("delta_attention_logits", "layers.*.attend", 0, True),
        ("delta_logits", "logits", 0, True),
    ],
)
def test_slopes(kind: str, name: str, slope: float, two_sided: bool) -> None:
    """CompleteP, alpha = 1: init and learning rates do not know the depth, branches are 1/L."""
    found = right(kind, name)
    assert (found.slope, found.below is not None) == (slope, two_sided)
    assert kind in SUBJECTS
    assert found.cause_above
    assert bool(found.cause_below) == two_sided
    assert "width" not in found.cause_above + found.cause_below


def test_muon_s_steps_are_judged_by_their_norm() -> None:
    name = "layers.*.q.weight"
    norm = right("update_norm", name, "muon")
    assert (norm.slope, norm.above, norm.below) == (0, LIMITS.muon_norm, LIMITS.muon_norm)
    update = right("update", name, "muon")
    assert (update.above, update.below) == (LIMITS.muon_update_above, None)
    assert depth_expectation("later_update", name, ladder("muon"), LIMITS) is None
    assert right("update", "embedding.weight", "muon").below == LIMITS.update


@pytest.mark.parametrize(
    ("kind", "name"),
    [("loss", "loss"), ("logits", "logits"), ("update_ratio", "layers.*.q.weight"), ("x", "y")],
)
def test_what_has_no_right_slope(kind: str, name: str) -> None:
    assert depth_expectation(kind, name, ladder(), LIMITS) is None


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.up(x)
        return out


class Stack(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.layers = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.embedding(tokens)
        for block in self.layers:
            x = block(x)
        return x


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 8])
@torch.no_grad()
def test_the_middle_block_and_the_end_of_the_stream_are_watched(depth: int) -> None:
    model, tokens = Stack(depth), torch.arange(6)[None]
    table = parametrize(
        model, Stack(depth), BaseParams(), "mup",
        role=lambda name, shape: "embedding" if name == "embedding.weight" else "hidden",
    )  # fmt: skip
    model.set_multipliers = lambda multipliers: None  # type: ignore[assignment, method-assign]
    initialize(model, table, seed=0)
    with Recorder(model, table, depth=True).watch() as values:
        model(tokens)
    states = [model.embedding(tokens)]
    for block in model.layers:
        states.append(block(states[-1]))

    def rms(x: Tensor) -> float:
        return float(x.square().mean().sqrt())

    middle = depth // 2
    up = model.layers[middle].up(states[middle])  # type: ignore[operator, union-attr]
    assert values["activation", "layers.*.up"] == pytest.approx(rms(up), rel=1e-5)
    assert values["branch", "layers.*"] == pytest.approx(rms(up), rel=1e-4)
    assert values["residual", "layers.*"] == pytest.approx(rms(states[-1]), rel=1e-5)
    assert values["activation", "embedding"] == pytest.approx(rms(states[0]), rel=1e-5)
