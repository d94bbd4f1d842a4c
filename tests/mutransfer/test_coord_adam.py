"""Epsilon against the second moments, alignment of updates, the farthest entry: by hand."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from mutransfer.apply import parametrize
from mutransfer.coord_adam import Alignment, eps_shares
from mutransfer.coord_expect import Ladder, Thresholds
from mutransfer.coord_measure import later_updates
from mutransfer.coord_verdict import DAMPED, Quantity, damping, judge
from mutransfer.rules import BaseParams
from mutransfer.table import Row


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net()


def make_rows(model: Net) -> dict[str, Row]:
    table = parametrize(
        model, Net(), BaseParams(), "mup",
        role=lambda name, shape: "embedding" if name == "embedding.weight" else "hidden",
    )  # fmt: skip
    return table.resolve(model)


@pytest.mark.parametrize("steps", [1, 3])
def test_eps_over_the_median_root_of_the_second_moment(model: Net, steps: int) -> None:
    """After equal gradients g the corrected moment is g squared, whatever the number of steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, eps=1e-3, betas=(0.9, 0.95))
    gradient = torch.arange(18.0).reshape(3, 6)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, -0.5)
        model.embedding.weight.grad = gradient.clone()
        optimizer.step()
    found = eps_shares(optimizer, model, make_rows(model))
    assert found["eps_share", "embedding.weight"] == pytest.approx(1e-3 / 9, rel=1e-4)
    layers = [value for (_, name), value in found.items() if name.startswith("layers")]
    assert layers == pytest.approx([2e-3] * len(layers), rel=1e-4)
    assert layers


