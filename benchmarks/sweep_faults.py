"""What a shared study bears: processes that are killed, a database that goes away and comes back.

    python benchmarks/sweep_faults.py

Processes of `mutransfer sweep` join one study in a real PostgreSQL at once, on an empty database.
They are killed with SIGKILL at random moments and started again, and the server is stopped in the
middle, for longer than a lease, and started again. Learning rates reach to where proxies diverge,
and a pruner is at work. In the end trials are counted that were lost, stuck, doubled or over the
budget: from the database, by what every trial says of itself.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import torch
from machine import processor
from optuna.trial import FrozenTrial, TrialState
from postgres import Postgres

from mutransfer.files import write_json
from sweeps.interrupted import GONE, is_interrupted
from sweeps.pool import cores

RESULT = Path(__file__).parent / "results" / "sweep_faults" / "sweep_faults.json"
EXPERIMENT = """
name = "faults"
contrast = []
[proxy]
d_model = 32
[target]
preset = "tiny-64"
n_layers = 1
[data]
train = ["{text}"]
heldout_fraction = 0.3
[train]
steps = 24
batch_size = 4
seq_len = 16
heldout_tokens = 256
rungs = 3
[search]
lr = {{ low = 0.002, high = 10.0 }}
init_std = {{ low = 0.02, high = 0.2 }}
[sweep]
trials = {trials}
startup = 20
confirm = 1
confirm_seeds = 1
[transfer_check]
widths = [32, 64]
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--lease", type=float, default=12.0, help="seconds")
    parser.add_argument("--away", type=float, default=20.0, help="seconds without the database")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, Postgres() as server:
        storm = Storm(Path(folder), server, args)
        try:
            storm.blow()
        finally:
            storm.end()
        if any(storm.codes):
            print("\n".join(storm.outputs()), file=sys.stderr)
        found = count(server.url, args.trials)
        lines = [line for text in storm.outputs() for line in text.splitlines()]
        refused = [line for line in lines if "the database refuses: connection failed" in line]
        errors = [line for line in lines if line.startswith(("Error", "Traceback"))]
        errors = [line for line in errors if line not in refused]
        secret = server.password in "".join(storm.outputs())
    result = {
        "command": f"python benchmarks/sweep_faults.py --processes {args.processes} --trials "
        f"{args.trials} --kills {args.kills} --lease {args.lease:g} --away {args.away:g} "
        f"--seed {args.seed}",
        "hardware": f"{cores()} cores, {platform.machine()}, {processor()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "optuna": optuna.__version__},
        "minutes": round((time.monotonic() - started) / 60, 1),
        "kills": storm.kills,
        "database_away_seconds": args.away,
        "exit_codes": storm.codes,
        "refused_as_the_database_was_away": len(refused),
        "errors": errors,
        "password_shown": secret,
        **found,
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, result)
    for key, value in result.items():
        print(f"{key:<24}{value}")
    bad = sum(found[key] for key in ("lost", "stuck", "doubled", "over_budget", "missing"))
    sys.exit(bool(bad or errors or secret or any(storm.codes)))


