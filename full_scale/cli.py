"""The commands `mutransfer train` and `mutransfer preflight`."""

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
