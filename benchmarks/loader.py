"""Goodput of the loader alone: the reference's decay mixture, shuffled, documents numbered.

    python benchmarks/loader.py [--tokens 256] [--folder FOLDER]

Eleven Megatron token files are made, of `--tokens` million int32 ids in all, in proportion to the
weights (at least 4 million each); document lengths are log-normal, with a median of 500 tokens
and a mean of about 820. Then batches of 960 sequences of 3776 tokens are taken from steps all
over the run, one after another, and, as each process of a run does, by two processes that share
every batch. Nothing is trained. Every file is read through once before, as a launch does, and so
may lie in the system's cache: what is measured is the loader, not the disk.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import machine
import numpy as np
import torch

from mutransfer.files import write_json
from proxies.data import Mixture, Source, Stretch, open_megatron, write_megatron
from proxies.data.scan import scan

RESULT = Path(__file__).parent / "results" / "loader" / "loader.json"
VOCAB_SIZE = 129280
SEQ_LEN, BATCH, STEPS = 3776, 960, 20000
TAKEN = 12
# ../shared/reference/xmodel_recipe.json, phase decay_muon
WEIGHTS = {
    "ultrafineweb-en": 0.18725, "ultrafineweb-zh": 0.03716, "starcoder": 0.02209,
    "books": 0.00287, "algebraic-stack": 0.01722, "open-web-math": 0.01722, "wiki": 0.01147,
    "stackexchange": 0.009, "reddit": 0.009, "megawika": 0.01801,
    "sft_mixed_v2_deduped_v4": 0.6687,
}  # fmt: skip


def documents(tokens: int, seed: int) -> Iterator[np.ndarray]:
    """Random ids in documents of log-normal length, about `tokens` in all."""
    rng = np.random.default_rng(seed)
    while tokens > 0:
        length = max(1, int(rng.lognormal(np.log(500), 1)))
        yield rng.integers(0, VOCAB_SIZE, length, dtype=np.int32)
        tokens -= length


def open_mixture(folder: Path) -> Mixture:
    """The decay phase over the files in `folder`."""
    sources = {}
    for name in WEIGHTS:
        file = open_megatron(folder / name)
        sources[name] = Source(name=name, tokens=file.tokens, starts=file.starts, fingerprint="")
    stretch = Stretch(seq_len=SEQ_LEN, sequences=STEPS * BATCH, weights=WEIGHTS)
    return Mixture(sources, [stretch], seed=0, mark_documents=True)


def take(folder: Path, rank: int, ranks: int, barrier: object, found: object) -> None:
    """One process: its part of each of `TAKEN` batches from all over the run."""
    mixture, share = open_mixture(folder), BATCH // ranks
    mixture.take(0, 0, 1)
    barrier.wait()  # type: ignore[attr-defined]
    started, busy = time.perf_counter(), time.process_time()
    for number in range(TAKEN):
        # half of them go on from the one before, half are somewhere else
        step = (number // 2) * (STEPS // TAKEN) + number % 2
        batch = mixture.take(0, step * BATCH + rank * share, share)
        assert batch.documents is not None
        assert batch.tokens.shape == (share, SEQ_LEN + 1)
    found.put((time.perf_counter() - started, time.process_time() - busy))  # type: ignore[attr-defined]


def measure(folder: Path, ranks: int) -> tuple[float, float]:
    """Tokens per second of `ranks` processes together, and per second of a core's time."""
    context = multiprocessing.get_context("spawn")
    barrier, found = context.Barrier(ranks), context.Queue()
    processes = [
        context.Process(target=take, args=(folder, rank, ranks, barrier, found))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    times = [found.get() for _ in processes]
    for process in processes:
        process.join()
    tokens = TAKEN * BATCH * SEQ_LEN
    return tokens / max(wall for wall, _ in times), tokens / sum(busy for _, busy in times)


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=256, help="millions, over all sources")
    parser.add_argument("--folder", help="where to make the files; a temporary one by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder, sizes, lengths = Path(name), {}, {}
        for seed, (source, weight) in enumerate(WEIGHTS.items()):
            wanted = max(4, round(arguments.tokens * weight)) * 10**6
            write_megatron(folder / source, documents(wanted, seed), vocab_size=VOCAB_SIZE)
            file = open_megatron(folder / source)
            sizes[source], lengths[source] = len(file.tokens), len(file.starts)
        started = time.perf_counter()
        for source in WEIGHTS:
            file = open_megatron(folder / source)
            scan(file.tokens, file.path, vocab_size=VOCAB_SIZE, records=folder)
        scanned = sum(sizes.values()) / (time.perf_counter() - started)
        load = os.getloadavg()[0]
        one = [measure(folder, 1) for _ in range(3)]
        two = [measure(folder, 2) for _ in range(3)]
    result = {
        "schema_version": 1,
        "command": "python benchmarks/loader.py " + f"--tokens {arguments.tokens}",
        "machine": machine.processor(),
        "cores": os.cpu_count(),
        "load_before": load,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "sources": {
            s: {"weight": w, "tokens": sizes[s], "documents": lengths[s]}
            for s, w in WEIGHTS.items()
        },
        "batch": {"sequences": BATCH, "seq_len": SEQ_LEN, "taken": TAKEN},
        "tokens_per_s": {
            "one process": [wall for wall, _ in one],
            "two processes": [wall for wall, _ in two],
        },
        "tokens_per_core_s": {
            "one process": [busy for _, busy in one],
            "two processes": [busy for _, busy in two],
        },
        "first_look_tokens_per_s": scanned,
    }
    write_json(RESULT, result)
    for name, speeds in (("one process", one), ("two processes", two)):
        shown = ", ".join(f"{wall / 1e6:.1f} ({busy / 1e6:.1f})" for wall, busy in speeds)
        print(f"{name}: {shown} million tokens/s (per second of a core's time)")
    print(f"first look at all ids: {scanned / 1e6:.0f} million tokens/s; load before {load:.1f}")


if __name__ == "__main__":
    main()
