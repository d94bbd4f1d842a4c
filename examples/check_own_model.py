"""Checks a model of your own, in own_model.py: python examples/check_own_model.py [picture.png]"""

import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from own_model import NextByte, role

from mutransfer import param_groups, parametrize
from mutransfer.apply import Geometry, initialize
from mutransfer.coord_check import Trainable, coord_check
from mutransfer.coord_plot import coord_check_figure
from mutransfer.rules import BaseParams

TEXT = torch.tensor(list(Path(__file__).read_bytes())).unfold(0, 9, 1)


def build(width: int) -> NextByte:
    return NextByte(width=width, context=8, n_layers=2)


def factory(width: int, seed: int) -> Trainable:
    model, params = build(width), BaseParams(lr=2**-6, init_std=0.1, output_multiplier=2.0)
    depth = Geometry(n_layers=2, base_n_layers=2)
    table = parametrize(model, build(64), params, geometry=depth, role=role)
    initialize(model, table, seed=seed)
    batch = TEXT[seed::4]
    optimizer = torch.optim.AdamW(param_groups(model, table, "adamw"))
    return Trainable(model=model, optimizer=optimizer, table=table,
                     loss=lambda: F.cross_entropy(model(batch[:, :-1]), batch[:, -1]))  # fmt: skip


if __name__ == "__main__":
    result = coord_check(factory, (64, 128, 256), seeds=2, steps=8)
    picture = (sys.argv[1:] or [f"{tempfile.mkdtemp()}/coord_check.png"])[0]
    coord_check_figure(result).savefig(picture)
    print(f"{result.summary()}\npicture: {picture}")
    sys.exit(result.verdict == "FAIL")
