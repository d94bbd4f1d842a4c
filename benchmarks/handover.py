"""What the hand-over to Muon gains in the decay, and whether a change of text there matters.

    python benchmarks/handover.py --seeds 8 --out benchmarks/results/handover

For every seed and either text of the stable phase, a model of two layers is trained up to the
decay once; from that very state, AdamW's moments included, the decay is run with AdamW, and with
the hidden matrices on Muon, its momentum seeded or fresh. All else is equal: weights,
learning-rate shape, batches and their order. Texts, 2 x 2 with the optimizer:

- `same`: WikiText-2 all along;
- `switch`: the Python standard library's sources up to the decay, WikiText-2 in it.

Held out is WikiText-2's test text; training text is its validation text. Reported are the mean
paired differences (hand-over minus AdamW, nats per byte, below 0 where the hand-over is better),
over seeds, with their 95% t intervals. The hyperparameters are those that the trials of
benchmarks/results/wikitext2 found for AdamW at this width's proxy; Muon's learning rate follows
from them by the rules and was not tuned through the switch, so AdamW is on its home ground.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import processor

from mutransfer.apply import initialize
from mutransfer.files import read_json, write_json
from mutransfer.optimizers import Optimizers
from mutransfer.progress import Display
from mutransfer.rules import BaseParams
from mutransfer.schedule import WSD
from mutransfer.student import student_t
from proxies.data import Batches, Corpus, DataConfig, heldout_batches, prepare
from proxies.decoder import Decoder
from proxies.presets import get_preset
from proxies.run import clip
from proxies.tables import decoder_table

ROOT = Path(__file__).resolve().parents[1]
TUNED = ROOT / "benchmarks" / "results" / "wikitext2" / "bundle.json"
BASE, MODEL = get_preset("tiny-32"), get_preset("tiny-64")
STEPS, BATCH, SEQ_LEN, HELDOUT = 400, 8, 128, 65536
SCHEDULE = WSD(warmup=0.1, decay=0.2, final=1 / 16)
DECAYS = ("adamw", "muon seeded", "muon fresh")
TEXTS = ("same", "switch")

State = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--text", type=Path, default=ROOT.parent / "shared/data/wikitext-2",
                        help="folder with valid.txt and test.txt")  # fmt: skip
    parser.add_argument("--muon-factor", type=float, help="Muon's lr over AdamW's, at the base")
    parser.add_argument("--out", type=Path, default=Path("runs/handover"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    wiki = DataConfig(train=(str(args.text / "valid.txt"),), heldout=(str(args.text / "test.txt"),))
    corpora = {"wiki": prepare(wiki, args.out / "data"),
               "stdlib": prepare(DataConfig(max_bytes=2**21), args.out / "data")}  # fmt: skip
    tuned: Any = read_json(TUNED)
    params = BaseParams.model_validate(tuned["base_hyperparameters"])
    if args.muon_factor is not None:
        params = params.model_copy(update={"muon_factor": args.muon_factor})
    rules = tuned["parametrization"]["name"]
    started, cpu = time.monotonic(), time.process_time()
    losses: dict[str, dict[str, list[float]]] = {
        text: {decay: [] for decay in DECAYS} for text in TEXTS
    }
    with Display() as display:
        for seed in range(args.seeds):
            for text in TEXTS:
                for decay, loss in arms(corpora, text, params, rules, seed):
                    losses[text][decay].append(loss)
            line = ", ".join(f"{t} {d} {v[-1]:.4f}" for t in TEXTS for d, v in losses[t].items())
            display(f"seed {seed}: {line}", (seed + 1) / args.seeds)
    result = {
        "differences": report(losses),
        "losses": losses,
        "what": "held-out nats per byte, hand-over minus AdamW, paired by seed; 95% t intervals",
        "seeds": args.seeds,
        "model": f"tiny-{MODEL.d_model}",
        "steps": STEPS,
        "decay_steps": STEPS - SCHEDULE.decay_start(STEPS),
        "tokens": STEPS * BATCH * SEQ_LEN,
        "epochs": {text: STEPS * BATCH * SEQ_LEN / corpora["wiki"].train_tokens if text == "same"
                   else (STEPS - SCHEDULE.decay_start(STEPS)) * BATCH * SEQ_LEN
                   / corpora["wiki"].train_tokens for text in TEXTS},
        "parametrization": rules,
        "params": params.model_dump(),
        "seconds": round(time.monotonic() - started),
        "cpu_seconds": round(time.process_time() - cpu),
        "machine": f"{processor()}, 1 thread",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }  # fmt: skip
    write_json(args.out / "handover.json", result)
    print(json.dumps(result["differences"], indent=2))


def arms(
    corpora: dict[str, Corpus], text: str, params: BaseParams, rules: str, seed: int
) -> list[tuple[str, float]]:
    """Held-out loss after each decay, from one state at the end of the stable phase."""
    start = SCHEDULE.decay_start(STEPS)
    model = Decoder(MODEL)
    table = decoder_table(MODEL, BASE, params, rules)
    initialize(model, table, seed=seed)
    streams = {
        name: Batches(corpus.train, seq_len=SEQ_LEN, batch_size=BATCH, seed=seed)
        for name, corpus in corpora.items()
    }
    heldout = heldout_batches(corpora["wiki"].heldout, SEQ_LEN, BATCH, HELDOUT)
    optimizers = Optimizers(model, table)
    train(model, optimizers, streams["stdlib" if text == "switch" else "wiki"].at, 0, start)
    state = copies(model, optimizers)
    found = []
    for decay in DECAYS:
        optimizers = Optimizers(model, table)
        restore(model, optimizers, state)
        if decay != "adamw":
            optimizers.hand_over("seed" if decay == "muon seeded" else "fresh")
        train(model, optimizers, streams["wiki"].at, start, STEPS)
        with torch.no_grad():
            values = [model.loss(torch.from_numpy(batch)).item() for batch in heldout]
        found.append((decay, statistics.fmean(values)))
    return found


def train(
    model: Decoder, optimizers: Optimizers, batch: Callable[[int], Any], first: int, end: int
) -> None:
    """The steps from `first` to before `end` of the run."""
    for step in range(first, end):
        optimizers.set_lr(SCHEDULE.factor(step, STEPS))
        model.loss(torch.from_numpy(batch(step))).backward()
        clip(model, 1.0)
        optimizers.step()
        optimizers.zero_grad()


def copies(model: Decoder, optimizers: Optimizers) -> State:
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return weights, {name: t.clone() for name, t in optimizers.state_tensors().items()}


@torch.no_grad()
def restore(model: Decoder, optimizers: Optimizers, state: State) -> None:
    for name, p in model.named_parameters():
        p.copy_(state[0][name])
    optimizers.load_state_tensors(state[1])


def report(losses: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """The paired differences of interest, by name."""
    found, gains = {}, {}
    for decay in DECAYS[1:]:
        for text in TEXTS:
            pairs = zip(losses[text][decay], losses[text]["adamw"], strict=True)
            gains[text] = [a - b for a, b in pairs]
            found[f"{decay}, {text}"] = interval(gains[text])
        both = zip(gains["switch"], gains["same"], strict=True)
        found[f"{decay}, switch minus same"] = interval([a - b for a, b in both])
    for text in TEXTS:
        pairs = zip(losses[text]["muon seeded"], losses[text]["muon fresh"], strict=True)
        found[f"seeded minus fresh, {text}"] = interval([a - b for a, b in pairs])
    return found


def interval(values: list[float]) -> dict[str, float]:
    """Mean, standard error and 95% interval; all but the mean are infinite for one value."""
    mean = statistics.fmean(values)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    half = student_t(len(values) - 1) * error
    return {"mean": mean, "error": error, "low": mean - half, "high": mean + half}


if __name__ == "__main__":
    main()
