"""The `mutransfer` command: mounts each package's commands late, turns errors into exit codes.

Listing the commands imports neither torch nor optuna: the table below holds their names and
one-line helps, and a command's module is imported when that command is called.

Exit codes: 0 PASS or WARN, 1 FAIL, 2 user error, 130 interrupted.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module, metadata
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mutransfer.errors import UserError
from mutransfer.house import check_siblings

_SIBLINGS = ("proxies", "sweeps", "full_scale")


@dataclass(frozen=True, kw_only=True)
class Late:
    """A command that is imported when it is called.

    Attributes:
        module: Where it lives.
        attribute: A plain function with typer annotations, or a `typer.Typer`.
        help: The line that `mutransfer --help` shows.
        siblings: The packages beside `mutransfer` that the module imports.
    """

    module: str
    attribute: str
    help: str
    siblings: tuple[str, ...] = ()

    def load(self, name: str) -> Any:
        """Imports the command; returns it as typer's own command object called `name`.

        Raises:
            UserError: Another distribution sits on the name of one of our packages.
        """
        if self.siblings:
            check_siblings(self.siblings)
        target = getattr(import_module(self.module), self.attribute)
        if not isinstance(target, typer.Typer):
            function, target = target, typer.Typer(add_completion=False)
            target.command(name)(function)
        target.rich_markup_mode = None  # brackets in a docstring are brackets
        command = typer.main.get_command(target)
        command.name = name
        _shorten_help(command)
        return command


def _sweeps(attribute: str, text: str) -> Late:
    return Late(module="sweeps.cli", attribute=attribute, help=text, siblings=("proxies", "sweeps"))


def _interchange(attribute: str, text: str) -> Late:
    return Late(module="full_scale.interchange_cli", attribute=attribute, help=text,
                siblings=("proxies", "full_scale"))  # fmt: skip


COMMANDS = {
    "quickstart": Late(
        module="mutransfer.quickstart",
        attribute="quickstart",
        help="The whole flow at a scale that fits a laptop CPU.",
        siblings=_SIBLINGS,
    ),
    "init": _sweeps("init", "Write a commented experiment file."),
    "coord-check": _sweeps("coord_check", "Check that activations keep their size over widths."),
    "sweep": _sweeps("sweep", "Search the hyperparameters on the small proxy."),
    "sweep-report": _sweeps("sweep_report", "Say how sure a sweep is of its optimum."),
    "transfer-check": _sweeps("transfer_check", "Check that the best learning rate stays put."),
    "export": _sweeps("export", "Write the hyperparameter bundle, with its evidence."),
    "bundle": Late(
        module="mutransfer.bundle_cli",
        attribute="app",
        help="Show, validate and compare bundles; print their schema.",
    ),
    "preflight": Late(
        module="full_scale.cli",
        attribute="preflight",
        help="Check the target's first steps before it is paid.",
        siblings=("proxies", "full_scale"),
    ),
    "train": Late(
        module="full_scale.cli",
        attribute="train",
        help="Train the full-size model from a bundle and a recipe.",
        siblings=("proxies", "full_scale"),
    ),
    "export-hf": _interchange("export_hf", "Write a checkpoint as stock transformers loads it."),
    "import-hf": _interchange("import_hf", "Take a Granite or Llama folder as a starting point."),
    "export-megatron": _interchange("export_megatron", "Write weights under Megatron's names."),
    "import-megatron": _interchange("import_megatron", "Take Megatron's as a starting point."),
    "plan": Late(
        module="mutransfer.cli",
        attribute="plan",
        help="Say what a run will take, before anything is spent.",
        siblings=_SIBLINGS,
    ),
    "watch": Late(
        module="full_scale.cli",
        attribute="watch",
        help="Show the curves of a run in the terminal.",
        siblings=("proxies", "full_scale"),
    ),
}


def plan(
    experiment: Annotated[
        str | None, typer.Argument(help="An experiment: a .toml file or a shipped one's name.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="A recipe: a .toml file or a shipped one's name.")
    ] = None,
    bundle: Annotated[str | None, typer.Option(help="The bundle that the recipe takes.")] = None,
    gpus: Annotated[
        int, typer.Option(min=0, max=100000, help="How many; 0: this processor, timed.")
    ] = 0,
    gpu: Annotated[str, typer.Option(help="Their kind.")] = "h100",
    mfu: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of the GPUs' peak that is used.")
    ] = 0.4,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0.0, help="Of one device, in any currency.")
    ] = None,
) -> None:
    """Say what an experiment or a run takes: tokens, FLOPs, memory, hours and cost."""
    from pathlib import Path

    if (experiment is None) == (recipe is None):
        raise UserError("name an experiment or a --recipe", where="mutransfer plan",
                        got="neither" if recipe is None else "both")  # fmt: skip
    if recipe is not None:
        from full_scale.cli import plan as plan_recipe

        plan_recipe(recipe, Path(bundle) if bundle else None, gpus, gpu, mfu, price_per_hour)
        return
    from mutransfer.hardware import get_device
    from sweeps.experiment import load_experiment
    from sweeps.plan import plan_experiment, table

    planned = plan_experiment(load_experiment(str(experiment)), gpus=gpus, mfu=mfu,
                              device=get_device(gpu) if gpus else None)  # fmt: skip
    print("\n".join(table(planned, price_per_hour)))


class _LateGroup(TyperGroup):
    """Lists placeholders; puts the imported command in place of the one that is called."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            print("mutransfer: interrupted", file=sys.stderr)
            raise typer.Exit(130) from error

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name = args[0]
        if name in COMMANDS:
            return name, COMMANDS[name].load(name), args[1:]
        if not name.startswith("-"):
            near = get_close_matches(name, COMMANDS, n=1, cutoff=0.4)
            expected = near[0] if near else f"one of {', '.join(COMMANDS)}"
            raise UserError("no such command", where="mutransfer", got=name, expected=expected,
                            cure="See 'mutransfer --help'.")  # fmt: skip
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_LateGroup,
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        python = ".".join(str(part) for part in sys.version_info[:3])
        print(f"mutransfer {_version('mutransfer')} (Python {python}, torch {_version('torch')})")
        raise typer.Exit


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


