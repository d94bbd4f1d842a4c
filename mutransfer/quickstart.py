"""`mutransfer quickstart`: the whole flow with the same commands a user would type."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

EXPERIMENT, RECIPE = "quickstart", "smoke"


def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for everything it makes.")] = Path(
        "runs/quickstart"
    ),
) -> int:
    """Coordinate check, sweep, transfer check, bundle and a training run from it, in minutes.

    Exits 0 once all steps ran, whatever their verdicts; 2 where a step cannot run.
    """
    from full_scale.cli import train
    from sweeps.cli import coord_check, export, sweep, transfer_check

    bundle = out / "export" / "bundle.json"
    run = out / "train"
    verdicts = ("PASS or WARN", "FAIL")
    steps: list[tuple[str, str, Callable[[], int | None]]] = [
        ("coordinate check", "is the parametrization right? μP should pass, SP should fail",
         lambda: coord_check(EXPERIMENT, out)),
        ("sweep", "which hyperparameters are best on the narrow proxy?",
         lambda: sweep(EXPERIMENT, out)),
        ("transfer check", "does the best learning rate stay put as the model gets wider?",
         lambda: transfer_check(EXPERIMENT, out)),
        ("export", "the bundle: hyperparameters for the target, with their evidence",
         lambda: export(EXPERIMENT, out)),
        ("train", "the target, trained from the bundle: warmup, stable, Muon decay",
         lambda: train(bundle=bundle, recipe=RECIPE, out=run, accept_unverified=True)),
    ]  # fmt: skip
    times: list[str] = []
    for number, (name, question, step) in enumerate(steps, start=1):
        print(f"\n━━ {number}/{len(steps)} {name}: {question}")
        started = time.monotonic()
        code = step()
        if code == 130:
            return code
        outcome = f", {verdicts[code or 0]}" if "check" in name else ""
        times.append(f"  {name:<17}{time.monotonic() - started:4.0f} s{outcome}")
    print("\n━━ done")
    print("\n".join(times))
    print(f"""
Look at
  {out}/coord-check/coord_check.png         flat lines: μP; the row below grows: SP
  {out}/transfer-check/transfer_check.png   the minimum stays put (left) or moves (right)
  {run}/loss.png                            the run that used the bundle
Then: mutransfer bundle show {bundle}
Your own: mutransfer init my.toml, edit it, and run the same five commands on it.""")
    return 0
