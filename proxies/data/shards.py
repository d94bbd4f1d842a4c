"""The corpus on disk: tokenized once, memory-mapped ever after, known by its fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mutransfer.errors import UserError
from mutransfer.files import read_json, sync, write_json, write_text
from proxies.data.batches import Tokens, require_ids_below
from proxies.data.config import DataConfig
from proxies.data.split import Part, Split, plan
from proxies.data.tokenizer import ByteTokenizer, Tokenizer, read_tokenizer, train_bpe

_SHA256 = Field(pattern="^[0-9a-f]{64}$")


class SourceFile(BaseModel):
    """One file of the listing: what of it is on one side, after the cut and the split."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    side: Literal["train", "heldout"]
    documents: int = Field(ge=1)
    bytes: int = Field(ge=1)
    sha256: str = _SHA256
    """Of its one document; of several, over their own in order. Whole, whatever `bytes` says."""


class _Meta(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    key: str = _SHA256
    fingerprint: str = _SHA256
    tokenizer_fingerprint: str = _SHA256
    separator: int = Field(ge=0)
    train_tokens: int = Field(ge=2)
    heldout_tokens: int = Field(ge=2)
    cut: bool
    config: DataConfig
    sources: tuple[SourceFile, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """A tokenized corpus.

    Attributes:
        train: Ids of the training text, shape `(train_tokens,)`, memory-mapped, read-only; every
            document ends with `separator`.
        heldout: The same for the held-out text, shape `(heldout_tokens,)`.
        train_tokens: Length of `train`.
        heldout_tokens: Length of `heldout`.
        vocab_size: All ids are below it.
        separator: The id that ends a document.
        fingerprint: SHA-256 over the tokenizer and both token streams.
        tokenizer_fingerprint: SHA-256 of the tokenizer.
        folder: Where it lies.
        cut: Whether the sources hold more text than `max_bytes` let in.
        sources: The files, with their content hashes.
        config: What it was made from.
    """

    train: Tokens
    heldout: Tokens
    train_tokens: int
    heldout_tokens: int
    vocab_size: int
    separator: int
    fingerprint: str
    tokenizer_fingerprint: str
    folder: Path
    cut: bool
    sources: tuple[SourceFile, ...]
    config: DataConfig

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that made it, from the corpus' folder."""
        if self.config.tokenizer == "bytes":
            return ByteTokenizer()
        return read_tokenizer(self.folder / "tokenizer.json")


def prepare(config: DataConfig, folder: Path | str) -> Corpus:
    """Tokenizes the sources into `folder/<key>/`, or reuses what is there for the same text.

    The key hashes the config and the content of every source, so the sources are read each time
    but tokenized once. Files are written aside and moved into place, `meta.json` last: without
    it a folder counts for nothing and is written again. Two processes that do so at once write
    the same bytes.

    Args:
        config: The sources, the split and the tokenizer.
        folder: Folder for corpora; made if absent.

    Raises:
        UserError: The text or the tokenizer cannot be used.
    """
    folder = Path(folder)
    tokenizer: Tokenizer | None = ByteTokenizer()
    if config.tokenizer != "bytes":
        tokenizer = None if config.tokenizer == "bpe" else read_tokenizer(config.tokenizer)
    train, heldout = plan(config)
    key = _key(config, train, heldout, tokenizer)
    final = folder / key[:16]
    if not (final / "meta.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{key[:16]}.", dir=folder))
        try:
            _write(aside, config, key, train, heldout, tokenizer)
            _publish(aside, final)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return open_corpus(final)


def open_corpus(folder: Path | str) -> Corpus:
    """Opens a corpus that `prepare` wrote: the folder with `meta.json` in it.

    Raises:
        UserError: It is not whole: a file is missing, cut short or of another schema.
    """
    folder = Path(folder)
    path = folder / "meta.json"
    cure = f"Delete {folder} and run again."
    content = read_json(path)
    try:
        meta = _Meta.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        what = f"not the record of a corpus ({'.'.join(map(str, first['loc']))}: {first['msg']})"
        raise UserError(what, where=str(path), cure=cure) from error
    dtype = np.dtype(meta.config.dtype)
    for name, tokens in (("train", meta.train_tokens), ("heldout", meta.heldout_tokens)):
        shard = folder / f"{name}.bin"
        size = shard.stat().st_size if shard.is_file() else 0
        if size != tokens * dtype.itemsize:
            raise UserError(
                "the shard is not whole", where=str(shard), got=f"{size} bytes",
                expected=f"{tokens * dtype.itemsize} bytes ({tokens} tokens)", cure=cure,
            )  # fmt: skip
    return Corpus(
        train=np.memmap(folder / "train.bin", dtype=dtype, mode="r"),
        heldout=np.memmap(folder / "heldout.bin", dtype=dtype, mode="r"),
        vocab_size=meta.config.vocab_size,
        folder=folder,
        train_tokens=meta.train_tokens,
        heldout_tokens=meta.heldout_tokens,
        separator=meta.separator,
        fingerprint=meta.fingerprint,
        tokenizer_fingerprint=meta.tokenizer_fingerprint,
        cut=meta.cut,
        sources=meta.sources,
        config=meta.config,
    )


def _key(config: DataConfig, train: Split, heldout: Split, tokenizer: Tokenizer | None) -> str:
    """SHA-256 over all that decides the tokens; a `tokenizer` to be trained is `None`."""
    known = tokenizer.fingerprint if tokenizer else f"bpe {metadata.version('tokenizers')}"
    digest = hashlib.sha256(f"1 {known} {config.model_dump_json()}\n".encode())
    for name, split in (("train", train), ("heldout", heldout)):
        digest.update(f"{name}\n".encode())
        for part in split.parts:
            digest.update(f"{part.file} {part.sha256} {part.start} {part.stop}\n".encode())
    return digest.hexdigest()


def _write(
    folder: Path,
    config: DataConfig,
    key: str,
    train: Split,
    heldout: Split,
    tokenizer: Tokenizer | None,
) -> None:
    """Writes all files of a corpus into `folder`."""
    tokenizer = tokenizer or train_bpe(train.texts(config), config.vocab_size)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            "vocab_size is smaller than the tokenizer's", where=config.tokenizer,
            got=config.vocab_size, expected=f"at least {tokenizer.vocab_size}",
            cure=f"Set vocab_size = {tokenizer.vocab_size}.",
        )  # fmt: skip
    train_tokens, train_sha256 = _write_shard(
        folder / "train.bin", train.texts(config), tokenizer, config
    )
    heldout_tokens, heldout_sha256 = _write_shard(
        folder / "heldout.bin", heldout.texts(config), tokenizer, config
    )
    fingerprint = f"{tokenizer.fingerprint}\n{train_sha256}\n{heldout_sha256}"
    meta = _Meta(
        key=key,
        fingerprint=hashlib.sha256(fingerprint.encode()).hexdigest(),
        tokenizer_fingerprint=tokenizer.fingerprint,
        separator=tokenizer.separator,
        train_tokens=train_tokens,
        heldout_tokens=heldout_tokens,
        cut=train.cut or heldout.cut,
        config=config,
        sources=(*_listing(train, "train"), *_listing(heldout, "heldout")),
    )
    if tokenizer.json is not None:
        write_text(folder / "tokenizer.json", tokenizer.json)
    write_json(folder / "meta.json", meta.model_dump(mode="json"))


