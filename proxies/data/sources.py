"""Documents out of files, folders, globs and the text that every machine with Python has.

The order of documents is that of the sources, within one source that of the relative paths, and
within one file that of its records: never the order in which a disk lists them.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mutransfer.errors import UserError

# The named corpora: the folders they read (keys of `sysconfig.get_path`) and the suffixes.
CORPORA: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "stdlib": (("stdlib",), (".py",)),
    "site-packages": (("purelib", "platlib"), (".py", ".md", ".rst", ".txt")),
}
_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One document.

    Attributes:
        file: The file it comes from, as the listing of the corpus names it.
        path: The same file on this machine, resolved.
        record: Its line (JSONL) or row (Parquet), from 1; 0 for a whole text file.
        text: UTF-8 without NUL; not empty. The beginning, where the reader had a limit.
        whole: Whether `text` is the whole document.
        sha256: SHA-256 of the whole document.
    """

    file: str
    path: Path
    record: int
    text: bytes
    whole: bool
    sha256: str

    @property
    def name(self) -> str:
        """`file`, or `file:record`."""
        return f"{self.file}:{self.record}" if self.record else self.file


@dataclass(frozen=True, kw_only=True, slots=True)
class _File:
    name: str
    path: Path
    named: bool = False  # by the user, so that a file without text is an error
    builtin: bool = False  # of a named corpus, which is made of the readable files alone


def read_documents(
    sources: tuple[str, ...], *, text_field: str = "text", max_bytes: int | None = None
) -> Iterator[Document]:
    """Yields the documents of `sources`, one in memory at a time.

    In folders and globs, hidden files and empty ones hold no documents; nor do blank records. A
    file that is named must hold text. Named corpora leave out what is not UTF-8 text.

    Args:
        sources: Files, folders, globs, and names of `CORPORA`.
        text_field: Field or column that holds the text in JSONL and Parquet files.
        max_bytes: At most so many bytes are kept of a text file; `None`: all.

    Raises:
        UserError: A source is missing, unreadable, empty, binary, not UTF-8 or lacks the field.
    """
    for source in sources:
        empty = True
        try:
            for file in _expand(source):
                for document in _read(file, text_field, max_bytes):
                    empty = False
                    yield document
        except OSError as error:
            raise UserError(
                f"cannot be read ({error.strerror or error})", where=str(error.filename or source),
                cure="Check the file and its permissions.",
            ) from error  # fmt: skip
        if empty:
            raise UserError("holds no text", where=source, cure="Name a source with text in it.")


def cut(text: bytes, size: int) -> bytes:
    """The first `size` bytes at most of UTF-8 `text`, ended at a character's border."""
    if len(text) <= size:
        return text
    begins = (at for at in range(size, max(size - 4, -1), -1) if text[at] & 0xC0 != 0x80)
    return text[: next(begins, size)]


def _expand(source: str) -> Iterator[_File]:
    """The files of one source, sorted by relative path."""
    if source in CORPORA:
        folders, suffixes = CORPORA[source]
        paths = dict.fromkeys(Path(sysconfig.get_path(folder)).resolve() for folder in folders)
        for root in paths:
            for relative in _walk(root, _EXCLUDED):
                if relative.endswith(suffixes):
                    yield _File(name=f"{source}:{relative}", path=root / relative, builtin=True)
        return
    path = Path(source)
    if path.is_dir():
        for relative in _walk(path, set()):
            yield _File(name=(path / relative).as_posix(), path=path / relative)
    elif path.exists():
        if not path.is_file():
            raise UserError("not a regular file or folder", where=source, cure="Name a file.")
        yield _File(name=path.as_posix(), path=path, named=True)
    elif glob.has_magic(source):
        found = sorted(Path(p).as_posix() for p in glob.glob(source, recursive=True))
        files = [name for name in found if Path(name).is_file()]
        if not files:
            raise UserError("the glob matches no file", where=source, cure="Check the pattern.")
        yield from (_File(name=name, path=Path(name)) for name in files)
    else:
        raise UserError(
            "no such file or folder", where=source,
            expected=f"a file, a folder, a glob, or one of {', '.join(map(repr, CORPORA))}",
            cure=f"Relative paths are taken from {Path.cwd()}.",
        )  # fmt: skip


