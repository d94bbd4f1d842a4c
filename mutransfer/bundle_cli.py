"""`mutransfer bundle …`: what a bundle says, in words, and whether it may be believed."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table as Grid

from mutransfer.bundle import Bundle, migrate
from mutransfer.bundle_evidence import CoordCheck, TransferCheck, mean_and_error
from mutransfer.bundle_verify import differences
from mutransfer.errors import UserError
from mutransfer.files import read_json
from mutransfer.rules import BaseParams

app = typer.Typer(
    help="Show, validate and compare bundles; print their schema.",
    no_args_is_help=True,
    add_completion=False,
)

File = Annotated[Path, typer.Argument(help="A bundle, as `mutransfer export` writes it.")]


@app.command()
def show(file: File) -> None:
    """Print what a bundle was tuned on, what was found, and the table that follows."""
    bundle = Bundle.load(file)
    parts: list[RenderableType] = [*_origin(bundle), _hyperparameters(bundle), *_evidence(bundle)]
    for part in [*parts, _rows(bundle), _optimizers(bundle)]:
        _print(part)
    for note in _verify(bundle, file, accept_unverified=True):
        _print(f"note: {note.replace(', accepted unverified', '')}")
    _print("Sound: hash, table, base hyperparameters and evidence agree with each other.")


@app.command()
def validate(
    file: File,
    accept_unverified: Annotated[
        bool, typer.Option("--accept-unverified", help="Accept a missing or failed verdict.")
    ] = False,
) -> None:
    """Check everything a bundle says; exit 1 on a failed verdict, 2 on anything else."""
    bundle = Bundle.load(file)
    _verify(bundle, file, accept_unverified=True)
    if not accept_unverified and (failed := _failed(bundle)):
        _print(f"{file}: the file is sound, but its verdict is FAIL: {', '.join(failed)}")
        raise typer.Exit(1)
    for note in _verify(bundle, file, accept_unverified=accept_unverified):
        _print(f"note: {note}")
    _print(f"{file}: valid")


@app.command()
def diff(left: File, right: File) -> None:
    """Print the fields in which two bundles differ; exit 1 if there are any."""
    a, b = (Bundle.load(file).model_dump(mode="json") for file in (left, right))
    found = list(differences(a, b))
    for field, one, other in found:
        _print(f"{field}: {_value(one)} -> {_value(other)}")
    raise typer.Exit(1 if found else 0)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a bundle."""
    typer.echo(json.dumps(Bundle.model_json_schema(), indent=2))


@app.command("migrate")
def migrate_(
    file: Annotated[Path, typer.Argument(help="A bundle of an older schema version.")],
    new: Annotated[Path, typer.Argument(help="Where to write it in this version.")],
) -> None:
    """Convert a bundle of an older schema version; it gets a new hash."""
    if new.exists():
        raise UserError("file exists", where=str(new), cure="Name another one.")
    document = read_json(file)
    if not isinstance(document, dict):
        raise UserError("not a bundle", where=str(file), got=type(document).__name__,
                        expected="a JSON object")  # fmt: skip
    bundle = migrate(document, str(file))
    _verify(bundle, file, accept_unverified=True)
    bundle.save(new)
    _print(f"{new}: version {bundle.schema_version}, {bundle.sha256[:12]}")


@app.command()
def megatron(
    file: File,
    accept_differences: Annotated[
        bool,
        typer.Option(
            "--accept-differences", help="Print arguments that differ in init, eps or wd."
        ),
    ] = False,
) -> None:
    """Print Megatron-LM's arguments for a bundle, and where its rules are not the bundle's."""
    from mutransfer.megatron import arguments, cannot_be_expressed, differences

    bundle = Bundle.load(file)
    for note in _verify(bundle, file, accept_unverified=True):
        typer.echo(f"note: {_clean(note)}", err=True)
    found = differences(bundle)
    for difference in found:
        typer.echo(f"differs: {_clean(str(difference))}", err=True)
    if hopeless := cannot_be_expressed(found):
        raise UserError(
            "Megatron's --use-mup cannot express this bundle", where=str(file),
            got="; ".join(map(str, hopeless)),
            cure="Tune one with the parametrization 'megatron', or train with mutransfer.",
        )  # fmt: skip
    if found and not accept_differences:
        raise UserError(
            "Megatron's rules differ from the bundle's", where=str(file),
            got=f"{len(found)} settings, listed above",
            cure="Accept them with --accept-differences: the evidence is then for other rules.",
        )  # fmt: skip
    if any(row.optimizers.muon is not None for row in bundle.table.rows):
        typer.echo("note: for AdamW; Muon's settings are not translated", err=True)
    words = iter(arguments(bundle))
    lines = [next(words)]
    for word in words:
        lines.append(word) if word.startswith("--") else lines.append(f"{lines.pop()} {word}")
    typer.echo(" \\\n".join(lines))


def _verify(bundle: Bundle, file: Path, *, accept_unverified: bool) -> tuple[str, ...]:
    """Verifies; an error names the file too."""
    try:
        return bundle.verify(accept_unverified=accept_unverified)
    except UserError as error:
        where = f"{file}: {error.where}" if error.where else str(file)
        raise UserError(error.what, where=where, got=error.got, expected=error.expected,
                        cure=error.cure) from error  # fmt: skip


def _failed(bundle: Bundle) -> list[str]:
    checks = () if bundle.evidence is None else ("coord_check", "transfer_check")
    found = {name: getattr(bundle.evidence, name) for name in checks}
    return [name for name, check in found.items() if check and check.verdict == "FAIL"]