def _write_shard(
    path: Path, texts: Iterable[str], tokenizer: Tokenizer, config: DataConfig
) -> tuple[int, str]:
    """Writes ids, a separator after each text; returns their number and their SHA-256."""
    digest, tokens = hashlib.sha256(), 0
    with path.open("wb") as shard:
        for text in texts:
            ids = np.append(tokenizer.encode(text), np.uint32(tokenizer.separator))
            require_ids_below(ids, config.vocab_size, str(path))
            content = ids.astype(config.dtype).tobytes()
            digest.update(content)
            shard.write(content)
            tokens += len(ids)
    sync(path)
    return tokens, digest.hexdigest()


def _listing(split: Split, side: Literal["train", "heldout"]) -> Iterator[SourceFile]:
    """One record per file, in the order of the sources."""
    files: dict[str, list[Part]] = {}
    for part in split.parts:
        files.setdefault(part.file, []).append(part)
    for file, parts in files.items():
        several = hashlib.sha256("\n".join(part.sha256 for part in parts).encode()).hexdigest()
        yield SourceFile(
            file=file,
            side=side,
            documents=len(parts),
            bytes=sum(part.stop - part.start for part in parts),
            sha256=parts[0].sha256 if len(parts) == 1 else several,
        )


def _publish(aside: Path, final: Path) -> None:
    """Moves the files into `final`, `meta.json` last."""
    final.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "train.bin", "heldout.bin", "meta.json"):
        if (aside / name).exists():
            os.replace(aside / name, final / name)
            sync(final)
    sync(final.parent)
