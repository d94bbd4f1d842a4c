"""Megatron-LM's token files: round trips, and everything that may be wrong with them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mutransfer.errors import UserError
from proxies.data import open_megatron, write_megatron

DOCUMENTS = [np.array([1, 2, 3]), np.array([4]), np.array([5, 6, 7, 8])]


def raw(
    folder: Path,
    *,
    lengths: list[int],
    pointers: list[int] | None = None,
    borders: list[int] | None = None,
    ids: list[int] | None = None,
    dtype: str = "<i4",
    code: int = 4,
    version: int = 1,
    magic: bytes = b"MMIDIDX\x00\x00",
    tail: bytes = b"",
) -> Path:
    """Writes a pair of files from the format's description, right unless told otherwise."""
    size = np.dtype(dtype).itemsize
    sums = np.cumsum([0, *lengths])[:-1] * size
    starts = sums.tolist() if pointers is None else pointers
    ends = list(range(len(lengths) + 1)) if borders is None else borders
    content = magic + struct.pack("<Q", version) + struct.pack("<B", code)
    content += struct.pack("<QQ", len(lengths), len(ends))
    content += struct.pack(f"<{len(lengths)}i", *lengths)
    content += struct.pack(f"<{len(starts)}q", *starts) + struct.pack(f"<{len(ends)}q", *ends)
    (folder / "raw.idx").write_bytes(content + tail)
    values = list(range(max(0, sum(lengths)))) if ids is None else ids
    (folder / "raw.bin").write_bytes(np.array(values, dtype=dtype).tobytes())
    return folder / "raw"


@pytest.mark.parametrize(
    ("vocab_size", "dtype", "code"),
    [(9, "<u2", 8), (65499, "<u2", 8), (65500, "<i4", 4), (2**31, "<i4", 4)],
)
def test_round_trip(tmp_path: Path, vocab_size: int, dtype: str, code: int) -> None:
    documents = [*DOCUMENTS, np.array([vocab_size - 1, 0], dtype=np.uint32)]
    write_megatron(tmp_path / "a.b", iter(documents), vocab_size=vocab_size)
    file = open_megatron(tmp_path / "a.b")
    assert file.tokens.dtype == np.dtype(dtype)
    assert file.tokens.tolist() == np.concatenate(documents).tolist()
    assert file.starts.tolist() == [0, 3, 4, 8]
    assert not file.tokens.flags.writeable
    assert (tmp_path / "a.b.idx").read_bytes()[17] == code
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.b.bin", "a.b.idx"]


