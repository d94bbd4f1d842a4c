"""The preflight of Xmodel-2.5's 1.35B model: what it takes, and the smallest slip that it sees.

    python benchmarks/preflight.py --work runs/preflight-benchmark

A bundle for the real target is made with the commands, as a user makes one: a BPE of the paper's
129,280 entries (trained on the text, and padded with entries that the text never uses), a proxy of
d_model 192 and 4 layers, a search, both checks. Its budgets are tiny: the hyperparameters are not
worth using, and the transfer check's verdict is not PASS. Then `mutransfer preflight` runs as a
process of its own, timed, with its peak memory.

Last, slips are done to the built target by a factor: all init stds at once, then all learning rates
and multipliers at once, as each shows in a quantity of its own (but that the attention multiplier
moves what a block adds a little). The smallest factor that fails, up and down, in every group or in
that quantity, is what is detected. Left in `benchmarks/results/preflight/`:
`preflight.json`, `preflight.png`, `benchmark.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer

from full_scale import preflight
from mutransfer.bundle import Bundle
from mutransfer.coord_check import Trainable
from mutransfer.files import write_json, write_text
from mutransfer.preflight_result import Held
from proxies.data import train_bpe
from proxies.decoder import DecoderConfig
from proxies.presets import XMODEL_2_5

TEXT = Path(__file__).resolve().parents[2] / "shared" / "data" / "wikitext-2" / "valid.txt"
RESULTS = Path(__file__).parent / "results" / "preflight"
FACTORS = (1.2, 1.3, 1.5, 2.0)

EXPERIMENT = """
name = "preflight"
target = "xmodel-2.5"
contrast = []

[proxy]
d_model = 192
n_layers = 4

[params]
lr = 0.0078
embedding_multiplier = 12.0
residual_multiplier = 1.4
init_std = 0.1
weight_decay = 0.1

[search]
lr = {{ low = 0.004, high = 0.016 }}

[data]
train = ["{text}"]
tokenizer = "{tokenizer}"
vocab_size = 129280

[train]
steps = 6
batch_size = 2
seq_len = 64
heldout_tokens = 1024
rungs = 1

[sweep]
trials = 2
startup = 1
confirm = 1
confirm_seeds = 2

[coord_check]
widths = [192, 384, 576]
batch_size = 2
seq_len = 64
steps = 4
optimizers = ["adamw", "muon"]

[transfer_check]
widths = [192, 384]
seeds = 2
octaves = 1
extend = 0
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/preflight-benchmark"))
    parser.add_argument("--text", type=Path, default=TEXT)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    path = make_bundle(args.work, args.text)
    seconds, peak, code = timed([*_command("preflight"), "--bundle", str(path), "--out",
                                 str(args.work / "preflight"), "--accept-unverified"])  # fmt: skip
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in ("preflight.json", "preflight.png"):
        shutil.copy(args.work / "preflight" / name, RESULTS / name)
    result = {
        "exit_code": code,
        "verdict": json.loads((RESULTS / "preflight.json").read_text())["verdict"],
        "seconds": round(seconds, 1),
        "peak_gib": round(peak / 2**30, 2),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "parameters": XMODEL_2_5.n_parameters,
        "detected": detected(Bundle.load(path)),
    }
    write_json(RESULTS / "benchmark.json", result)
    print(json.dumps(result, indent=2))


def _command(*words: str) -> list[str]:
    return [sys.executable, "-m", "mutransfer", *words]


