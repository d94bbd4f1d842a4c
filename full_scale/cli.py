"""The commands `mutransfer train`, `preflight`, `plan` and `watch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mutransfer.progress import Display

Precision = Literal["fp32", "bf16"]

STOPPED = 130


def train(
    bundle: Annotated[Path, typer.Option(help="The bundle that `mutransfer export` wrote.")],
    recipe: Annotated[str, typer.Option(help="A recipe: a .toml file or a shipped one's name.")],
    out: Annotated[
        Path | None, typer.Option(help="Run folder [default: runs/<recipe>-<bundle hash>].")
    ] = None,
    data_folder: Annotated[
        Path | None, typer.Option(help="Where tokenized text is kept [default: data/ in the run].")
    ] = None,
    accept_unverified: Annotated[
        bool,
        typer.Option("--accept-unverified", help="Accept a bundle without a passed check."),
    ] = False,
) -> int:
    """Train the full-size model from a bundle and a recipe; resumes by itself.

    Returns:
        The exit code: 0 at the end of the run, 130 where a signal stopped it (all is saved).
    """
    from full_scale.train import train as run

    finished = run(
        bundle, recipe, out=out, data_folder=data_folder, accept_unverified=accept_unverified
    )
    return STOPPED if finished is None else 0


def preflight(
    bundle: Annotated[Path, typer.Option(help="The bundle that `mutransfer export` wrote.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder [default: runs/preflight-<bundle hash>].")
    ] = None,
    precision: Annotated[
        Precision, typer.Option(help="Of the target's weights, moments and passes.")
    ] = "bf16",
    steps: Annotated[int, typer.Option(min=2, max=64, help="Optimizer steps.")] = 4,
    seeds: Annotated[int, typer.Option(min=1, max=16, help="Models per narrow width.")] = 3,
    accept_unverified: Annotated[
        bool,
        typer.Option("--accept-unverified", help="Accept a bundle without a passed check."),
    ] = False,
) -> int:
    """Build the real target and hold its first steps against narrow models; exits 1 on FAIL."""
    from full_scale.preflight import run_preflight, write_preflight
    from mutransfer.bundle import Bundle

    loaded = Bundle.load(bundle)
    notes = loaded.verify(accept_unverified=accept_unverified)
    folder = out or Path("runs") / f"preflight-{loaded.sha256[:8]}"
    with Display() as display:
        result = run_preflight(
            loaded, precision=precision, seeds=seeds, steps=steps, progress=display
        )
    write_preflight(result, folder, loaded)
    for note in notes:
        print(f"note: {note}")
    print(f"\n{result.summary()}\n-> {folder}/preflight.png")
    return int(result.verdict == "FAIL")


def watch(
    run: Annotated[Path, typer.Argument(help="The run folder of `mutransfer train`.")],
    once: Annotated[bool, typer.Option("--once", help="Show it as it stands and return.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
) -> None:
    """Show the curves of a run in the terminal, while it goes on or after it has ended."""
    from full_scale.watch import watch as show

    show(run, once=once, every=every)


def plan(
    recipe: str, bundle: Path | None, gpus: int, gpu: str, mfu: float, price: float | None
) -> None:
    """Prints what a recipe takes; see `mutransfer plan`."""
    from full_scale import plan as plans
    from full_scale.admission import admit
    from full_scale.recipe import load_recipe
    from mutransfer.bundle import Bundle
    from mutransfer.hardware import get_device

    loaded = load_recipe(recipe)
    if bundle is not None:
        admission = admit(Bundle.load(bundle), loaded, accept_unverified=True)
        for line in (*map(str, admission.conversions), *admission.notes):
            print(f"note: {line}")
    if gpus:
        device = get_device(gpu)
        made = plans.plan_gpus(loaded, gpus=gpus, device=device, mfu=mfu)
    else:
        made = plans.plan_here(loaded)
    print("\n".join(plans.table(made, price)))
