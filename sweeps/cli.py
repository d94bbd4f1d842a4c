"""The commands around an experiment: init, coord-check, sweep, transfer-check, export."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from mutransfer.errors import UserError
from mutransfer.files import write_text
from mutransfer.progress import Display
from mutransfer.verdict import worst
from sweeps.experiment import load_experiment
from sweeps.pool import PoolConfig, cores
from sweeps.storage import refuse_password
from sweeps.workspace import Workspace

Exp = Annotated[str, typer.Argument(metavar="EXP", help="Experiment file, or a shipped name.")]
Out = Annotated[Path | None, typer.Option(help="Folder in place of runs/<experiment>.")]
Workers = Annotated[
    int, typer.Option(min=0, help="Processes that train; 0 = one per core, or per GPU.")
]
Members = Annotated[
    int | None,
    typer.Option(min=1, help="Proxies that each process trains at once [default: measured]."),
]
Axis = Literal["width", "depth"]  # as in coord_options, which imports torch
Precision = Literal["fp32", "bf16", "fp8"]
Compile = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile", help="torch.compile each shape [default: where it pays]."
    ),
]


def init(
    file: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("experiment.toml"),
) -> None:
    """Writes a commented experiment file.

    Raises:
        UserError: The file exists.
    """
    if file.exists():
        raise UserError("file exists", where=str(file), cure="Name another one.")
    write_text(file, (Path(__file__).parent / "template.toml").read_text(encoding="utf-8"))
    print(f"wrote {file}; next: mutransfer coord-check {file}")


def coord_check(
    exp: Annotated[
        str | None, typer.Argument(metavar="EXP", help="Experiment file, or a shipped name.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder in place of runs/<experiment>; with --model, of the results."),
    ] = None,
    axis: Annotated[Axis, typer.Option(help="What the models differ in.")] = "width",
    late: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="STEPS",
            help="Check after so many steps of a proxy run; 0 = just before its decay.",
        ),
    ] = None,
    precision: Annotated[Precision, typer.Option(help="What the models compute in.")] = "fp32",
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PACKAGE.MODULE:FACTORY",
            help="In place of EXP, a model of your own: (width, seed) -> Trainable.",
        ),
    ] = None,
    widths: Annotated[
        str | None, typer.Option(metavar="W,W,W", help="With --model: such as 64,128,256.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="With --model: per width.")] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="With --model: optimizer steps.")] = None,
) -> int:
    """Checks how activations, logits and updates grow with width; exits 1 on FAIL."""
    if model is not None:
        given = {
            "EXP": exp,
            "--late": late,
            "--precision": precision if precision != "fp32" else None,
        }
        refuse(given, "excluded by --model, whose factory decides this")
        return check_model(model, widths, out, seeds or 3, steps or 8, axis)
    refuse({"--widths": widths, "--seeds": seeds, "--steps": steps},
           "only with --model: an experiment file has its own")  # fmt: skip
    if exp is None:
        raise UserError("nothing to check", where="coord-check",
                        expected="an experiment file, or --model")  # fmt: skip
    from sweeps.coord import run_coord_check
    from sweeps.coord_options import CoordOptions

    workspace = open_workspace(exp, out)
    options = CoordOptions(axis=axis, late=late, precision=precision)
    with timed() as display:
        results = run_coord_check(workspace, options, progress=display)
    own = [
        r for name, r in results.items() if name.split()[0] == workspace.experiment.parametrization
    ]
    for name, result in results.items():
        kind = "" if result in own else " (contrast)"
        print(f"\n{name}{kind}\n{result.summary()}")
    verdict = worst(r.verdict for r in own)
    picture = workspace.folder("coord-check") / f"coord_check{options.suffix}.png"
    print(f"\ncoordinate check{options.title}: {verdict}   -> {picture}")
    return int(verdict == "FAIL")


def check_model(
    model: str, widths: str | None, out: Path | None, seeds: int, steps: int, axis: Axis
) -> int:
    """The coordinate check of a model of the user's own."""
    from sweeps.own_model import check_own_model

    with timed() as display:
        result, folder = check_own_model(
            model, widths, out, seeds=seeds, steps=steps, axis=axis, progress=display
        )
    print(f"\n{model}\n{result.summary()}")
    print(f"\ncoordinate check: {result.verdict}   -> {folder / 'coord_check.png'}")
    return int(result.verdict == "FAIL")


def refuse(options: Mapping[str, object], why: str) -> None:
    """Refuses what does not belong to this call.

    Raises:
        UserError: One of the options was given.
    """
    for name, value in options.items():
        if value is not None:
            raise UserError(why, where=name, got=value, cure=f"Leave out {name}.")


def sweep(
    exp: Exp,
    out: Out = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Trials in all, over every start.")
    ] = None,
    workers: Workers = 0,
    storage: Annotated[
        str | None,
        typer.Option(
            envvar="MUTRANSFER_STORAGE",
            help="URL of a database that many processes may share [default: a file in the run].",
        ),
    ] = None,
    lease: Annotated[
        float,
        typer.Option(
            min=1.0,
            help="With --storage: seconds without a sign of life after which a process is gone.",
        ),
    ] = 60.0,
    members: Members = None,
    compile: Compile = None,
) -> None:
    """Searches the base hyperparameters on the proxy; run it again to go on.

    Raises:
        UserError: There is a password in --storage, which every user of the machine can read.
    """
    from sweeps.sweep import run_sweep

    if storage is not None and storage != os.environ.get("MUTRANSFER_STORAGE"):
        refuse_password(storage)
    quiet_optuna()
    workspace = open_workspace(exp, out)
    pool = pool_config(workers, members, compile)
    with timed() as display:
        params, best = run_sweep(
            workspace, pool, trials=trials, storage=storage, lease=lease, progress=display
        )
    error = "" if best.standard_error is None else f" ± {best.standard_error:.4f}"
    print(f"\nbest: trial {best.number}, held-out loss {best.mean_loss:.4f}{error} nats")
    for name in workspace.experiment.search:
        print(f"  {name:<22}{getattr(params, name):.5g}")
    print(f"-> {workspace.folder('sweep')}/trials.csv")


