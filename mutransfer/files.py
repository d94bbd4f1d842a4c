"""Files that are either whole or absent: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mutransfer.errors import UserError


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is synced and becomes `path`.

    A process that dies in between leaves the old file, or none, and a `.tmp` file that the
    next writer of the same path replaces.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yields an empty folder beside `path`; on success its files are synced and it becomes `path`.

    Raises:
        UserError: `path` is there already.
    """
    path = Path(path)
    if path.exists() or path.is_symlink():
        raise UserError("there is something already", where=str(path), cure="Name another folder.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        for inner in [*temporary.rglob("*"), temporary]:
            sync(inner)
        temporary.chmod(0o777 & ~_umask())
        os.rename(temporary, path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def sync(path: Path) -> None:
    """Flushes one file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path | str, text: str) -> None:
    """Writes UTF-8 text, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: object) -> None:
    """Writes indented JSON, whole or not at all; NaN and infinities are refused (RFC 8259).

    Raises:
        ValueError: `value` holds a NaN or an infinity.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def read_json(path: Path | str, *, max_bytes: int = 64 * 2**20) -> object:
    """Reads strict JSON: no NaN or infinity, no duplicate keys, bounded size.

    Raises:
        UserError: The file is missing, too large, not UTF-8 or not strict JSON.
    """
    path = Path(path)
    where = str(path)
    try:
        if not path.is_file():
            raise UserError("no such file", where=where, cure="Check the path.")
        if (size := path.stat().st_size) > max_bytes:
            raise UserError("file is too large", where=where, got=f"{size} bytes",
                            expected=f"at most {max_bytes}")  # fmt: skip
        return json.loads(
            path.read_text(encoding="utf-8"),
            parse_constant=_refuse_constant,
            parse_float=_finite,
            object_pairs_hook=_unique_keys,
        )
    except UserError:
        raise
    except (OSError, RecursionError, ValueError) as error:
        raise UserError(f"not a readable JSON file ({error})", where=where) from error


def _refuse_constant(literal: str) -> object:
    raise ValueError(f"{literal} is not JSON")


def _finite(literal: str) -> float:
    if math.isinf(value := float(literal)):
        raise ValueError(f"{literal} is too large for a number")
    return value


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(k for k in keys if keys.count(k) > 1)!r}")
    return record
