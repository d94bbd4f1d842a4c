"""Trials per hour of a sweep against what a user would do instead, as ratios in one run.

    python benchmarks/sweep_throughput.py                # what this machine has
    python benchmarks/sweep_throughput.py --case proxy-20m --rounds 3

64 trials of one proxy that differ in learning rate, init and seed, over the same text:

    ours              `sweeps.pool` with what it chooses here, all trials known beforehand, as in
                      a transfer check
    search            the same, with as few at once as a search of the quickstart has in training
    process-per-trial a process for each trial, one after another
    eager             one process, trial after trial
    compiled          one process, trial after trial, one model compiled for all
    shared-gpu-K      K processes with a compiled model each on one GPU (GPU only)

Every arm is a process of its own with a compile cache of its own, empty at first, so that its
start and its compilation count once. Arms of trials one after another run only `--sample` of the 64
and are scaled: start-up + 64/sample times the rest. Arms are interleaved; a ratio is that of a
round, and what is reported is the median over rounds.

Then, in one process: throughput of a population over its number of members, on one thread of a CPU
or on the whole GPU, with the largest difference of a member's loss from that of the model trained
alone; what the time of a population goes to; and the FLOP/s of ours against the machine's largest
matrix product.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import processor
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

from mutransfer.files import write_json
from proxies.data import Corpus, DataConfig, open_corpus, prepare
from proxies.decoder import Decoder, DecoderConfig
from proxies.footprint import measure_footprint
from proxies.population import Population
from proxies.presets import get_preset
from proxies.run import Runner, RunResult, RunSpec, TrainConfig, passes_in
from sweeps.cli import pool_config
from sweeps.desk import Job
from sweeps.experiment import load_experiment
from sweeps.pool import cores, run_jobs

TRIALS = 64
RESULTS = Path(__file__).parent / "results" / "sweep_throughput"
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SEQUENTIAL = ("process-per-trial", "eager", "compiled")
SHARING = (2, 4, 8)  # processes of the arms shared-gpu-K


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", choices=("quickstart", "proxy-20m"), default="quickstart")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sample", type=int, default=8, help="trials of the arms that are scaled")
    parser.add_argument("--members", type=int, nargs="*", help="points of the curve")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--arm", nargs=3, metavar=("NAME", "TRIALS", "CORPUS"),
                        help=argparse.SUPPRESS)  # fmt: skip
    args = parser.parse_args()
    if args.arm:
        name, trials, corpus = args.arm
        print(json.dumps(run_arm(args.case, name, int(trials), Path(corpus))))
        return
    with tempfile.TemporaryDirectory() as folder:
        corpus = prepare(data_of(args.case), folder)
        sharing = [f"shared-gpu-{k}" for k in SHARING] if CUDA else []
        arms = ("ours", "search", *SEQUENTIAL, *sharing)
        rounds = []
        for number in range(args.rounds):
            rounds.append({arm: time_arm(args.case, arm, args.sample, corpus) for arm in arms})
            shown = ", ".join(f"{arm} {rounds[-1][arm]['seconds']:.0f} s" for arm in arms)
            print(f"round {number + 1} of {args.rounds}, {TRIALS} trials: {shown}", flush=True)
        result = {
            "command": f"python benchmarks/sweep_throughput.py --case {args.case} --rounds "
            f"{args.rounds} --sample {args.sample}",
            "hardware": hardware(),
            "load_at_start": round(os.getloadavg()[0], 2),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "case": case_of(args.case),
            "rounds": rounds,
            "arms": summarize(rounds),
            **inside(args.case, corpus, args.members or ([1, 2, 4, 8, 16, 32] if CUDA else
                                                         [1, 2, 4, 8, 16])),
        }  # fmt: skip
    ours = statistics.median(each["ours"]["seconds"] for each in rounds)
    result["flops_per_second"]["ours"] = TRIALS * result["flops_per_trial"] / ours
    out = args.out or RESULTS / f"{args.case}_{DEVICE}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, result)
    print("\n".join(page(result)))


# --- what is trained


def model_of(case: str) -> DecoderConfig:
    return get_preset("proxy-20m") if case == "proxy-20m" else load_experiment("quickstart").base


def train_of(case: str) -> TrainConfig:
    """On a CPU that of the quickstart; passes in bf16 on a GPU."""
    precision = "bf16" if CUDA else "fp32"
    if case == "quickstart":
        return load_experiment("quickstart").train.model_copy(update={"precision": precision})
    return TrainConfig(steps=20, batch_size=8, seq_len=1024, rungs=2, heldout_tokens=32768,
                       precision=precision)  # fmt: skip


def data_of(case: str) -> DataConfig:
    """Text that is on every machine."""
    if case == "quickstart":
        return load_experiment("quickstart").data
    return DataConfig(train=("site-packages",), tokenizer="bpe", max_bytes=64 * 2**20,
                      vocab_size=model_of(case).vocab_size)  # fmt: skip


def specs_of(case: str, corpus: Corpus, count: int) -> list[RunSpec]:
    """Trials around the quickstart's hyperparameters, none of which diverges."""
    model, params = model_of(case), load_experiment("quickstart").params
    return [
        RunSpec(
            model=model,
            base=model,
            base_width=model.d_model,
            params=params.model_copy(
                update={"lr": params.lr * 2 ** (-2 * i / TRIALS), "init_std": 0.1 - i / 1000}
            ),
            train=train_of(case),
            seed=i % 3,
            data=corpus.fingerprint,
        )
        for i in range(count)
    ]


