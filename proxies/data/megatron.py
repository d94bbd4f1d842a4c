"""Token files in Megatron-LM's indexed format, read and written.

`PREFIX.bin` holds the ids of all sequences one after the other. `PREFIX.idx`, little-endian, holds
the magic bytes, the version (1, uint64), a code for the type of an id (uint8), the number of
sequences and the number of document borders (uint64 each); then the length of each sequence
(int32, in ids), where it begins in the `.bin` (int64, in bytes), and the borders: document d is
the sequences from border d up to border d + 1 (int64).
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mutransfer.errors import UserError
from mutransfer.files import atomic_path

Ids = npt.NDArray[np.integer[Any]]
Numbers = npt.NDArray[np.int64]

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<QBQQ")  # version, type, sequences, borders
_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
_CODES = {"<u2": 8, "<i4": 4}
_UINT16_IDS = 65500  # Megatron stores smaller vocabularies as uint16, others as int32
_CHUNK = 2**22  # sequences looked at together


@dataclass(frozen=True, kw_only=True, eq=False)
class MegatronFile:
    """An opened pair of files.

    Attributes:
        tokens: All ids, shape `(tokens,)`, memory-mapped, read-only.
        starts: Where each document that is not empty begins, in tokens, ascending from 0.
        path: The `.bin`.
    """

    tokens: Ids
    starts: Numbers
    path: Path


def open_megatron(prefix: Path | str) -> MegatronFile:
    """Opens `prefix.bin` and `prefix.idx`; of the `.bin` only the size is looked at.

    Raises:
        UserError: A file is missing, cut short or too long, its ids are no integers, it holds
            none, or lengths, pointers and borders do not agree.
    """
    index, path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    cure = "Name the common prefix of the two files, without .bin or .idx."
    for file in (index, path):
        if not file.is_file():
            raise UserError("no such file", where=str(file), cure=cure)
    try:
        dtype, lengths, pointers, borders = _read_index(index)
        tokens = _check_lengths(index, lengths, pointers, dtype.itemsize)
        starts = _starts(index, pointers, borders, dtype.itemsize, tokens)
        size = path.stat().st_size
        if size != tokens * dtype.itemsize:
            raise UserError(
                "the file is not as long as its index says", where=str(path), got=f"{size} bytes",
                expected=f"{tokens * dtype.itemsize} bytes ({tokens} ids of {dtype.itemsize})",
                cure="It was cut short, or belongs to another .idx; copy both again.",
            )  # fmt: skip
        return MegatronFile(tokens=np.memmap(path, dtype, "r"), starts=starts, path=path)
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror or error})",
                        where=str(error.filename or prefix)) from error  # fmt: skip


def write_megatron(prefix: Path | str, documents: Iterable[Ids], *, vocab_size: int) -> None:
    """Writes each document as one sequence, the `.idx` last; a file that is there is replaced.

    Args:
        prefix: The path without `.bin` and `.idx`.
        documents: Ids of each document, shape `(tokens,)`; taken one at a time.
        vocab_size: All ids are below it; it decides their type as Megatron-LM does.

    Raises:
        UserError: A document is empty, an id is out of the vocabulary, or there is no document.
    """
    index, path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    if not 1 <= vocab_size <= 2**31:
        raise UserError("the ids of this vocabulary do not fit", where="vocab_size", got=vocab_size,
                        expected=f"1 to {2**31}")  # fmt: skip
    dtype = "<u2" if vocab_size < _UINT16_IDS else "<i4"
    lengths = array("i")
    with atomic_path(path) as aside:
        with aside.open("wb") as file:
            for number, document in enumerate(documents):
                where = f"{path}: document {number}"
                ids = np.asarray(document)
                if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu":
                    raise UserError("not a document", where=where,
                                    got=f"{ids.dtype} of shape {ids.shape}",
                                    expected="a row of at least one integer")  # fmt: skip
                if ids.size >= 2**31 or int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
                    raise UserError("an id is out of the vocabulary, or there are too many",
                                    where=where, got=f"ids {ids.min()} to {ids.max()}",
                                    expected=f"fewer than 2^31 ids from 0 to {vocab_size - 1}",
                                    )  # fmt: skip
                file.write(ids.astype(dtype).tobytes())
                lengths.append(ids.size)
        if not lengths:
            raise UserError("there is no document to write", where=str(path))
        index.unlink(missing_ok=True)  # never an old index beside new ids
    sizes = np.asarray(lengths, dtype="<i4")
    pointers = np.zeros(len(sizes), dtype="<i8")
    np.cumsum(sizes[:-1], dtype=np.int64, out=pointers[1:])
    pointers *= np.dtype(dtype).itemsize
    with atomic_path(index) as aside, aside.open("wb") as file:
        file.write(_MAGIC + _HEADER.pack(1, _CODES[dtype], len(sizes), len(sizes) + 1))
        for numbers in (sizes, pointers, np.arange(len(sizes) + 1, dtype="<i8")):
            file.write(numbers.tobytes())


def _read_index(path: Path) -> tuple[np.dtype[Any], npt.NDArray[np.int32], Numbers, Numbers]:
    """The type of an id, and lengths, pointers and borders, memory-mapped."""
    where, size = str(path), path.stat().st_size
    with path.open("rb") as file:
        head = file.read(len(_MAGIC) + _HEADER.size)
    if not head.startswith(_MAGIC):
        raise UserError("not the index of a Megatron token file", where=where, got=head[:9],
                        expected=f"it begins with {_MAGIC!r}")  # fmt: skip
    if len(head) < len(_MAGIC) + _HEADER.size:
        raise UserError("the index is cut short", where=where, got=f"{size} bytes",
                        expected=f"at least {len(_MAGIC) + _HEADER.size}")  # fmt: skip
    version, code, sequences, borders = _HEADER.unpack_from(head, len(_MAGIC))
    if version != 1:
        raise UserError("another version of the index", where=where, got=version, expected=1)
    if code not in _TYPES or _TYPES[code][1] == "f":
        known = ", ".join(f"{c} ({np.dtype(t).name})" for c, t in _TYPES.items() if t[1] != "f")
        raise UserError("not a type of token ids", where=where,
                        got=f"code {code}", expected=f"one of {known}")  # fmt: skip
    if not sequences:
        raise UserError("the source is empty", where=where, got="no sequence")
    wanted = len(head) + 12 * sequences + 8 * borders
    if size != wanted:
        hint = " It may have a mode per sequence, as multimodal data do; that is not read here."
        raise UserError(
            "the index is not as long as its header says", where=where, got=f"{size} bytes",
            expected=f"{wanted} bytes ({sequences} sequences, {borders} document borders)",
            cure="Copy it again." + (hint if size == wanted + sequences else ""),
        )  # fmt: skip
    at = len(head)
    return (
        np.dtype(_TYPES[code]),
        np.memmap(path, "<i4", "r", at, (sequences,)),
        np.memmap(path, "<i8", "r", at + 4 * sequences, (sequences,)),
        np.memmap(path, "<i8", "r", at + 12 * sequences, (borders,)),
    )


def _check_lengths(
    path: Path, lengths: npt.NDArray[np.int32], pointers: Numbers, itemsize: int
) -> int:
    """The number of tokens, once no length is negative and each pointer follows from them."""
    tokens = 0
    for first in range(0, len(lengths), _CHUNK):
        chunk = np.asarray(lengths[first : first + _CHUNK], dtype=np.int64)
        if (chunk < 0).any():
            at = int((chunk < 0).argmax())
            raise UserError("a sequence has a negative length", where=str(path),
                            got=f"{chunk[at]} at sequence {first + at}")  # fmt: skip
        ends = tokens + np.cumsum(chunk)
        wanted = (ends - chunk) * itemsize
        odd = np.asarray(pointers[first : first + _CHUNK]) != wanted
        if odd.any():
            at = int(odd.argmax())
            raise UserError(
                "a pointer does not follow from the lengths", where=str(path),
                got=f"{pointers[first + at]} at sequence {first + at}", expected=int(wanted[at]),
                cure="The index is damaged; write it again.",
            )  # fmt: skip
        tokens = int(ends[-1])
    if not tokens:
        raise UserError("the source is empty", where=str(path),
                        got=f"no token in {len(lengths)} sequences")  # fmt: skip
    return tokens


def _starts(path: Path, pointers: Numbers, borders: Numbers, itemsize: int, tokens: int) -> Numbers:
    """Where the documents begin, in tokens; 8 bytes of memory each."""
    values = np.asarray(borders)
    if (
        len(values) < 2
        or values[0] != 0
        or values[-1] != len(pointers)
        or (values[1:] < values[:-1]).any()
    ):
        raise UserError(
            "the document borders are not those of the sequences", where=str(path),
            got=f"{len(values)} borders {_ends(values)}",
            expected=f"0 to {len(pointers)}, never descending",
            cure="The index is damaged; write it again.",
        )  # fmt: skip
    firsts = values[:-1]
    starts = np.asarray(pointers[firsts[firsts < len(pointers)]], dtype=np.int64) // itemsize
    return np.unique(starts[starts < tokens])


def _ends(values: Numbers) -> str:
    return f"from {values[0]} to {values[-1]}" if len(values) else "(none)"