def sweep_report(
    exp: Exp,
    out: Out = None,
    storage: Annotated[
        str | None,
        typer.Option(
            envvar="MUTRANSFER_STORAGE", help="URL of the study's database, where it has one."
        ),
    ] = None,
) -> None:
    """Says how sure a finished sweep is: the optimum, its interval, and what matters."""
    if storage is not None and storage != os.environ.get("MUTRANSFER_STORAGE"):
        refuse_password(storage)
    from rich.console import Console

    from sweeps.report import run_report, table

    quiet_optuna()
    workspace = open_workspace(exp, out)
    report, surface = run_report(workspace, storage)
    if surface is not None:
        console = Console()
        console.width = max(console.width, 100)  # the table's
        console.print(table(report, surface))
    for note in report["notes"]:
        print(f"note: {note}")
    print(f"-> {workspace.folder('sweep-report')}/sweep_report.json, surface.png, history.png")


def transfer_check(
    exp: Annotated[
        str | None, typer.Argument(metavar="[EXP]", help="Experiment file, or a shipped name.")
    ] = None,
    out: Out = None,
    runs: Annotated[
        Path | None,
        typer.Option(
            "--from", help="CSV of runs to judge in place of EXP: arm,width,lr,seed,loss."
        ),
    ] = None,
    workers: Workers = 0,
    members: Members = None,
    compile: Compile = None,
) -> int:
    """Checks that the best learning rate stays put over widths; exits 1 on FAIL.

    Raises:
        UserError: Both or none of EXP and --from are given.
    """
    from sweeps.transfer import judge_file, run_transfer_check

    if (exp is None) == (runs is None):
        raise UserError("give either an experiment or --from FILE", where="transfer-check",
                        got="both" if exp else "neither")  # fmt: skip
    if runs is not None:
        folder = (out or Path("runs") / runs.stem) / "transfer-check"
        result = judge_file(runs, folder)
    else:
        assert exp is not None
        workspace = open_workspace(exp, out)
        folder = workspace.folder("transfer-check")
        with timed() as display:
            pool = pool_config(workers, members, compile)
            result = run_transfer_check(workspace, pool, progress=display)
    print(f"\n{result.summary()}")
    print(f"-> {folder}/transfer_check.png")
    return int(result.verdict == "FAIL")


def export(exp: Exp, out: Out = None) -> None:
    """Writes the hyperparameter bundle for the experiment's target, with its evidence."""
    from sweeps.export import run_export

    bundle, path = run_export(open_workspace(exp, out))
    evidence = bundle.evidence
    assert evidence is not None
    assert evidence.coord_check is not None
    assert evidence.transfer_check is not None
    print(f"bundle {bundle.sha256[:8]} -> {path}")
    print(f"  coordinate check {evidence.coord_check.verdict}, "
          f"transfer check {evidence.transfer_check.verdict}")  # fmt: skip
    for note in bundle.verify(accept_unverified=True):
        print(f"  note: {note.replace(', accepted unverified', '')}")


def open_workspace(exp: str, out: Path | None) -> Workspace:
    """The workspace of an experiment, with its sizes printed."""
    workspace = Workspace(load_experiment(exp), out)
    e = workspace.experiment
    print(f"experiment {e.name} ({e.sha256[:8]}), {e.parametrization}")
    for what, model in (("proxy", e.base), ("target", e.target)):
        print(f"  {what}: d_model {model.d_model}, {model.n_layers} layers, "
              f"{model.n_nonembedding:,} parameters without embeddings, "
              f"{model.n_parameters:,} in all")  # fmt: skip
    corpus = workspace.corpus
    cut = " (cut at max_bytes)" if corpus.cut else ""
    passes = e.train.horizon_tokens / corpus.train_tokens
    print(f"  text: {corpus.train_tokens:,} tokens{cut}, {corpus.heldout_tokens:,} held out")
    print(f"  a proxy run makes {passes:.2f} passes over it")
    return workspace


def pool_config(workers: int, members: int | None, compile: bool | None) -> PoolConfig:
    """The pool for this machine: a worker per GPU, or without one per core."""
    import torch

    gpus = torch.cuda.device_count()
    return PoolConfig(
        workers=workers or gpus or cores(),
        device="cuda" if gpus else "cpu",
        members=members,
        compile=compile,
    )


def quiet_optuna() -> None:
    """Our own lines say what Optuna's log would."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)


@contextmanager
def timed() -> Iterator[Display]:
    """Shows the progress of the body, and then how long it took, or how to go on.

    SIGTERM ends it as Ctrl-C does.
    """
    started = time.monotonic()
    try:
        with on_sigterm(), Display() as display:
            yield display
    except KeyboardInterrupt:
        print("stopped; all that is finished is kept, and the same command goes on from there")
        raise
    print(f"took {time.monotonic() - started:.0f} s")


@contextmanager
def on_sigterm() -> Iterator[None]:
    """Lets SIGTERM raise KeyboardInterrupt, in the main thread, which alone may have handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