def case_of(case: str) -> dict[str, Any]:
    model, train = model_of(case), train_of(case)
    return {
        "name": case, "trials": TRIALS, "d_model": model.d_model, "n_layers": model.n_layers,
        "n_nonembedding": model.n_nonembedding, "vocab_size": model.vocab_size,
        "steps": train.steps, "batch_tokens": train.batch_tokens,
        "heldout_tokens": train.heldout_tokens, "evaluations": len(train.evaluate_after),
        "precision": train.precision,
    }  # fmt: skip


# --- the arms


def time_arm(case: str, arm: str, sample: int, corpus: Corpus) -> dict[str, float]:
    """Seconds that all trials take in a fresh process with an empty compile cache."""
    trials = sample if arm in SEQUENTIAL else TRIALS
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
        command = [sys.executable, __file__, "--case", case, "--arm", arm, str(trials),
                   str(corpus.folder)]  # fmt: skip
        started = time.perf_counter()
        done = subprocess.run(
            command, env=environment, check=True, stdout=subprocess.PIPE, text=True
        )
        whole = time.perf_counter() - started
    trained = json.loads(done.stdout.splitlines()[-1])["seconds"]
    if arm == "process-per-trial":  # nothing is shared; the process that starts the others is free
        return {"seconds": trained * TRIALS / trials, "start": 0.0, "trials": trials}
    start = whole - trained
    return {"seconds": start + trained * TRIALS / trials, "start": start, "trials": trials}