@app.callback(epilog="Exit codes: 0 PASS or WARN, 1 FAIL, 2 user error.")
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the versions.", callback=_print_version,
                     is_eager=True),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; goes anywhere.")
    ] = False,
) -> None:  # fmt: skip
    """Tune a language model while it is small, train it when it is large."""


def _placeholder() -> None:
    raise AssertionError("the command itself is imported before it is called")


for _name, _command in COMMANDS.items():
    app.command(_name, help=_command.help)(_placeholder)


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Args:
        args: The arguments after the program's name, or `None` for the process's own.
    """
    words, debug = _take_debug(sys.argv[1:] if args is None else list(args))
    try:
        result = typer.main.get_command(app).main(
            words, prog_name="mutransfer", standalone_mode=False
        )
        return result if isinstance(result, int) else 0
    except UserError as error:
        return _fail(str(error), error, debug)
    except typer.TyperException as error:
        context, message = getattr(error, "ctx", None), error.format_message()
        if message.startswith("Usage: "):  # a group without a command: the message is its help
            print(message, file=sys.stderr)
            return 2
        path = context.command_path if context else "mutransfer"
        return _fail(f"{path}: {message.rstrip('.')}. See '{path} --help'.", error, debug)
    except ModuleNotFoundError as error:
        root = (error.name or "").partition(".")[0]
        if root in {"", "mutransfer", *_SIBLINGS}:
            raise
        return _fail(
            f"the Python package {root!r} is not installed. Run 'make setup' in the checkout, "
            "or install mutransfer again with pip.", error, debug)  # fmt: skip
    except OSError as error:  # no such folder, no right to write, no room
        return _fail(_refusal(error), error, debug)
    except typer.Abort:  # end of input at a prompt
        return 130


def _take_debug(words: list[str]) -> tuple[list[str], bool]:
    """Takes `--debug` out of the arguments, wherever it stands before a `--`."""
    end = words.index("--") if "--" in words else len(words)
    rest = [word for word in words[:end] if word != "--debug"]
    return rest + words[end:], len(rest) < end


def _refusal(error: OSError) -> str:
    """What the operating system refused, and where."""
    return str(UserError(
        error.strerror or str(error) or type(error).__name__,
        where=None if error.filename is None else str(error.filename),
        cure="Check that it can be read and written, and that the disk has room.",
    ))  # fmt: skip


def _fail(message: str, error: BaseException, debug: bool) -> int:
    """Prints one line (after the traceback, where asked for) and returns the exit code 2."""
    if debug:
        traceback.print_exception(error)
    print("Error:", " ".join(message.split()), file=sys.stderr)
    return 2


def _shorten_help(command: Any) -> None:
    """Cuts a Google docstring's sections off the help text, here and in all sub-commands."""
    if command.help:
        command.help = re.split(r"\n\s*(?:Args|Returns|Raises|Yields):\s*\n", command.help)[0]
    for child in getattr(command, "commands", {}).values():
        _shorten_help(child)