def _walk(root: Path, excluded: set[str]) -> list[str]:
    """Relative paths of the regular files under `root` that are not hidden, sorted."""
    found = []
    for folder, folders, files in os.walk(root, onerror=_refuse):
        folders[:] = [f for f in folders if f not in excluded and not f.startswith(".")]
        paths = (Path(folder, file) for file in files if not file.startswith("."))
        found += [path.relative_to(root).as_posix() for path in paths if path.is_file()]
    return sorted(found)


def _refuse(error: OSError) -> None:
    raise error


def _read(file: _File, text_field: str, max_bytes: int | None) -> Iterator[Document]:
    """The documents of one file."""
    contents: Iterator[tuple[int, bytes, str, bool]]
    suffix = file.path.suffix.lower()
    if suffix in (".jsonl", ".parquet"):
        records = _jsonl(file.path) if suffix == ".jsonl" else _parquet(file.path, text_field)
        found = _texts(records, file.path, text_field)
        contents = ((n, text, hashlib.sha256(text).hexdigest(), True) for n, text in found)
    else:
        with file.path.open("rb") as stream:
            text = stream.read(-1 if max_bytes is None else max_bytes + 1)
            stream.seek(0)
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        kept = text if max_bytes is None else cut(text, max_bytes)
        contents = iter([(0, kept, sha256, len(kept) == len(text))])
    path, empty = file.path.resolve(), True
    for record, text, sha256, whole in contents:
        if text.strip():
            empty = False
            try:
                _require_text(text, f"{file.path}:{record}" if record else str(file.path))
            except UserError:
                if file.builtin:
                    return
                raise
            yield Document(
                file=file.name, path=path, record=record, text=text, whole=whole, sha256=sha256
            )
    if empty and file.named:
        raise UserError("the file is empty", where=str(file.path), expected="text")


def _require_text(text: bytes, where: str) -> None:
    try:
        text.decode()
        at = text.find(b"\0")
    except UnicodeDecodeError as error:
        at = error.start
    if at >= 0:
        raise UserError(
            "binary, or not UTF-8 text", where=where, got=f"byte 0x{text[at]:02x} at offset {at}",
            expected="UTF-8 text without NUL",
            cure="Convert it, or leave it out, as with the glob 'folder/**/*.txt'.",
        )  # fmt: skip


def _texts(
    records: Iterator[tuple[int, object]], path: Path, text_field: str
) -> Iterator[tuple[int, bytes]]:
    """Number and text of each record."""
    for number, record in records:
        value = record.get(text_field) if isinstance(record, dict) else None
        try:
            if not isinstance(value, str):
                raise TypeError(f"no string in the field {text_field!r}")
            yield number, value.encode()
        except (TypeError, UnicodeEncodeError) as error:
            raise UserError(
                f"no text in the record ({error})", where=f"{path}:{number}", got=record,
                expected=f'{{"{text_field}": "..."}}',
                cure="Set text_field to the field that holds the text.",
            ) from error  # fmt: skip


def _jsonl(path: Path) -> Iterator[tuple[int, object]]:
    """Line number, from 1, and value of each line that is not blank."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{path}:{number}"
                _require_text(line, where)
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(
                        f"not JSON ({error})", where=where, got=line[:60].decode(errors="replace"),
                        expected="one JSON object per line",
                    ) from error  # fmt: skip


def _parquet(path: Path, text_field: str) -> Iterator[tuple[int, object]]:
    """Row number, from 1, and the text column of each row."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        cure = "Run `pip install pyarrow`."
        raise UserError("Parquet files need pyarrow", where=str(path), cure=cure) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if text_field not in file.schema_arrow.names:
                raise UserError(
                    f"the file has no column {text_field!r}", where=str(path),
                    got=f"columns {', '.join(file.schema_arrow.names)}",
                    cure="Set text_field to the column that holds the text.",
                )  # fmt: skip
            batches = file.iter_batches(batch_size=1024, columns=[text_field])
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"not a readable Parquet file ({error})", where=str(path)) from error
