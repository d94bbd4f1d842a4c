"""Checks a plain MLP that classifies points: python examples/check_mlp.py [picture.png]"""

import sys
import tempfile

import torch
from torch import nn

from mutransfer import param_groups, parametrize
from mutransfer.apply import initialize
from mutransfer.coord_check import Trainable, coord_check
from mutransfer.coord_plot import coord_check_figure
from mutransfer.modules import carry_multipliers
from mutransfer.rules import BaseParams

ROLES = {"0.weight": "embedding", "2.weight": "hidden", "4.weight": "head"}


def build(width: int) -> nn.Module:
    first, second, head = nn.Linear(16, width), nn.Linear(width, width), nn.Linear(width, 10)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), head)


def factory(width: int, seed: int) -> Trainable:
    model, params = build(width), BaseParams(lr=2**-7, init_std=0.2)
    table = parametrize(model, build(64), params, role=lambda name, _: ROLES.get(name, "bias"))
    carry_multipliers(model, table)
    initialize(model, table, seed=seed)
    x = torch.randn(256, 16, generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(param_groups(model, table, "adamw"))
    return Trainable(model=model, optimizer=optimizer, table=table,
                     loss=lambda: nn.CrossEntropyLoss()(model(x), x[:, :10].argmax(1)))  # fmt: skip


if __name__ == "__main__":
    result = coord_check(factory, (64, 128, 256, 512), seeds=3, steps=8)
    picture = (sys.argv[1:] or [f"{tempfile.mkdtemp()}/coord_check.png"])[0]
    coord_check_figure(result).savefig(picture)
    print(f"{result.summary()}\npicture: {picture}")
    sys.exit(result.verdict == "FAIL")
