"""Safetensors files as one mapping from names to tensors, read and written a shard at a time.

A model may be one `model.safetensors`, or shards and the index beside them that Hugging Face's
libraries read. Neither side ever holds more than a shard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mutransfer.errors import UserError
from mutransfer.files import read_json, write_json
from mutransfer.progress import Report, quiet

SHARD_BYTES = 2 * 2**30
"""Bytes of tensors per file, unless one tensor alone has more."""

Shape = tuple[int, ...]
Read = Callable[[str], Tensor]


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """Tensors by name, read when asked for.

    Attributes:
        shapes: Of every tensor.
        read: Name -> the tensor, in memory of its own.
    """

    shapes: Mapping[str, Shape]
    read: Read


def open_tensors(folder: Path) -> Tensors:
    """The tensors of `model.safetensors`, or of the shards that its index lists.

    Raises:
        UserError: There is neither, a shard or a tensor is missing, or a file is none of
            safetensors. Pickles are never read.
    """
    places = _places(folder)
    shapes: dict[str, Shape] = {}
    for path in dict.fromkeys(places.values()) or [folder / "model.safetensors"]:
        for name, shape in _shapes(path).items():
            if places and places.get(name) != path:
                raise UserError("tensor is not where the index says", where=f"{path}: {name}")
            shapes[name] = shape
    if missing := sorted(places.keys() - shapes.keys()):
        raise UserError("tensor of the index is in no shard", where=str(folder), got=missing[0])

    def read(name: str) -> Tensor:
        path = places.get(name, folder / "model.safetensors")
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    return Tensors(shapes=shapes, read=read)


def write_tensors(
    folder: Path,
    shapes: Mapping[str, Shape],
    read: Read,
    dtype: torch.dtype,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Report = quiet,
) -> None:
    """Writes tensors in order, in shards that Hugging Face's libraries read.

    Args:
        folder: Where to; it is not made atomic here.
        shapes: Names and shapes, in the order of the files.
        read: Makes each tensor, in any type; it is converted.
        dtype: What to store.
        shard_bytes: A file's size, unless one tensor alone is larger.
        progress: Is told of each shard.

    Raises:
        UserError: A value is not finite in `dtype`.
    """
    size = torch.empty((), dtype=dtype).element_size()
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        own = prod(shape) * size
        if shards[-1] and filled + own > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += own
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        progress(f"{file}: {len(names)} tensors", (number - 1) / len(shards))
        _write_shard(folder / file, names, shapes, read, dtype)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(prod(shape) for shape in shapes.values()) * size
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def _write_shard(
    path: Path, names: list[str], shapes: Mapping[str, Shape], read: Read, dtype: torch.dtype
) -> None:
    tensors = {}
    for name in names:
        tensor = read(name).to(dtype).contiguous()
        if tuple(tensor.shape) != tuple(shapes[name]):
            raise UserError("tensor has another shape", where=name, got=tuple(tensor.shape),
                            expected=tuple(shapes[name]))  # fmt: skip
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"a value is not finite in {str(dtype).removeprefix('torch.')}",
                where=name,
                cure="Choose a type with more range, or another checkpoint.",
            )
        tensors[name] = tensor
    save_file(tensors, path, metadata={"format": "pt"})


def _places(folder: Path) -> dict[str, Path]:
    """Name -> file, by the index; empty where there is one file alone."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if not (folder / "model.safetensors").is_file():
            pickles = sorted(p.name for p in folder.glob("*") if p.suffix in _PICKLES)
            raise UserError(
                "no safetensors here", where=str(folder), got=", ".join(pickles) or None,
                expected="model.safetensors, or model.safetensors.index.json",
                cure="Pickled weights can hold code and are not read; convert them where you "
                "trust them." if pickles else None,
            )  # fmt: skip
        return {}
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise UserError("not an index of safetensors", where=str(index), expected="a weight_map")
    for file in places.values():
        if not isinstance(file, str) or Path(file).name != file or file.startswith("."):
            raise UserError("the index names a file outside its folder", where=str(index),
                            got=file)  # fmt: skip
    return {name: folder / file for name, file in places.items()}


_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


def _shapes(path: Path) -> dict[str, Shape]:
    """The names and shapes in a file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own type for a bad header
        raise UserError(f"not a safetensors file ({error})", where=str(path)) from error
