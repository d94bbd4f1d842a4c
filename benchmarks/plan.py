"""What `mutransfer plan` predicts on this processor against what the trainer then takes.

    python benchmarks/plan.py --out benchmarks/results/plan

Every case trains in a process of its own with the trainer itself, weights measured at every step.
Memory is the growth of the peak resident set over what the process had once all was imported
and a tiny model had taken a step. Time is of the processor, in one thread, so that what else the
machine does leaves it alone; predicted and measured alike.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import processor

from full_scale.plan import plan_here
from full_scale.recipe import Recipe
from full_scale.trainer import Trainer
from mutransfer.files import write_json
from mutransfer.rules import BaseParams
from proxies.data import DataConfig, prepare
from proxies.presets import TINY, XMODEL_2_5
from proxies.tables import decoder_table

WIDE = XMODEL_2_5.narrow(384, n_layers=6).model_copy(update={"vocab_size": 256})
CASES: dict[str, dict[str, Any]] = {
    "wide": {"model": WIDE, "seq_len": 512, "batch_size": 4, "micro_batch": 2},
    "wide, muon": {"model": WIDE, "seq_len": 512, "batch_size": 4, "optimizer": "muon"},
    "wide, recompute": {"model": WIDE, "seq_len": 1024, "batch_size": 4, "recompute": True,
                        "loss_chunk": 512},
    "long": {"model": TINY.narrow(128, n_layers=8), "seq_len": 2048, "batch_size": 4},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/plan"))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--case", help="measure this one and print it (used by the program itself)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.case:
        print(json.dumps(measure(recipe(args.case, args.steps))))
        return
    found = {}
    for name in CASES:
        command = [sys.executable, __file__, "--case", name, "--steps", str(args.steps)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        measured = json.loads(done.stdout)
        plan = plan_here(recipe(name, args.steps), clock=time.process_time)
        predicted = {"mib": plan.memory / 2**20, "seconds": plan.seconds / args.steps}
        found[name] = {
            "predicted": predicted,
            "measured": measured,
            "over_measured": {key: predicted[key] / measured[key] for key in predicted},
        }
        print(name, json.dumps(found[name]), flush=True)
    result = {
        "cases": found,
        "what": "MiB beside the program, and processor seconds per step",
        "machine": f"{processor()}, 1 thread",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    write_json(args.out / "plan.json", result)


def recipe(name: str, steps: int) -> Recipe:
    case = dict(CASES[name])
    model = case.pop("model").model_dump()
    phase = {"name": "one", "steps": steps, **case}
    heldout = case.get("micro_batch", case["batch_size"]) * case["seq_len"]
    return Recipe.model_validate(
        {"name": "plan", "model": model, "clip_norm": 1.0, "heldout_tokens": heldout,
         "data": {"max_bytes": 2**20}, "phases": [phase]}
    )  # fmt: skip


def measure(run: Recipe) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        corpus = prepare(DataConfig(max_bytes=2**20), Path(folder))
        train(TINY_RUN, corpus)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds = train(run, corpus)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"mib": (after - before) / 1024, "seconds": statistics.median(seconds[1:])}


def train(run: Recipe, corpus: Any) -> list[float]:
    """Processor seconds of every step; the first and the last are measured as on logged steps."""
    table = decoder_table(run.model, run.model, BaseParams())
    trainer, seconds = Trainer(recipe=run, table=table, corpus=corpus), []
    for step in range(run.steps):
        started = time.process_time()
        trainer.train_step(measure=step in (0, run.steps - 1))
        seconds.append(time.process_time() - started)
    return seconds[:-1]


TINY_RUN = Recipe.model_validate(
    {"name": "tiny", "model": "tiny-32", "heldout_tokens": 64, "data": {"max_bytes": 2**20},
     "phases": [{"name": "one", "steps": 2, "seq_len": 32, "batch_size": 2, "optimizer": "muon"}]}
)  # fmt: skip


if __name__ == "__main__":
    main()
