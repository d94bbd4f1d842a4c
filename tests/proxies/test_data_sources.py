"""Documents: their order, their sources, and the errors of what is no text."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import sysconfig
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from mutransfer.errors import UserError
from proxies.data import read_documents
from proxies.data.sources import cut


def names(*sources: str, **options: object) -> list[str]:
    return [document.name for document in read_documents(sources, **options)]  # type: ignore[arg-type]


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def test_order_is_of_relative_paths_not_of_the_disk(tmp_path: Path) -> None:
    for name in ("z.txt", "b/c.txt", "a.txt", "b/a.md", ".hidden.txt", ".git/config", "empty.txt"):
        write(tmp_path / name, "" if name == "empty.txt" else f"text of {name}")
    expected = [f"{tmp_path}/{name}" for name in ("a.txt", "b/a.md", "b/c.txt", "z.txt")]
    assert names(str(tmp_path)) == expected
    assert names(f"{tmp_path}/**/*.txt") == [expected[0], expected[2], expected[3]]
    assert names(f"{tmp_path}/z.txt", f"{tmp_path}/b") == [expected[3], expected[1], expected[2]]


def test_relative_paths_are_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "here" / "a.txt", "text")
    monkeypatch.chdir(tmp_path)
    assert names("here") == ["here/a.txt"]


def test_jsonl_and_parquet_hold_a_document_per_record(tmp_path: Path) -> None:
    rows = ["first\n", "", "second é"]
    lines = [json.dumps({"text": row, "n": 1}) for row in rows]
    jsonl = write(tmp_path / "a.jsonl", "\n".join([lines[0], "", *lines[1:]]))
    parquet = str(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2, 3], "body": rows}), parquet)
    of_jsonl = list(read_documents((jsonl,)))
    of_parquet = list(read_documents((parquet,), text_field="body"))
    assert [d.text.decode() for d in of_jsonl] == ["first\n", "second é"]
    assert [d.text for d in of_parquet] == [d.text for d in of_jsonl]
    assert [d.record for d in of_jsonl] == [1, 4]
    assert [d.record for d in of_parquet] == [1, 3]
    assert of_jsonl[1].sha256 == hashlib.sha256("second é".encode()).hexdigest()


def test_long_file_is_kept_in_part_and_hashed_in_whole(tmp_path: Path) -> None:
    content = "é" * 100
    [document] = read_documents((write(tmp_path / "a.txt", content),), max_bytes=51)
    assert document.text.decode() == "é" * 25
    assert not document.whole
    assert document.sha256 == hashlib.sha256(content.encode()).hexdigest()
    [document] = read_documents((str(tmp_path / "a.txt"),), max_bytes=200)
    assert document.whole


@pytest.mark.parametrize("character", ["a", "é", "€", "😀"])
def test_cut_is_the_longest_whole_prefix(character: str) -> None:
    text = (character * 5).encode()
    width = len(character.encode())
    for size in range(len(text) + 2):
        assert cut(text, size) == (character * min(5, size // width)).encode()


def test_stdlib_is_sorted_sources_without_tests_and_packages() -> None:
    found = names("stdlib")
    assert found == sorted(found)
    assert "stdlib:json/decoder.py" in found
    assert all(name.endswith(".py") for name in found)
    parts = {part for name in found for part in name.removeprefix("stdlib:").split("/")}
    assert parts.isdisjoint({"site-packages", "dist-packages", "test", "tests"})


def test_site_packages_holds_documentation_and_leaves_out_what_is_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"p/a.py": b"x = 1", "p/R.md": b"# P", "p/b.py": b"\0", "p/c.rst": b"\xff",
             "p/d.so": b"d", "p/e.txt": b"", "p/tests/t.py": b"t"}  # fmt: skip
    for name, content in files.items():
        write(tmp_path / name, content)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    assert names("site-packages") == ["site-packages:p/R.md", "site-packages:p/a.py"]


BAD = {
    "empty": ("a.txt", b" \n", "a.txt: the file is empty"),
    "nul": ("a.txt", b"abc\0d", r"a.txt: .*byte 0x00 at offset 3"),
    "latin1": ("a.txt", "abé".encode("latin-1"), r"a.txt: .*byte 0xe9 at offset 2"),
    "half a character": ("a.txt", "é".encode()[:1], r"a.txt: .*byte 0xc3 at offset 0"),
    "no JSON": ("a.jsonl", b'{"text": "a"}\n{"text"', r"a.jsonl:2: not JSON"),
    "no UTF-8": ("a.jsonl", b'{"text": "a"}\n"\xff"', r"a.jsonl:2: .*byte 0xff at offset 1"),
    "no field": ("a.jsonl", b'{"body": "a"}', r"a.jsonl:1: .*'text'.*body"),
    "no object": ("a.jsonl", b'["text"]', r"a.jsonl:1: .*no string in the field 'text'"),
    "null": ("a.jsonl", b'{"text": null}', r"a.jsonl:1: .*no string in the field 'text'"),
    "NUL": ("a.jsonl", b'{"text": "a\\u0000"}', r"a.jsonl:1: .*byte 0x00 at offset 1"),
    "surrogate": ("a.jsonl", b'{"text": "\\ud800"}', r"a.jsonl:1: no text .*surrogates"),
    "deep": ("a.jsonl", b"[" * 100_000, r"a.jsonl:1: not JSON"),
    "no records": ("a.jsonl", b'\n{"text": ""}\n', "a.jsonl: the file is empty"),
    "no Parquet": ("a.parquet", b"PAR1", "a.parquet: not a readable Parquet file"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD.values(), ids=BAD.keys())
def test_bad_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as caught:
        names(path)
    assert len(str(caught.value).splitlines()) == 1


def test_bad_columns_are_named(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a", None], "n": [1, 2]}), path)
    with pytest.raises(UserError, match=r"no column 'text'; got columns body, n"):
        names(path)
    with pytest.raises(UserError, match=r"a\.parquet:2: .*no string in the field 'body'"):
        names(path, text_field="body")
    with pytest.raises(UserError, match=r"a\.parquet:1: .*no string in the field 'n'"):
        names(path, text_field="n")


def test_absent_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        names(write(tmp_path / "a.parquet", "x"))


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for source, message in {
        "absent.txt": "absent.txt: no such file or folder; expected .*'stdlib'",
        "*.txt": "matches no file",
        "folder": "holds no text",
        "pipe": "not a regular file",
        "n" * 300: "cannot be read",
    }.items():
        with pytest.raises(UserError, match=message):
            names(str(tmp_path / source))


def test_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.txt", "text")

    def refuse(self: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"a\.txt: cannot be read \(Permission denied\)") as caught:
        names(str(tmp_path))
    assert path in str(caught.value)
