"""The one look at all ids: what it finds, and when it is taken again."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from mutransfer.errors import UserError
from proxies.data import scan as module
from proxies.data.scan import scan


def write(path: Path, ids: list[int]) -> np.memmap:
    np.array(ids, dtype="<i4").tofile(path)
    return np.memmap(path, "<i4", "r")


def test_the_hash_is_that_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 3)
    said: list[str] = []
    tokens = write(tmp_path / "a.bin", [0, 4, 1, 3, 2, 0, 1])
    found = scan(tokens, tmp_path / "a.bin", vocab_size=5, records=tmp_path / "found",
                 say=lambda line, share=None: said.append(line))  # fmt: skip
    assert found == hashlib.sha256((tmp_path / "a.bin").read_bytes()).hexdigest()
    assert [line.rsplit(" ", 1)[1] for line in said] == ["43%", "86%"]


@pytest.mark.parametrize(
    ("ids", "got"),
    [([0, 1, 2, 3, 5], "id 5 at token 4"), ([0, 9, 1, 9], "id 9 at token 1"),
     ([3, 2, 1, -1], "id -1 at token 3"), ([-7, 2, 1, -7], "id -7 at token 0")],
)  # fmt: skip
def test_ids_out_of_the_vocabulary_are_refused_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ids: list[int], got: str
) -> None:
    monkeypatch.setattr(module, "_CHUNK", 2)
    tokens = write(tmp_path / "a.bin", ids)
    for _ in range(2):
        with pytest.raises(UserError, match=rf"outside the vocabulary; got {got};.*0 to 4"):
            scan(tokens, tmp_path / "a.bin", vocab_size=5, records=tmp_path)


def test_a_file_is_looked_at_again_only_where_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Path] = []
    look = module._look

    def counted(tokens: np.ndarray, path: Path, say: object) -> object:
        looks.append(path)
        return look(tokens, path, say)

    monkeypatch.setattr(module, "_look", counted)
    path = tmp_path / "a.bin"
    first = scan(write(path, [1, 2]), path, vocab_size=3, records=tmp_path)
    assert scan(np.memmap(path, "<i4", "r"), path, vocab_size=3, records=tmp_path) == first
    assert len(looks) == 1
    with pytest.raises(UserError, match="id 2 at token 1"):  # another vocabulary, the same look
        scan(np.memmap(path, "<i4", "r"), path, vocab_size=2, records=tmp_path)
    assert len(looks) == 1
    tokens = write(path, [2, 1])
    os.utime(path, ns=(0, 1))
    assert scan(tokens, path, vocab_size=3, records=tmp_path) != first
    assert len(looks) == 2