def _print(part: RenderableType) -> None:
    """Prints in the terminal's width, without what a file could slip a terminal.

    A text is one line, whatever the file put into it.
    """
    part = _clean(part) if isinstance(part, str) else part
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 120
    buffer = io.StringIO()
    Console(file=buffer, width=width, markup=False, highlight=False).print(
        part, soft_wrap=isinstance(part, str)
    )
    typer.echo("\n".join(map(_clean, buffer.getvalue().split("\n"))), nl=False)


def _clean(text: str) -> str:
    """One line without control characters."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _origin(bundle: Bundle) -> Iterator[str]:
    base, target = bundle.base.config, bundle.target.config
    sizes = [key for key in target if base.get(key) != target[key]]
    same = [f"{key} {_value(target[key])}" for key in target if key not in sizes]
    yield f"Bundle {bundle.sha256[:12]} of the experiment {bundle.experiment.name!r}"
    yield ""
    yield "Tuned on a small model, for a large one:"
    for key in sizes:
        yield f"  {key}: {_value(base.get(key))} -> {_value(target[key])}"
    yield f"  in both: {', '.join(same)}"
    yield (f"  rules: {bundle.parametrization.name} (version {bundle.parametrization.version}), "
           f"m = 1 at width {bundle.base.base_width}")  # fmt: skip
    yield f"  {bundle.batch_tokens:,} tokens per step, {bundle.horizon_tokens:,} tokens in all"
    yield f"  text {bundle.data.fingerprint[:12]}, vocabulary {bundle.data.vocab_size:,}"
    yield f"  with {', '.join(f'{name} {text}' for name, text in bundle.versions.items())}"


def _hyperparameters(bundle: Bundle) -> Grid:
    grid = _grid("Base hyperparameters (at the small model's width)")
    for name in ("hyperparameter", "value", "comes from", "what it is"):
        grid.add_column(name, justify="right" if name == "value" else "left")
    for name, field in BaseParams.model_fields.items():
        source = bundle.provenance.get(name)
        origin = "fixed" if source else "?"
        if source and source.source == "study":
            origin = f"{source.study}, trial {', '.join(map(str, source.trials))}"
        value = getattr(bundle.base_hyperparameters, name)
        grid.add_row(name, f"{value:.6g}", _clean(origin), field.description)
    return grid


def _evidence(bundle: Bundle) -> Iterator[str]:
    evidence = bundle.evidence
    if evidence is None:
        yield "Evidence: none."
        return
    study, winner = evidence.study, evidence.study.winner
    yield "Evidence"
    if winner is not None:
        mean, error = mean_and_error(list(winner.losses.values()))
        spread = "" if error is None else f" ± {error:.4f}"
        place = f"trial {winner.number} of {len(study.trials)} has the lowest held-out loss"
        yield f"  sweep: {place}, {mean:.4f}{spread} nats over {len(study.seeds)} seeds"
    yield f"  coordinate check: {_coord(evidence.coord_check)}"
    yield f"  transfer check: {_transfer(evidence.transfer_check)}"
    if evidence.transfer_check is not None:
        for best in evidence.transfer_check.optima:
            place = "none within the grid" if best.log2_lr is None else f"2^{best.log2_lr:.2f}"
            yield f"    width {best.width}: best learning rate {place}"


def _coord(check: CoordCheck | None) -> str:
    if check is None:
        return "missing"
    bad = [f"{line.kind} {line.name}" for line in check.slopes if line.verdict != "PASS"]
    return f"{check.verdict}, {len(check.slopes)} slopes" + (
        f"; see {', '.join(bad)}" if bad else ""
    )


def _transfer(check: TransferCheck | None) -> str:
    if check is None:
        return "missing"
    return (
        f"{check.verdict}; the best learning rate moves by "
        f"{_interval(check.drift, check.drift_low, check.drift_high)} octaves; carrying it over "
        f"costs {_interval(check.regret, check.regret_low, check.regret_high)} nats"
    )


def _interval(value: float | None, low: float | None, high: float | None) -> str:
    ends = ["?" if end is None else f"{end:.4g}" for end in (value, low, high)]
    return f"{ends[0]} [{ends[1]}, {ends[2]}]"


def _rows(bundle: Bundle) -> Grid:
    grid = _grid("Table (m: width ratio, r: depth ratio, both to the base)")
    for name in ("parameters", "role", "shape", "m", "r", "init std", "multiplier"):
        grid.add_column(name, justify="left" if name in ("parameters", "role") else "right")
    for row in bundle.table.rows:
        numbers = (row.width_ratio, row.depth_ratio, row.init_std, row.forward_multiplier)
        shape = " × ".join(map(str, row.shape))
        grid.add_row(_clean(row.pattern), row.role, shape, *(f"{x:.4g}" for x in numbers))
    return grid


def _optimizers(bundle: Bundle) -> Grid:
    softmax = bundle.table.multipliers.attention
    grid = _grid(f"Optimizers (peak lr, weight decay wd); softmax scale {softmax:.4g}")
    for name in ("parameters", "AdamW lr", "eps", "wd", "lr·wd", "Muon lr", "wd", "lr·wd", "scale"):
        grid.add_column(name, justify="left" if name == "parameters" else "right")
    for row in bundle.table.rows:
        adamw, muon = row.optimizers.adamw, row.optimizers.muon
        numbers = [adamw.lr, adamw.eps, adamw.weight_decay, adamw.lr_times_weight_decay]
        if muon is not None:
            numbers += [muon.lr, muon.weight_decay, muon.lr_times_weight_decay, muon.scale]
        grid.add_row(_clean(row.pattern), *(f"{x:.4g}" for x in numbers))
    return grid


def _grid(title: str) -> Grid:
    return Grid(title=title, title_justify="left", box=SIMPLE_HEAD, title_style="", pad_edge=False)


def _value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
