"""Reading what a user wrote into a pydantic model, with errors that say what to do."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from mutransfer.errors import UserError

Model = TypeVar("Model", bound=BaseModel)

MAX_INTEGER = 2**53 - 1
"""The largest integer that RFC 8785, by which everything is hashed, can write (I-JSON)."""

_MAX_BYTES = 2**20


def parse(schema: type[Model], data: object, where: str) -> Model:
    """`data` as a `schema`; the first thing wrong with it becomes one line.

    Args:
        schema: The pydantic model.
        data: What JSON or TOML gave.
        where: The file, for the message.

    Raises:
        UserError: A field is missing, unknown (the nearest known one is named), of the wrong
            type or out of its range.
    """
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise _explain(schema, error, where) from None


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file of at most 1 MiB.

    Raises:
        UserError: The file is missing, too large or not TOML.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UserError("file is too large", where=str(path), expected="at most 1 MiB")
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"not a readable TOML file ({error})", where=str(path)) from error


def find_shipped(name: str, folder: Path, kind: str) -> Path:
    """The file `name`: a path if there is one, else the shipped file of that name.

    Raises:
        UserError: Neither exists.
    """
    if Path(name).suffix == ".toml" or "/" in name:
        if not Path(name).is_file():
            raise UserError(f"no such {kind} file", where=name, cure="Check the path.")
        return Path(name)
    shipped = {path.stem: path for path in sorted(folder.glob("*.toml"))}
    if name not in shipped:
        raise UserError(
            f"no shipped {kind} has this name",
            got=name,
            expected=f"a path to a .toml file, or one of {', '.join(shipped)}",
        )
    return shipped[name]


def _explain(schema: type[BaseModel], error: ValidationError, where: str) -> UserError:
    details = error.errors(include_url=False)
    # an unknown key explains more than the missing one that it was meant to be
    first = next((d for d in details if d["type"] == "extra_forbidden"), details[0])
    path, holder = _trace(schema, first["loc"])
    location = ".".join(path)
    message = first["msg"].removeprefix("Value error, ")
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return UserError(cause.what, where=f"{where}: {location or cause.where}", got=cause.got,
                         expected=cause.expected, cure=cause.cure)  # fmt: skip
    if first["type"] == "extra_forbidden":
        known = sorted(field.alias or name for name, field in holder.model_fields.items())
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.0)
        return UserError(
            f"unknown field {location!r}",
            where=where,
            expected=f"{near[0]!r} perhaps; known here: {', '.join(known)}" if near else None,
        )
    if first["type"] == "missing":
        return UserError(f"field {location!r} is missing", where=where)
    got = None if isinstance(first["input"], (dict, list)) else repr(first["input"])
    return UserError(message, where=f"{where}: {location}" if location else where, got=got)


def _trace(
    schema: type[BaseModel], location: tuple[int | str, ...]
) -> tuple[list[str], type[BaseModel]]:
    """A location as the file has it, and the last model on the way there.

    Where a field may be one of several things, pydantic puts in which of them it tried.
    """
    path: list[str] = []
    current: Any = schema
    holder = schema
    for part in location:
        choices = _choices(current)
        if len(choices) > 1:
            current = next((c for c in choices if _tagged(c, part)), None)
        elif choices and _is_model(choices[0]):
            holder = choices[0]
            field = holder.model_fields.get(str(part))
            current = field.annotation if field else None
            path.append(str(part))
        else:  # a mapping's values or a sequence's items
            inner = get_args(choices[0]) if choices else ()
            current = inner[1 if get_origin(choices[0]) is dict else 0] if inner else None
            path.append(str(part))
    last = _choices(current)
    return path, last[0] if len(last) == 1 and _is_model(last[0]) else holder


def _choices(annotation: Any) -> list[Any]:
    """What a value may be: the members of a union without `None`, or the annotation itself."""
    if get_origin(annotation) is Annotated:
        return _choices(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [c for member in get_args(annotation) for c in _choices(member)]
    return [] if annotation in (None, type(None)) else [annotation]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _tagged(annotation: Any, tag: object) -> bool:
    """Whether a discriminated union calls this model `tag`."""
    return _is_model(annotation) and any(
        field.default == tag for field in annotation.model_fields.values()
    )
