"""The slopes of correct models late in a run, and of one whose weight decay is not compensated.

    python benchmarks/coord_late.py

The quickstart's coordinate check (widths 32 to 256, three seeds, eight steps) of `completep-tied`,
early and after 100 or 300 steps of a proxy run. `decay`: learning rate times weight decay is 1/100.
`uncompensated`: hidden weights have the base width's decay at every width, beside learning rates
that fall with it. `says` leaves the symbolic check out.

Left in `benchmarks/results/coord_late/`: `coord_late.json`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")  # before torch, in every process

import torch

from mutransfer.apply import initialize
from mutransfer.coord_check import Trainable, coord_check
from mutransfer.coord_text import culprits
from mutransfer.files import write_json
from mutransfer.optimizers import Matrix, Optimizers
from proxies.data import Batches
from proxies.decoder import Decoder
from proxies.tables import decoder_table
from sweeps.coord_options import train_until
from sweeps.experiment import load_experiment
from sweeps.workspace import Workspace

RESULTS = Path(__file__).parent / "results" / "coord_late"
CASES: tuple[tuple[Matrix, int, str], ...] = (
    ("adamw", 300, "no decay"),
    ("muon", 300, "no decay"),
    ("adamw", 100, "no decay"),
    ("muon", 100, "no decay"),
    ("adamw", 100, "decay"),
    ("muon", 100, "decay"),
    ("adamw", 100, "uncompensated"),
    ("muon", 100, "uncompensated"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    args = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        cases = pool.starmap(run, CASES, chunksize=1)
    write_json(
        args.out / "coord_late.json",
        {
            "command": "python benchmarks/coord_late.py",
            "hardware": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
            "cases": cases,
        },
    )


def run(optimizer: Matrix, late: int, decay: str) -> dict[str, Any]:
    """One late check beside an early one; the drift of every slope and the verdict."""
    torch.set_num_threads(1)
    started, e = time.monotonic(), load_experiment("quickstart")
    c, train = e.coord_check, e.train.model_copy(update={"steps": 500})
    weight_decay = 0.0 if decay == "no decay" else 0.01 / e.params.lr
    params = e.params.model_copy(update={"weight_decay": weight_decay})
    corpus = Workspace(e, Path(tempfile.mkdtemp())).corpus
    batches = Batches(corpus.train, seq_len=c.seq_len, batch_size=c.batch_size, seed=0)

    def build(width: int, seed: int, steps: int) -> Trainable:
        config = e.model_at(width)
        table = decoder_table(config, e.base, params, base_width=e.base_width)
        model = Decoder(config)
        initialize(model, table, seed=seed)
        optimizers = Optimizers(model, table, optimizer)
        if decay == "uncompensated":
            for group in optimizers.matrix.param_groups:
                power = 0.5 if optimizer == "muon" else 1.0
                group["weight_decay"] /= (width / e.base_width) ** power
        if steps:
            train_until(steps, train, model, optimizers, model.loss, corpus, seed)
        batch = torch.from_numpy(batches.at(seed))
        return Trainable(model=model, optimizer=optimizers, loss=lambda: model.loss(batch),
                         table=table, tokens=batch[:, :-1], trained=steps)  # fmt: skip

    early, result = (
        coord_check(lambda width, seed, n=steps: build(width, seed, n), c.widths,  # type: ignore[misc]
                    seeds=c.seeds, steps=c.steps)
        for steps in (0, late)
    )  # fmt: skip
    result = result.since(early)
    print(f"\n{optimizer}, {late} steps, {decay}: early {early.measured_verdict}, late "
          f"{result.measured_verdict}\n{result.summary()}", flush=True)  # fmt: skip
    return {
        "optimizer": optimizer,
        "late": late,
        "decay": decay,
        "early_verdict": early.measured_verdict,
        "late_verdict": result.measured_verdict,
        "says": list(culprits(result.quantities, ())),
        "drifts": result.to_json()["drifts"],
        "seconds": round(time.monotonic() - started),
    }


if __name__ == "__main__":
    main()
