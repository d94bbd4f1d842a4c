"""The command `mutransfer train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
