"""The coordinate check of a model of the user's own, by `--model package.module:factory`.

The name is taken from the command line and from nowhere else: no file may name code to import.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module, invalidate_caches
from pathlib import Path
from traceback import extract_tb
from types import ModuleType

from torch import Tensor

from mutransfer.coord_check import CoordCheckResult, Trainable, coord_check
from mutransfer.coord_expect import Axis
from mutransfer.coord_plot import coord_check_figure
from mutransfer.errors import UserError
from mutransfer.files import atomic_path, write_json
from mutransfer.progress import Report, quiet


def check_own_model(
    name: str,
    widths: str | None,
    out: Path | None = None,
    *,
    seeds: int = 3,
    steps: int = 8,
    axis: Axis = "width",
    progress: Report = quiet,
) -> tuple[CoordCheckResult, Path]:
    """Runs the check and leaves `coord_check.csv`, `.json` and `.png`.

    Args:
        name: `package.module:factory`, where factory is (width, seed) -> `Trainable`. The
            current folder comes first on the path that it is imported from.
        widths: As typed, `64,128,256`; depths, where the axis is `depth`.
        out: Where to; `runs/<package.module.factory>/coord-check` by default.
        seeds, steps, axis: As `coord_check` takes them.
        progress: Takes one line per model.

    Returns:
        The result, and the folder.

    Raises:
        UserError: There is no such factory, it fails, or what it returns cannot be checked.
    """
    sizes = parse_widths(widths)
    factory = load_factory(name)
    result = coord_check(factory, sizes, seeds=seeds, steps=steps, axis=axis, progress=progress)
    folder = out or Path("runs") / name.replace(":", ".") / "coord-check"
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "coord_check.csv") as path:
        result.frame.to_csv(path, index=False)
    write_json(folder / "coord_check.json", {**result.to_json(), "model": name})
    with atomic_path(folder / "coord_check.png") as path:
        coord_check_figure(result).savefig(path, format="png", dpi=150)
    return result, folder


def parse_widths(text: str | None) -> list[int]:
    """Widths as typed, `64,128,256`.

    Raises:
        UserError: There are none, or one is not a whole number.
    """
    parts = [part.strip() for part in (text or "").split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise UserError("no list of widths", where="--widths", got=text or "none",
                        expected="whole numbers and commas, such as 64,128,256")  # fmt: skip
    return [int(part) for part in parts]


def load_factory(name: str) -> Callable[[int, int], Trainable]:
    """The factory of that name, with errors inside it told in one line.

    Raises:
        UserError: There is no such module or attribute, it cannot be called, or the module
            cannot be imported.
    """
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        raise UserError("no name of a factory", where="--model", got=name,
                        expected="package.module:factory")  # fmt: skip
    factory = getattr(_import(module_name), attribute, None)
    if factory is None:
        raise UserError("no such attribute", where=f"--model {module_name}", got=attribute)
    if not callable(factory):
        raise UserError("cannot be called", where=f"--model {name}", got=type(factory).__name__,
                        expected="a function (width, seed) -> Trainable")  # fmt: skip

    def build(width: int, seed: int) -> Trainable:
        with _told(f"{name}({width}, {seed})"):
            trainable = factory(width, seed)
        if not isinstance(trainable, Trainable):
            raise UserError("returned no Trainable", where=f"--model {name}",
                            got=type(trainable).__name__,
                            expected="mutransfer.coord_check.Trainable")  # fmt: skip
        plain = trainable.loss

        def loss() -> Tensor:
            with _told(f"loss() of {name}({width}, {seed})"):
                value = plain()
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise UserError("loss() returned no scalar", where=f"--model {name}",
                                got=type(value).__name__,
                                expected="a tensor of one number, in nats")  # fmt: skip
            return value

        return replace(trainable, loss=loss)

    return build


def _import(name: str) -> ModuleType:
    """The module of that name, looked for in the current folder first."""
    here = str(Path.cwd())
    if here not in sys.path[:1]:
        sys.path.insert(0, here)
    invalidate_caches()
    try:
        with _told(f"importing {name}"):
            return import_module(name)
    except UserError as error:
        missing = getattr(error.__cause__, "name", None)
        if isinstance(error.__cause__, ModuleNotFoundError) and f"{name}.".startswith(
            f"{missing}."
        ):
            raise UserError("no such module", where="--model", got=name,
                            cure=f"It is looked for in {here} and among installed ones."
                            ) from error.__cause__  # fmt: skip
        raise


@contextmanager
def _told(doing: str) -> Iterator[None]:
    """Tells any error of the body as one line, with the line of code that it came from."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        frames = extract_tb(error.__traceback__)[1:]
        own = [frame for frame in frames if "site-packages" not in frame.filename]
        place = "".join(f" ({Path(f.filename).name}, line {f.lineno})" for f in own[-1:])
        raise UserError(f"{doing} failed", where="--model",
                        got=f"{type(error).__name__}: {error}{place}",
                        cure="--debug shows the traceback.") from error  # fmt: skip
