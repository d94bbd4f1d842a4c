"""Which bytes of which documents are for training, and which are held out.

A plan names every part by its document's SHA-256 before anything is tokenized. Train and
held-out never share a byte of a document, nor two copies of one document.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mutransfer.errors import UserError
from proxies.data.config import DataConfig
from proxies.data.sources import Document, cut, read_documents

MIN_DOCUMENTS = 20
"""With fewer different documents than this, the tail of each one is held out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Bytes `start` to `stop` of the document at `index` in the stream of its sources.

    `tail` is where the last `heldout_fraction` of the document begins.
    """

    index: int
    file: str
    name: str
    path: Path
    sha256: str
    start: int
    stop: int
    tail: int


@dataclass(frozen=True, kw_only=True)
class Split:
    """One side: parts in the order of the stream of `sources`; `cut`: `max_bytes` ended it."""

    sources: tuple[str, ...]
    parts: tuple[Part, ...]
    cut: bool

    @property
    def n_bytes(self) -> int:
        """Bytes of text."""
        return sum(part.stop - part.start for part in self.parts)

    def texts(self, config: DataConfig) -> Iterator[str]:
        """Reads the parts, one in memory at a time.

        Raises:
            UserError: A document is no longer what it was when the plan was made.
        """
        parts = iter(self.parts)
        part = next(parts, None)
        for index, document in enumerate(_stream(self.sources, config)):
            if part is None:
                return
            if index < part.index:
                continue
            if document.sha256 != part.sha256:
                break
            yield document.text[part.start : part.stop].decode()
            part = next(parts, None)
        if part is not None:
            cure = "Run again when nothing writes to it."
            raise UserError("changed while it was being read", where=part.file, cure=cure)


def plan(config: DataConfig) -> tuple[Split, Split]:
    """Reads every source once and returns the training and the held-out split.

    With `heldout` sources, no document, and so no file, may be on both sides. Without, whole
    documents are held out in the order of a hash of `seed` and their content until the share of
    bytes is met, all copies of a document on one side; with fewer than `MIN_DOCUMENTS` different
    documents, the tail of each is, from a line border where one is near.

    Raises:
        UserError: A source cannot be read, the sides overlap, or one of them is empty.
    """
    train = _scan(config.train, config)
    if config.heldout:
        heldout = _scan(config.heldout, config)
        _refuse_overlap(train, heldout)
        return train, heldout
    # One border for all copies of a document, even where `max_bytes` cuts the last of them.
    borders = {part.sha256: part.tail for part in train.parts}
    if len(borders) >= MIN_DOCUMENTS:
        chosen = _choose(train, config)
        borders = {p.sha256: 0 if p.sha256 in chosen else p.stop for p in train.parts}
    heads = (replace(part, stop=min(part.stop, borders[part.sha256])) for part in train.parts)
    rests = (replace(part, start=borders[part.sha256]) for part in train.parts)
    sides = [tuple(p for p in parts if p.start < p.stop) for parts in (heads, rests)]
    if not all(sides):
        raise UserError(
            "too little text to split", where=", ".join(config.train), got=f"{train.n_bytes} bytes",
            expected="text for training and text to hold out",
            cure="Add text, or name `heldout` sources.",
        )  # fmt: skip
    return replace(train, parts=sides[0]), replace(train, parts=sides[1])


def _stream(sources: tuple[str, ...], config: DataConfig) -> Iterator[Document]:
    return read_documents(sources, text_field=config.text_field, max_bytes=config.max_bytes)


def _scan(sources: tuple[str, ...], config: DataConfig) -> Split:
    """The documents within `max_bytes`, each a part."""
    found: list[Part] = []
    left = config.max_bytes
    for index, document in enumerate(_stream(sources, config)):
        text = document.text if left is None else cut(document.text, left)
        if text:
            found.append(
                Part(
                    index=index, file=document.file, name=document.name, path=document.path,
                    sha256=document.sha256, start=0, stop=len(text),
                    tail=_tail(text, config.heldout_fraction),
                )
            )  # fmt: skip
        left = None if left is None else left - len(text)
        if len(text) < len(document.text) or not document.whole:
            return Split(sources=sources, parts=tuple(found), cut=True)
    return Split(sources=sources, parts=tuple(found), cut=False)


def _tail(text: bytes, fraction: float) -> int:
    """Where the last `fraction` of `text` begins: at a line border within half of it, if any."""
    size = max(1, round(len(text) * fraction))
    border = len(text) - size
    before = text.rfind(b"\n", max(0, border - size // 2), border) + 1
    after = text.find(b"\n", border, border + size // 2) + 1
    return before or after or len(cut(text, border)) or len(text)


def _choose(split: Split, config: DataConfig) -> set[str]:
    """Content hashes whose documents together are nearest to the share of bytes held out."""
    sizes: dict[str, int] = defaultdict(int)
    for part in split.parts:
        sizes[part.sha256] += part.stop
    wanted = config.heldout_fraction * split.n_bytes
    order = {h: hashlib.sha256(f"{config.seed}:{h}".encode()).digest() for h in sizes}
    chosen: set[str] = set()
    for content in sorted(sizes, key=order.__getitem__):
        if sizes[content] / 2 <= wanted:  # taking it comes nearer to what is still wanted
            chosen.add(content)
            wanted -= sizes[content]
    return chosen or {min(sizes, key=lambda content: (sizes[content], order[content]))}


def _refuse_overlap(train: Split, heldout: Split) -> None:
    twins = {part.sha256: part for part in train.parts}
    for part in heldout.parts:
        if twin := twins.get(part.sha256):  # a file in both begins with the same document
            same = twin.path == part.path
            raise UserError(
                "held-out text is also training text", where=part.name,
                got="the file in both" if same else f"a copy of {twin.name}",
                expected="no document in both `train` and `heldout`",
                cure="Take it out of one of them.",
            )  # fmt: skip