def test_the_bytes_are_those_of_the_format(tmp_path: Path) -> None:
    write_megatron(tmp_path / "ours", DOCUMENTS, vocab_size=70000)
    theirs = raw(tmp_path, lengths=[3, 1, 4], ids=[1, 2, 3, 4, 5, 6, 7, 8])
    for suffix in (".idx", ".bin"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == Path(f"{theirs}{suffix}").read_bytes()


@pytest.mark.parametrize(
    ("dtype", "code"),
    [("<u1", 1), ("<i1", 2), ("<i2", 3), ("<i4", 4), ("<i8", 5), ("<u2", 8)],
)
def test_every_integer_type_is_read(tmp_path: Path, dtype: str, code: int) -> None:
    file = open_megatron(raw(tmp_path, lengths=[2, 3], dtype=dtype, code=code))
    assert file.tokens.tolist() == [0, 1, 2, 3, 4]
    assert file.starts.tolist() == [0, 2]


def test_documents_of_several_sequences_and_of_none(tmp_path: Path) -> None:
    # document 0: sequences 0 and 1; 1: none; 2: one that is empty; 3: the last two, one empty
    prefix = raw(tmp_path, lengths=[2, 3, 0, 4, 0], borders=[0, 2, 2, 3, 5, 5])
    assert open_megatron(prefix).starts.tolist() == [0, 5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"magic": b"MMIDIDX\x00\x01"}, "not the index of a Megatron"),
        ({"version": 2}, "another version of the index; got 2; expected 1"),
        ({"code": 6, "dtype": "<f8"}, "not a type of token ids; got code 6"),
        ({"code": 7, "dtype": "<f4"}, "not a type of token ids; got code 7"),
        ({"code": 0}, "not a type of token ids; got code 0"),
        ({"code": 9}, "not a type of token ids; got code 9"),
        ({"code": 8}, "does not follow from the lengths; got 8 at sequence 1; expected 4"),
        ({"code": 8, "lengths": [5]}, "not as long as its index says; got 20 bytes; expected 10"),
        ({"lengths": [], "borders": [0]}, "the source is empty; got no sequence"),
        ({"lengths": [0, 0]}, "the source is empty; got no token in 2 sequences"),
        ({"lengths": [6, -1]}, "negative length; got -1 at sequence 1"),
        ({"pointers": [0, 12]}, "does not follow .*; got 12 at sequence 1; expected 8"),
        ({"pointers": [4, 12]}, "does not follow from the lengths; got 4 at sequence 0"),
        ({"pointers": [0, 2**62]}, "does not follow from the lengths"),
        ({"borders": []}, "document borders"),
        ({"borders": [0]}, "document borders"),
        ({"borders": [0, 1]}, "document borders .*; got 2 borders from 0 to 1; expected 0 to 2"),
        ({"borders": [1, 2]}, "document borders"),
        ({"borders": [0, 3]}, "document borders"),
        ({"borders": [0, 2, 1, 2]}, "document borders"),
        ({"borders": [0, -1, 2]}, "document borders"),
        ({"tail": b"\0\0"}, "not as long as its header says"),
        ({"tail": b"\0" * 3}, "not as long as its header says"),
        ({"ids": [1, 2, 3, 4]}, "not as long as its index says; got 16 bytes; expected 20 bytes"),
        ({"ids": [1] * 6}, "not as long as its index says; got 24 bytes"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    prefix = raw(tmp_path, **{"lengths": [2, 3], **change})
    with pytest.raises(UserError, match=message) as error:
        open_megatron(prefix)
    assert "raw." in str(error.value)
    assert "\n" not in str(error.value)


def test_an_index_cut_anywhere_is_refused(tmp_path: Path) -> None:
    prefix = raw(tmp_path, lengths=[2, 3])
    index = tmp_path / "raw.idx"
    content = index.read_bytes()
    for size in range(len(content)):
        index.write_bytes(content[:size])
        with pytest.raises(UserError, match="index"):
            open_megatron(prefix)


def test_a_huge_number_of_sequences_is_refused_by_the_size(tmp_path: Path) -> None:
    prefix = raw(tmp_path, lengths=[2, 3])
    index = tmp_path / "raw.idx"
    content = bytearray(index.read_bytes())
    content[18:26] = struct.pack("<Q", 2**64 - 1)
    index.write_bytes(content)
    with pytest.raises(UserError, match="not as long as its header says"):
        open_megatron(prefix)


@pytest.mark.parametrize("gone", [".idx", ".bin"])
def test_a_missing_file_is_named(tmp_path: Path, gone: str) -> None:
    prefix = raw(tmp_path, lengths=[2])
    Path(f"{prefix}{gone}").unlink()
    with pytest.raises(UserError, match=rf"raw\{gone}: no such file.*without .bin or .idx"):
        open_megatron(prefix)


def writes(*documents: object, vocab_size: int = 9) -> Callable[[Path], None]:
    return lambda prefix: write_megatron(prefix, documents, vocab_size=vocab_size)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (writes(), "no document to write"),
        (writes([1], []), "document 1: not a document"),
        (writes([0.5]), "document 0: not a document; got float64"),
        (writes([[1]]), "document 0: not a document"),
        (writes([8], [1, 9]), "document 1: an id is out of the vocabulary"),
        (writes([0], [-1]), "document 1: an id is out of the vocabulary"),
        (writes([0], vocab_size=0), "do not fit"),
        (writes([0], vocab_size=2**31 + 1), "do not fit"),
    ],
)
def test_what_cannot_be_written_leaves_what_was_there(
    tmp_path: Path, write: Callable[[Path], None], message: str
) -> None:
    write_megatron(tmp_path / "a", DOCUMENTS, vocab_size=9)
    with pytest.raises(UserError, match=message):
        write(tmp_path / "a")
    assert open_megatron(tmp_path / "a").tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.idx"]
