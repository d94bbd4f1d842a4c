"""Base shapes of the `mup` package (`.bsh`), read as a base model for `parametrize`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from mutransfer.errors import UserError

_MAX_BYTES = 16 * 2**20


class BaseShapes(nn.Module):
    """A base model that has names and shapes and nothing else, on the meta device."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self._named = {
            name: nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
            for name, shape in shapes.items()
        }

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As of the model that the file was written for."""
        yield from self._named.items()


def read_base_shapes(path: Path | str) -> dict[str, tuple[int | None, ...]]:
    """The content of a `.bsh` file: the base's dimensions by name, `None` where they are finite.

    Raises:
        UserError: The file is missing, too large, or not what `mup.save_base_shapes` writes.
    """
    import yaml

    path, where = Path(path), str(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UserError("file is too large", where=where, expected="at most 16 MiB")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError, yaml.YAMLError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"not a readable file of base shapes ({error})", where=where) from error
    if not isinstance(content, dict) or not content:
        raise UserError("not a file of base shapes", where=where, got=type(content).__name__,
                        expected="parameter names with their base dimensions")  # fmt: skip
    for name, dims in content.items():
        if not isinstance(name, str) or not isinstance(dims, list) or not all(
            dim is None or (type(dim) is int and dim >= 1) for dim in dims
        ):  # fmt: skip
            raise UserError("not base dimensions", where=f"{where}: {name}", got=dims,
                            expected="a list of whole numbers, null for a finite one")  # fmt: skip
    return {name: tuple(dims) for name, dims in content.items()}


def base_from_shapes(path: Path | str, model: nn.Module) -> BaseShapes:
    """The base model of a `.bsh` file, for `mutransfer.apply.parametrize(model, base, …)`.

    A file that was written from a (Distributed)DataParallel model, every name in it beginning
    with `module.`, fits the model inside.

    Args:
        path: The file.
        model: The model to parametrize; its dimensions stand where the file says "finite".

    Raises:
        UserError: The file cannot be read, or is of a model with other parameters.
    """
    found = read_base_shapes(path)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    wrapped = "module."
    if all(n.startswith(wrapped) for n in found) and not all(n.startswith(wrapped) for n in shapes):
        found = {name.removeprefix(wrapped): dims for name, dims in found.items()}
    if odd := sorted(found.keys() ^ shapes.keys()):
        raise UserError("the base shapes are of another model", where=f"{path}: {odd[0]}",
                        got=f"{len(odd)} names in only one of them")  # fmt: skip
    base: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if len(found[name]) != len(shape):
            raise UserError("the base shapes are of another model", where=f"{path}: {name}",
                            got=found[name], expected=f"{len(shape)} dimensions")  # fmt: skip
        base[name] = tuple(
            own if dim is None else dim for dim, own in zip(found[name], shape, strict=True)
        )
    return BaseShapes(base)