def make_bundle(work: Path, text: Path) -> Path:
    """The flow up to `export`; what is there already is not made again."""
    path = work / "run" / "export" / "bundle.json"
    if path.exists():
        return path
    library = Tokenizer.from_str(str(train_bpe([text.read_text()], 8192).json))
    library.add_tokens(
        [AddedToken(f"<unused {i}>", normalized=False)
         for i in range(XMODEL_2_5.vocab_size - library.get_vocab_size())]
    )  # fmt: skip
    write_text(work / "tokenizer.json", library.to_str())
    experiment = EXPERIMENT.format(text=text, tokenizer=(work / "tokenizer.json").resolve())
    write_text(work / "experiment.toml", experiment)
    for command in ("sweep", "coord-check", "transfer-check", "export"):
        words = [str(work / "experiment.toml"), "--out", str(work / "run")]
        if command in ("sweep", "transfer-check"):
            words += ["--workers", "1"]
        code = subprocess.run(_command(command, *words), check=False).returncode
        if code and command != "transfer-check":  # six steps transfer nothing
            raise SystemExit(f"{command} ended with {code}")
    return path


def timed(words: list[str]) -> tuple[float, int, int]:
    """Runs a process: seconds, its peak resident set in bytes, its exit code."""
    started = time.monotonic()
    process = subprocess.Popen(words)
    _, status, usage = os.wait4(process.pid, 0)
    return time.monotonic() - started, usage.ru_maxrss * 1024, os.waitstatus_to_exitcode(status)


def detected(bundle: Bundle) -> dict[str, float | None]:
    """The smallest of `FACTORS` that fails, up and down: in every group, or in its quantity."""
    found: dict[str, float | None] = dict.fromkeys(SEEN_IN)
    for factor in FACTORS:
        seen: dict[str, bool] = {}
        for sign in (factor, 1 / factor):
            for slip, names in SLIPS:
                target = target_of(bundle, slip, sign)
                for name in names:
                    kind = SEEN_IN[name]
                    verdicts = [h.verdict for h in target
                                if h.kind == kind and h.t == (kind == "update")]  # fmt: skip
                    print(f"{name} x {sign:.3g}: {verdicts}", flush=True)
                    every = all if kind in ("update", "weight") else any
                    failed = every(verdict == "FAIL" for verdict in verdicts)
                    seen[name] = seen.get(name, True) and failed
        for name, right in seen.items():
            if right and found[name] is None:
                found[name] = factor
        if None not in found.values():
            break
    return found


def target_of(
    bundle: Bundle, slip: Callable[[Trainable, float], object], factor: float
) -> list[Held]:
    """What a preflight of two steps says of a target that a slip was done to."""
    build = preflight._trainable

    def damaged(config: DecoderConfig, *args: Any, **options: Any) -> Trainable:
        trainable = build(config, *args, **options)
        if config.d_model == XMODEL_2_5.d_model:
            slip(trainable, factor)
        return trainable

    require, preflight._trainable = preflight._require_memory, damaged
    preflight._require_memory = lambda *_: None  # the allocator keeps what the one before had
    try:
        result = preflight.run_preflight(bundle, seeds=1, steps=2)
    finally:
        preflight._trainable, preflight._require_memory = build, require
    return [held for held in result.held if held.stage == "target"]


def scale_lr(trainable: Trainable, factor: float) -> None:
    for group in trainable.groups:
        group["lr"] *= factor  # type: ignore[index]


@torch.no_grad()
def scale_init(trainable: Trainable, factor: float) -> None:
    for parameter in trainable.model.parameters():
        parameter.mul_(factor)


def scale_lr_and_multipliers(trainable: Trainable, factor: float) -> None:
    """All at once: none of them shows where another one does."""
    scale_lr(trainable, factor)
    for name in ("embedding", "residual", "attention", "output"):
        trainable.model.get_buffer(f"{name}_multiplier").mul_(factor)


SEEN_IN = {
    "learning rate": "update",
    "init std": "weight",
    "embedding multiplier": "entry",
    "residual multiplier": "branch",
    "attention multiplier": "attention_logits",
    "output multiplier": "logits",
}
"""The quantity by what is off."""

SLIPS: tuple[tuple[Callable[[Trainable, float], object], tuple[str, ...]], ...] = (
    (scale_init, ("init std",)),
    (scale_lr_and_multipliers, tuple(name for name in SEEN_IN if name != "init std")),
)

if __name__ == "__main__":
    main()
