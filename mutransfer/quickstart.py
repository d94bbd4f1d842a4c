"""`mutransfer quickstart`: the whole flow with the same commands a user would type."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from mutransfer.files import read_json

EXPERIMENT, RECIPE = "quickstart", "smoke"
_OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon"}


def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for everything it makes.")] = Path(
        "runs/quickstart"
    ),
) -> int:
    """Checks, sweep, bundle, preflight and a training run from it, in minutes.

    Exits 0 once all steps ran, whatever their verdicts; 2 where a step cannot run.
    """
    from full_scale.cli import preflight, train
    from sweeps.cli import coord_check, export, sweep, transfer_check

    bundle = out / "export" / "bundle.json"
    run = out / "train"
    steps: list[tuple[str, str, Callable[[], int | None]]] = [
        ("coordinate check", "is the parametrization right? μP should pass, SP should fail",
         lambda: coord_check(EXPERIMENT, out)),
        ("sweep", "which hyperparameters are best on the narrow proxy?",
         lambda: sweep(EXPERIMENT, out)),
        ("coordinate check", "once more, at the hyperparameters that the sweep found",
         lambda: coord_check(EXPERIMENT, out)),
        ("transfer check", "does the best learning rate stay put as the model gets wider?",
         lambda: transfer_check(EXPERIMENT, out)),
        ("export", "the bundle: hyperparameters for the target, with their evidence",
         lambda: export(EXPERIMENT, out)),
        ("preflight", "do the target's first steps have the sizes that narrow models lead to?",
         lambda: preflight(bundle=bundle, out=out / "preflight", accept_unverified=True)),
        ("train", "the target, trained from the bundle: warmup, stable, Muon decay",
         lambda: train(bundle=bundle, recipe=RECIPE, out=run, accept_unverified=True)),
    ]  # fmt: skip
    times: dict[str, float] = {}
    for number, (name, question, step) in enumerate(steps, start=1):
        print(f"\n━━ {number}/{len(steps)} {name}: {question}")
        started = time.monotonic()
        if step() == 130:
            return 130
        times[name] = times.get(name, 0.0) + time.monotonic() - started
    print(f"\n━━ done in {sum(times.values()):.0f} s: what it showed")
    for line in summary(out):
        print(f"  {line}")
    print("\nLook at")
    for picture, what in (
        ("coord-check/coord_check.png", "flat lines: μP; the row below grows: SP"),
        ("transfer-check/transfer_check.png", "the minimum stays put (left) or moves (right)"),
        ("preflight/preflight.png", "all dots at 1: the target is what it should be"),
        ("train/loss.png", "the run that used the bundle"),
    ):
        print(f"  {out}/{picture:<35}{what}")
    print(f"Then: mutransfer bundle show {bundle}")
    print("Your own: mutransfer init my.toml, edit it, and run the same commands on it.")
    return 0


def summary(out: Path) -> list[str]:
    """What the steps found, in sentences, from the files that they left in `out`."""
    coord = _read(out / "coord-check" / "coord_check.json")
    sweep = _read(out / "sweep" / "sweep.json")
    transfer = _read(out / "transfer-check" / "transfer_check.json")
    bundle = _read(out / "export" / "bundle.json")
    preflight = _read(out / "preflight" / "preflight.json")
    run = _read(out / "train" / "run.json")
    lines = []
    for check in coord["checks"].values():
        widths = f"from width {min(check['widths'])} to {max(check['widths'])}"
        found = next(iter(check["culprits"]), f"everything keeps its right size {widths}")
        arm = f"{check['parametrization']} under {_OPTIMIZERS[check['optimizer']]}"
        lines.append(_line("coordinate check", check["verdict"], arm, found))
    proxy, trials = sweep["experiment"]["proxy"]["d_model"], len(sweep["study"]["trials"])
    values = ", ".join(
        f"{name} {sweep['base_hyperparameters'][name]:.3g}"
        for name in sweep["experiment"]["search"]
    )
    lines.append(
        f"sweep: best of {trials} trials at width {proxy} is {values}: "
        f"{sweep['mean_loss']:.3f} nats held out"
    )
    for arm in transfer["arms"]:
        first, last = arm["optima"][0]["width"], arm["optima"][-1]["width"]
        lines.append(_line("transfer check", arm["verdict"], arm["arm"], _moved(arm, first, last)))
    narrow = " and ".join(map(str, preflight["widths"]))
    found = next(iter(preflight["culprits"]), f"its first steps are what widths {narrow} lead to")
    arm = f"width {preflight['target']}"
    lines.append(_line("preflight", preflight["verdict"], arm, found))
    start, end = run["phases"][0], run["phases"][-1]
    lines.append(
        f"train: the bundle {bundle['sha256'][:8]} was accepted; held-out loss "
        f"{start['heldout_loss']:.2f} after {start['name']}, {end['heldout_loss']:.2f} nats at "
        f"the end of {len(run['phases'])} phases"
    )
    return lines


def _line(check: str, verdict: str, arm: str, found: str) -> str:
    return f"{check}: {verdict:<4} {arm}: {found}"


def _moved(arm: dict[str, Any], first: int, last: int) -> str:
    """What a transfer check says of one arm."""
    between = f"between width {first} and {last}"
    if arm["drift"] is None:
        return f"there is no best learning rate {between} within the grid"
    moved = f"the best learning rate moves by {arm['drift']:.1f} octaves {between}"
    if arm["regret"] is None:
        return moved
    return f"{moved}; carrying it over costs {arm['regret']:.3f} nats"


def _read(path: Path) -> dict[str, Any]:
    record = read_json(path)
    assert isinstance(record, dict), f"{path} holds an object: we wrote it"
    return record
