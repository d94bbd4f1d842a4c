"""What leaves FP8's range as width grows: right and wrong parametrizations, emulated FP8.

    python benchmarks/fp8_overflow.py

One coordinate check per parametrization, scaling and learning rate: the tiny decoder at widths 32
to 256, 3 seeds, 8 steps of AdamW on 64 random tokens. Written down are the excess of each check's
worst curve, which the verdict is on, its name and largest share at each width, and the largest
share of any curve at any width.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any, get_args

import torch

from mutransfer.apply import initialize
from mutransfer.coord_check import CoordCheckResult, Trainable, coord_check
from mutransfer.files import write_json
from mutransfer.optimizers import Optimizers
from mutransfer.rules import BaseParams
from proxies.decoder import Decoder
from proxies.float8 import Float8, Scaling
from proxies.presets import TINY
from proxies.tables import decoder_table

RESULT = Path(__file__).parent / "results" / "fp8_overflow" / "fp8_overflow.json"
WIDTHS = (32, 64, 128, 256)
BASE = TINY.narrow(WIDTHS[0]).model_copy(update={"vocab_size": 64})


def check(rules: str, scaling: Scaling, lr: float) -> CoordCheckResult:
    """One coordinate check in emulated FP8."""
    params = BaseParams(lr=lr, embedding_lr_ratio=2.0, init_std=0.1, embedding_multiplier=3.0,
                        output_multiplier=2.0, residual_multiplier=1.5)  # fmt: skip

    def factory(width: int, seed: int) -> Trainable:
        config = BASE.narrow(width)
        table = decoder_table(config, BASE, params, rules, base_width=BASE.d_model)
        model = Decoder(config, Float8(scaling=scaling))
        initialize(model, table, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        batch = torch.randint(BASE.vocab_size, (4, 17), generator=generator)
        return Trainable(model=model, optimizer=Optimizers(model, table), table=table,
                         loss=lambda: model.loss(batch), tokens=batch[:, :-1])  # fmt: skip

    return coord_check(factory, WIDTHS, seeds=3, steps=8)


def worst(result: CoordCheckResult) -> dict[str, Any]:
    """The curve that overflows most, over what it does in the narrowest models."""
    curves = [q for q in result.quantities if q.kind.startswith("overflow")]
    most = max(curves, key=lambda q: q.slope or 0.0)
    frame = result.frame[result.frame["kind"].str.startswith("overflow")]
    own = frame[(frame["kind"] == most.kind) & (frame["name"] == most.name)]
    shares = own.groupby("width")["value"].max()
    return {
        "kind": most.kind,
        "name": most.name,
        "excess": most.slope,
        "verdict": most.verdict,
        "by_width": {str(width): float(share) for width, share in shares.items()},
        "at_any_width": float(frame["value"].max()),
    }


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for rules in ("completep-tied", "mup", "sp"):
        for scaling in get_args(Scaling):
            for log_lr in (-10, -8, -7, -6, -5, -4):
                found = worst(check(rules, scaling, 2.0**log_lr))
                rows.append({"rules": rules, "scaling": scaling, "log2_lr": log_lr, **found})
                told = f"{found['excess']:>8.2%}  {found['verdict']}  {found['kind']}"
                told += f" {found['name']}; {found['at_any_width']:.1%} at any width"
                print(f"{rules:<15}{scaling:<9}lr 2^{log_lr:<4}{told}", flush=True)
    machine = {"processor": platform.machine(), "torch": torch.__version__, "threads": 1}
    write_json(RESULT, {"machine": machine, "widths": WIDTHS, "checks": rows})


if __name__ == "__main__":
    main()
