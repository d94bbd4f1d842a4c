"""One look at every id of a token file before it is trained on, remembered for the next launch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from mutransfer.errors import UserError
from mutransfer.files import read_json, write_json
from mutransfer.progress import Report, quiet
from mutransfer.schema import parse

_CHUNK = 2**24  # tokens looked at together


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    file: str
    size: int
    mtime_ns: int
    dtype: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    smallest: int
    smallest_at: int
    largest: int
    largest_at: int


def scan(
    tokens: npt.NDArray[np.integer[Any]],
    path: Path,
    *,
    vocab_size: int,
    records: Path,
    say: Report = quiet,
) -> str:
    """The SHA-256 of a token file all of whose ids are in the vocabulary.

    The file is read whole once; what was found is kept in `records`. It holds as long as the
    file has the same path, size and time of change.

    Args:
        tokens: The ids of the file, shape `(tokens,)`.
        path: The file.
        vocab_size: All ids must be from 0 up to below it.
        records: Folder for what was found; made if absent.
        say: Takes the progress.

    Raises:
        UserError: An id is outside the vocabulary.
    """
    status = path.stat()
    known = {"file": str(path.resolve()), "size": status.st_size, "mtime_ns": status.st_mtime_ns,
             "dtype": tokens.dtype.str}  # fmt: skip
    key = hashlib.sha256("\n".join(map(str, known.values())).encode()).hexdigest()
    place = records / f"scan-{key[:16]}.json"
    if place.is_file():
        record = parse(_Record, read_json(place), str(place))
    else:
        record = _Record(**known, **_look(tokens, path, say))
        write_json(place, record.model_dump(mode="json"))
    for value, at in ((record.smallest, record.smallest_at), (record.largest, record.largest_at)):
        if not 0 <= value < vocab_size:
            raise UserError(
                "a token id is outside the vocabulary", where=str(path),
                got=f"id {value} at token {at}",
                expected=f"ids from 0 to {vocab_size - 1} (vocab_size = {vocab_size})",
                cure="Use the vocabulary that the file was made with, or tokenize again.",
            )  # fmt: skip
    return record.sha256


def _look(tokens: npt.NDArray[np.integer[Any]], path: Path, say: Report) -> dict[str, Any]:
    digest = hashlib.sha256()
    small, large = (2**64, 0), (-(2**64), 0)
    for start in range(0, len(tokens), _CHUNK):
        chunk = tokens[start : start + _CHUNK]
        digest.update(np.ascontiguousarray(chunk).data)
        low, high = int(chunk.argmin()), int(chunk.argmax())
        small = min(small, (int(chunk[low]), start + low))
        if int(chunk[high]) > large[0]:
            large = int(chunk[high]), start + high
        if 10 * start // len(tokens) > 10 * max(0, start - _CHUNK) // len(tokens):
            say(f"looking at the ids of {path}: {start / len(tokens):.0%}")
    return {"sha256": digest.hexdigest(), "smallest": small[0], "smallest_at": small[1],
            "largest": large[0], "largest_at": large[1]}  # fmt: skip