class Storm:
    """Processes that sweep, and what happens to them.

    Attributes:
        kills: Processes that were killed while they were at work: they had finished a trial.
        codes: Exit codes of those that came to their end.
    """

    def __init__(self, folder: Path, server: Postgres, args: argparse.Namespace) -> None:
        self._folder, self._server, self._args = folder, server, args
        self._draw = random.Random(args.seed)
        words = ["width", "depth", "loss", "learning", "rate", "proxy", "target", "muon", "adam"]
        text = "\n".join(" ".join(self._draw.choices(words, k=8)) for _ in range(1200))
        (folder / "text.txt").write_text(text)
        (folder / "faults.toml").write_text(
            EXPERIMENT.format(text=folder / "text.txt", trials=args.trials)
        )
        self._processes: list[subprocess.Popen[bytes]] = []
        self._before = dict.fromkeys(range(args.processes), 0)  # trials as a process was started
        self.kills, self.codes = 0, list[int]()

    def blow(self) -> None:
        """Runs until all processes have come to their end by themselves."""
        args = self._args
        self._processes = [self._start(place) for place in range(args.processes)]
        away = False
        while any(process.poll() is None for process in self._processes):
            time.sleep(self._draw.uniform(0.2, 1.5))
            working = [
                place
                for place, process in enumerate(self._processes)
                if process.poll() is None and self._trials(place) > self._before[place]
            ]
            if self.kills < args.kills and working:
                place = self._draw.choice(working)
                self._processes[place].send_signal(signal.SIGKILL)
                self._processes[place].wait()
                self.kills += 1
                self._before[place] = self._trials(place)
                self._processes[place] = self._start(place)
            if not away and sum(map(self._trials, self._before)) >= args.trials // 3:
                away = True
                self._server.stop()
                time.sleep(args.away)
                self._server.start()
                # who came while it was away was refused, and comes again
                for place, process in enumerate(self._processes):
                    if process.poll() == 2:
                        self._processes[place] = self._start(place)
        self.codes = [process.returncode for process in self._processes]

    def end(self) -> None:
        """Nobody is left behind."""
        for process in self._processes:
            process.kill()
            process.wait()

    def outputs(self) -> list[str]:
        """What all processes said."""
        return [path.read_text() for path in sorted(self._folder.glob("log-*"))]

    def _start(self, place: int) -> subprocess.Popen[bytes]:
        """In the folder of its own that a machine would have."""
        command = [
            sys.executable, "-m", "mutransfer", "sweep", str(self._folder / "faults.toml"),
            "--workers", "1", "--members", "2", "--lease", f"{self._args.lease:g}",
            "--out", str(self._folder / f"machine-{place}"),
        ]  # fmt: skip
        environment = os.environ | {"MUTRANSFER_STORAGE": self._server.url, "OMP_NUM_THREADS": "1"}
        with (self._folder / f"log-{place}").open("ab") as log:
            return subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def _trials(self, place: int) -> int:
        """Trials that the processes in this place have finished so far, as they tell it."""
        lines = (self._folder / f"log-{place}").read_text().splitlines()
        return sum(line.startswith("trial ") and " · " in line for line in lines)


def count(url: str, budget: int) -> dict[str, Any]:
    """What became of the trials."""
    study = optuna.load_study(study_name="faults", storage=url)
    trials = study.get_trials(deepcopy=False)
    counting = [t for t in trials if not is_interrupted(t)]
    cut = [t for t in trials if is_interrupted(t) and t.user_attrs["interrupted"] == GONE]
    continued = Counter(t.user_attrs["continues"] for t in counting if "continues" in t.user_attrs)
    # by one that counts, or that was cut off itself: not by one that was dropped
    taken_up = {t.user_attrs.get("continues") for t in (*counting, *cut)} - {None}
    points = Counter(tuple(sorted(t.params.items())) for t in counting)
    return {
        "states": dict(Counter(t.state.name for t in counting)),
        "cut_off": len(cut),
        "cut_off_and_continued": len(taken_up),
        "dropped": len(trials) - len(counting) - len(cut),
        "lost": sum(_is_lost(t, trials, taken_up) for t in cut),
        "stuck": sum(not t.state.is_finished() for t in trials),
        "doubled": sum(n - 1 for n in (*continued.values(), *points.values())),
        "over_budget": max(0, len(counting) - budget),
        "missing": max(0, budget - len(counting)),
        "diverged": sum(_diverged(t) for t in counting),
        "pruned": sum(t.state == TrialState.PRUNED for t in counting),
    }


def _is_lost(trial: FrozenTrial, trials: list[FrozenTrial], taken_up: set[Any]) -> bool:
    """Whether it had something to lose, was no twin of an earlier one, and nobody went on."""
    task = trial.user_attrs.get("continues")
    twin = task is not None and any(
        t.number < trial.number and t.user_attrs.get("continues") == task for t in trials
    )
    had = trial.params or trial.system_attrs.get("fixed_params")
    return bool(had) and not twin and trial.number not in taken_up


def _diverged(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.FAIL and "diverged_at" in trial.user_attrs


if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    main()