def run_arm(case: str, arm: str, trials: int, folder: Path) -> dict[str, float]:
    """Trains; the seconds are those from the first trial's start, or its compilation's end."""
    corpus = open_corpus(folder)
    specs = specs_of(case, corpus, trials)
    if arm in ("ours", "search"):
        pool = pool_config(0, None, None)
        few = load_experiment("quickstart").sweep.startup if arm == "search" else trials
        jobs, results = iter([Job(spec) for spec in specs]), list[RunResult]()

        def done(job: Job, result: RunResult | None) -> None:
            assert result is not None
            results.append(result)

        started = time.perf_counter()
        run_jobs(
            pool, folder, lambda: next(jobs, None), done, at_once=-(-few // pool.workers),
            in_training=few, steps=lambda spec: trials * spec.train.steps,
        )  # fmt: skip
        assert len(results) == trials
        return {"seconds": time.perf_counter() - started}
    if arm == "process-per-trial":
        started = time.perf_counter()
        for i in range(trials):
            command = [sys.executable, __file__, "--case", case, "--arm", f"trial-{i}", "1",
                       str(folder)]  # fmt: skip
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return {"seconds": time.perf_counter() - started}
    if arm.startswith("shared-gpu-"):
        started, count = time.perf_counter(), int(arm.removeprefix("shared-gpu-"))
        command = [sys.executable, __file__, "--case", case, "--arm"]
        parts = [
            subprocess.Popen([*command, f"part-{i}-{count}", str(trials), str(folder)],
                             stdout=subprocess.DEVNULL)
            for i in range(count)
        ]  # fmt: skip
        assert [part.wait() for part in parts] == [0] * count
        return {"seconds": time.perf_counter() - started}
    runner = Runner(corpus, device=DEVICE, compile=arm == "compiled" or arm.startswith("part-"))
    if arm.startswith("part-"):
        i, count = map(int, arm.split("-")[1:])
        specs = specs[i::count]
    elif arm.startswith("trial-"):
        specs = specs_of(case, corpus, int(arm.removeprefix("trial-")) + 1)[-1:]
    elif arm == "compiled":  # its first steps compile: they count as start-up, as they happen once
        first = specs[0].train.model_copy(update={"steps": 2, "rungs": 1, "last": 1})
        runner.run(specs[0].model_copy(update={"train": first}))
    started = time.perf_counter()
    for spec in specs:
        runner.run(spec)
    return {"seconds": time.perf_counter() - started}


def summarize(rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Per arm: trials per hour, and how many times faster ours is, medians and all rounds."""
    found = {}
    for arm in rounds[0]:
        seconds = [each[arm]["seconds"] for each in rounds]
        ratios = [each[arm]["seconds"] / each["ours"]["seconds"] for each in rounds]
        found[arm] = {
            "trials_per_hour": round(3600 * TRIALS / statistics.median(seconds)),
            "seconds": round(statistics.median(seconds), 1),
            "start_seconds": round(statistics.median(each[arm]["start"] for each in rounds), 1),
            "ours_is_faster": round(statistics.median(ratios), 2),
            "ratios": [round(ratio, 2) for ratio in ratios],
        }
    return found


# --- inside one process


def inside(case: str, corpus: Corpus, members: list[int]) -> dict[str, Any]:
    """The curve over members, the breakdown, FLOPs per trial and the machine's peak."""
    peak = matmul_peak()
    torch.set_num_threads(1)
    flops = flops_per_trial(case)
    footprint = measure_footprint(corpus, specs_of(case, corpus, 1)[0], device=DEVICE)
    return {
        "flops_per_trial": flops,
        "flops_per_second": {"matmul_peak": peak, "matmul_peak_one_thread": matmul_peak()},
        "mib_per_member": round(footprint.per_member / 2**20, 1),
        "curve": curve(case, corpus, members),
        "breakdown": breakdown(case, corpus, max(k for k in members if k <= 8)),
    }


def curve(case: str, corpus: Corpus, members: list[int]) -> list[dict[str, Any]]:
    """Tokens trained per second by the number of members, interpreted and compiled."""
    specs = specs_of(case, corpus, max(members))
    runner = Runner(corpus, device=DEVICE)
    alone = {i: runner.run(specs[i]).loss for i in {0, *(k - 1 for k in members)}}
    rows = []
    for count, compile in itertools.product(members, (False, True)):
        population = Population(corpus, specs[:count], device=DEVICE, compile=compile)
        population.step()  # compiles
        population.evaluate(population.members)
        population.exchange(list(population.members), specs[:count])
        synchronize()
        started = time.perf_counter()
        results = list(population.run())
        synchronize()
        seconds = time.perf_counter() - started
        losses = {result.key: result.loss for result in results}
        gaps = [
            abs((losses[specs[i].key] or 0) - (loss or 0)) for i, loss in alone.items() if i < count
        ]
        train = specs[0].train
        rows.append({
            "members": count, "compiled": compile,
            "seconds_per_trial": round(seconds / count, 3),
            "tokens_per_second": round(count * train.horizon_tokens / seconds),
            "largest_loss_gap": max(gaps),
        })  # fmt: skip
    return rows


def breakdown(case: str, corpus: Corpus, members: int) -> dict[str, Any]:
    """Shares of the time of an interpreted population, by what its operations are for."""
    from torch.profiler import ProfilerActivity, profile

    kinds = {
        "matrix products": ("aten::bmm", "aten::mm", "aten::addmm"),
        "attention": ("scaled_dot_product", "flash", "efficient_attention"),
        "cross-entropy": ("log_softmax", "nll_loss"),
    }
    specs = specs_of(case, corpus, members)
    population = Population(corpus, specs, device=DEVICE)
    population.step()
    population.exchange(list(population.members), specs)
    clock = Clock()
    population.evaluate = clock.timed("evaluation", population.evaluate)  # type: ignore[method-assign]
    optimizers = population._optimizers
    optimizers.step = clock.timed("optimizer", optimizers.step)  # type: ignore[method-assign]
    with profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
    ) as p:
        started = time.perf_counter()
        list(population.run())
        synchronize()
        whole = time.perf_counter() - started
    # rows of the GPU's own kernels have the same time once more
    events = [event for event in p.key_averages() if event.device_type == DeviceType.CPU]
    times = {event.key: getattr(event, f"self_{'device' if CUDA else 'cpu'}_time_total")
             for event in events}  # fmt: skip
    total = sum(times.values())
    shares = {
        kind: sum(t for key, t in times.items() if any(word in key for word in words)) / total
        for kind, words in kinds.items()
    }
    shares["everything else, mostly elementwise"] = 1 - sum(shares.values())
    return {
        "members": members,
        "operations": {kind: round(share, 3) for kind, share in shares.items()},
        "of which": {name: round(spent / whole, 3) for name, spent in clock.found.items()},
    }


class Clock:
    """Adds up the time inside functions."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            synchronize()
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                synchronize()
                spent = time.perf_counter() - started
                self.found[name] = self.found.get(name, 0.0) + spent

        return call


def flops_per_trial(case: str) -> int:
    """Of matrix products and attention: forward and backward of training, forward of evaluation."""
    train, model = train_of(case), Decoder(model_of(case)).to(DEVICE)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    tokens = torch.zeros(train.batch_size, train.seq_len + 1, dtype=torch.long, device=DEVICE)
    counts = []
    for backward in (True, False):
        with FlopCounterMode(display=False) as counter:
            with passes_in(train.precision, torch.device(DEVICE)):
                loss = model.loss(tokens)
            if backward:
                loss.backward()
        counts.append(counter.get_total_flops())
    evaluations = len(train.evaluate_after) * (train.heldout_tokens // train.batch_tokens)
    return train.steps * counts[0] + evaluations * counts[1]


def matmul_peak(side: int = 2048) -> float:
    """FLOP/s of a square matrix product in the precision that proxies train in; the best of 9."""
    dtype = torch.bfloat16 if CUDA else torch.float32
    side = 8192 if CUDA else side
    a, b = (torch.randn(side, side, device=DEVICE, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(9):
        synchronize()
        started = time.perf_counter()
        a @ b
        synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def hardware() -> str:
    gpu = f"{torch.cuda.get_device_name()}, " if CUDA else ""
    return f"{gpu}{cores()} cores, {platform.machine()}, {processor()}"


def page(result: dict[str, Any]) -> list[str]:
    case, flops = result["case"], result["flops_per_second"]
    lines = [
        "", f"{result['hardware']}, torch {result['versions']['torch']}, "
        f"load {result['load_at_start']} at the start",
        f"{case['trials']} trials of {case['name']}: d_model {case['d_model']}, {case['steps']} "
        f"steps of {case['batch_tokens']} tokens, {case['precision']}",
        "", f"{'arm':<20}{'trials/h':>10}{'start, s':>10}{'ours is faster by':>20}   by rounds",
    ]  # fmt: skip
    for arm, row in result["arms"].items():
        lines.append(f"{arm:<20}{row['trials_per_hour']:>10}{row['start_seconds']:>10}"
                     f"{row['ours_is_faster']:>20.2f}   {row['ratios']}")  # fmt: skip
    lines += ["", f"{'members':<10}{'':<12}{'s/trial':>10}{'tokens/s':>10}{'loss gap':>12}"]
    for row in result["curve"]:
        kind = "compiled" if row["compiled"] else "interpreted"
        lines.append(f"{row['members']:<10}{kind:<12}{row['seconds_per_trial']:>10}"
                     f"{row['tokens_per_second']:>10}{row['largest_loss_gap']:>12.1e}")  # fmt: skip
    lines += ["", f"a member takes {result['mib_per_member']} MiB",
              f"a trial takes {result['flops_per_trial'] / 1e9:.1f} GFLOP; ours achieves "
              f"{flops['ours'] / 1e9:.1f} GFLOP/s, {flops['ours'] / flops['matmul_peak']:.0%} of "
              f"{flops['matmul_peak'] / 1e9:.0f}, the largest matrix product's"]  # fmt: skip
    found = result["breakdown"]
    lines.append(f"a population of {found['members']} spends its time on:")
    for what in ("operations", "of which"):
        lines += [f"  {share:6.1%} {kind}" for kind, share in found[what].items()]
    return lines


if __name__ == "__main__":
    main()