@pytest.mark.parametrize("alive", [1, 2, 7, 18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_median_is_torch_s_of_the_entries_that_have_a_gradient(
    model: Net, alive: int, dtype: torch.dtype
) -> None:
    """Where some entries never had one, and where some are no number."""
    weight = model.embedding.weight
    draw = torch.rand(18, generator=torch.Generator().manual_seed(alive)).to(dtype)
    second = torch.zeros(18, dtype=dtype)
    second[torch.randperm(18, generator=torch.Generator().manual_seed(1))[:alive]] = draw[:alive]
    if alive < 18:
        second[second == 0] = torch.tensor([math.nan, *[0.0] * (17 - alive)], dtype=dtype)
    optimizer = torch.optim.AdamW([weight], eps=1e-3, betas=(0.9, 0.5))
    optimizer.state[weight] = {"exp_avg_sq": second.view(3, 6), "step": torch.tensor(1.0)}
    found = eps_shares(optimizer, model, make_rows(model))
    median = float(second[second > 0].median()) / 0.5
    assert found["eps_share", "embedding.weight"] == pytest.approx(1e-3 / math.sqrt(median))


def test_no_gradient_so_far_is_infinite_and_no_state_is_left_out(model: Net) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    assert eps_shares(optimizer, model, make_rows(model)) == {}
    model.embedding.weight.grad = torch.zeros_like(model.embedding.weight)
    optimizer.step()
    found = eps_shares(optimizer, model, make_rows(model))
    assert found == {("eps_share", "embedding.weight"): math.inf}


def test_optimizers_inside_another_are_found_and_muon_has_no_eps(model: Net) -> None:
    class Both:
        def __init__(self) -> None:
            self.aux = torch.optim.AdamW([model.embedding.weight])
            self.matrix = torch.optim.Muon(list(model.layers.parameters()))

    both: Any = Both()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    both.aux.step()
    both.matrix.step()
    names = {name for _, name in eps_shares(both, model, make_rows(model))}
    assert names == {"embedding.weight"}
    assert eps_shares(object(), model, make_rows(model)) == {}


@torch.no_grad()
def test_alignment_is_one_along_one_direction_and_small_across(model: Net) -> None:
    rows, tokens = make_rows(model), torch.tensor([[0, 1]])
    first = {fqn: p.clone() for fqn, p in model.named_parameters()}
    watcher = Alignment(model, first, rows)
    with watcher.watch() as values:
        model(tokens)
    assert values == {}  # nothing has moved
    model.embedding.weight.fill_(1.0)
    model.layers[0].weight += torch.outer(torch.arange(6.0), torch.ones(6))
    with watcher.watch() as values:
        model(tokens)
    (aligned,) = values.values()
    assert aligned == pytest.approx(1, rel=1e-5)
    model.layers[0].weight.copy_(first["layers.0.weight"] + torch.eye(6))
    with watcher.watch() as values:
        model(tokens)
    (spread,) = values.values()
    assert spread == pytest.approx(6**-0.5, rel=1e-5)
    assert not any(module._forward_hooks for module in model.modules())


@torch.no_grad()
def test_later_updates_are_the_farthest_entry(model: Net) -> None:
    second = {fqn: p.clone() for fqn, p in model.named_parameters()}
    model.embedding.weight[1, 2] -= 0.75
    model.embedding.weight[0, 0] += 0.5
    found = later_updates(model, second, make_rows(model))
    assert found["later_update", "embedding.weight"] == pytest.approx(0.75)
    assert {value for (_, name), value in found.items() if name.startswith("layers")} == {0.0}


def shares(values: dict[int, float], spread: float = 1.0) -> pd.DataFrame:
    rows = [
        ("eps_share", "embedding.weight", t, width, seed, share * spread**seed)
        for width, share in values.items()
        for seed in range(2)
        for t in (1, 2, 4)
    ]
    return pd.DataFrame(rows, columns=["kind", "name", "t", "width", "seed", "value"])


def verdict(frame: pd.DataFrame) -> Quantity:
    name = "embedding.weight"
    ladder = Ladder(optimizer="adamw", roles={name: "embedding"}, fan_in={name: 1.0},
                    fan_out={name: 0.0})  # fmt: skip
    (quantity,), _ = judge(frame, ladder, Thresholds())
    return quantity


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({32: 1e-4, 64: 1e-4, 128: 1e-4}, "PASS"),
        ({32: 1e-6, 64: 1e-4, 128: 1e-2}, "PASS"),  # it grows, and does not matter yet
        ({32: 0.1, 64: 0.1, 128: 0.1}, "PASS"),  # 9% of the step
        ({32: 0.15, 64: 0.15, 128: 0.15}, "WARN"),  # 13%
        ({32: 0.3, 64: 0.3, 128: 0.3}, "FAIL"),  # 23%
        ({32: 0.03, 64: 0.1, 128: 0.3}, "FAIL"),
        ({32: 9.0, 64: 1e-4, 128: 1e-4}, "PASS"),  # the smallest model alone
    ],
)
def test_eps_is_judged_by_the_share_of_a_step_that_it_takes(
    values: dict[int, float], expected: str
) -> None:
    quantity = verdict(shares(values))
    largest = max(values.values())
    assert quantity.slope == pytest.approx(largest / (1 + largest))
    assert quantity.verdict == expected
    assert quantity.cause == ("" if expected == "PASS" else DAMPED)


def test_damping_spans_the_seeds() -> None:
    points = shares({32: 0.1, 64: 0.1, 128: 1.0}, spread=2.0)
    points = points.pivot(index=["width", "seed"], columns="t", values="value")
    fit = damping(points)
    assert (fit.low, fit.high) == pytest.approx((1 / 2, 2 / 3))
    assert fit.slope == fit.slope_wide == pytest.approx(7 / 12)


def test_steps_without_any_gradient_do_not_enter() -> None:
    frame = shares({32: 1e-4, 64: 1e-4, 128: 1e-4})
    frame.loc[(frame["t"] == 2) & (frame["width"] == 64), "value"] = math.inf
    quantity = verdict(frame)
    assert (quantity.verdict, quantity.times) == ("PASS", (4,))
