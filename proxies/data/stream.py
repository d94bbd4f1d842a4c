"""One source as an endless stream of tokens, shuffled anew in every epoch, read from anywhere."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mutransfer.errors import UserError

Ids = npt.NDArray[np.integer[Any]]
Numbers = npt.NDArray[np.int64]

BLOCK = 2**20
"""Tokens that keep their order: long against any sequence, short against any large source."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """Tokens with a name.

    Attributes:
        name: What mixtures call it.
        tokens: Ids, shape `(tokens,)`; may be memory-mapped.
        starts: Where its documents begin, ascending from 0.
        fingerprint: SHA-256 that stands for its content.
    """

    name: str
    tokens: Ids
    starts: Numbers
    fingerprint: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Sequences:
    """What the loader hands over.

    Attributes:
        tokens: Ids, shape `(count, seq_len + 1)`: inputs, and the last one's target.
        documents: For each input the number of its document within its sequence, from 0, shape
            `(count, seq_len)`; `None` where borders are not asked for.
    """

    tokens: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int32] | None


class Stream:
    """The tokens of a source, epoch after epoch.

    An epoch is a permutation of the source's blocks of `BLOCK` tokens, the last of which may be
    short: the one that sorts raw Philox words seeded by (seed, name, epoch). A position in the
    stream is a number of tokens and so means the same under any sequence length.

    Args:
        source: The tokens.
        seed: Of the order; at least 0.
        block: Tokens that keep their order.
    """

    def __init__(self, source: Source, *, seed: int, block: int = BLOCK) -> None:
        self.source, self.block = source, block
        self.n_tokens = len(source.tokens)
        self.entropy = [seed, name_number(source.name)]
        self._n_blocks = -(-self.n_tokens // block)
        self._last = self.n_tokens - (self._n_blocks - 1) * block  # tokens of the last block
        self._orders: dict[int, tuple[Numbers, int]] = {}

    def read(self, position: int, tokens: npt.NDArray[np.int64]) -> list[int]:
        """Fills `tokens` from a position on.

        Returns:
            Where in `tokens` a document begins, or what follows is from elsewhere in the source;
            0 is not among them.
        """
        marks: list[int] = []
        filled, end = 0, -1
        while filled < len(tokens):
            start, room = self._locate(position + filled)
            count = min(len(tokens) - filled, room)
            tokens[filled : filled + count] = self.source.tokens[start : start + count]
            first, last = np.searchsorted(self.source.starts, (start, start + count))
            begins = (self.source.starts[first:last] + (filled - start)).tolist()
            if start != end and begins[:1] != [filled]:
                marks.append(filled)
            marks += begins
            filled, end = filled + count, start + count
        return marks[1:]

    def _locate(self, position: int) -> tuple[int, int]:
        """Where in the source a position of the stream is, and the tokens left in its block."""
        epoch, offset = divmod(position, self.n_tokens)
        order, place = self._order(epoch)
        if offset >= place * self.block + self._last:  # beyond the short block
            offset += self.block - self._last
        slot, within = divmod(offset, self.block)
        block = int(order[slot])
        size = self._last if slot == place else self.block
        return block * self.block + within, size - within

    def _order(self, epoch: int) -> tuple[Numbers, int]:
        """The blocks of an epoch in order, and where the short one is; the last two are kept."""
        if epoch not in self._orders:
            order = permutation([*self.entropy, epoch], self._n_blocks)
            place = int((order == self._n_blocks - 1).argmax())
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = order, place
        return self._orders[epoch]


def documents(marks: list[int], out: npt.NDArray[np.int32]) -> None:
    """Numbers the documents of one sequence from 0, given where the later ones begin."""
    out[:] = 0
    inside = [mark for mark in marks if mark < len(out)]
    out[inside] = 1
    np.cumsum(out, out=out)


def document_starts(tokens: Ids, separator: int) -> Numbers:
    """Where documents begin that each end with `separator`."""
    chunk = 2**24
    found = [
        start + 1 + np.flatnonzero(tokens[start : start + chunk] == separator)
        for start in range(0, len(tokens), chunk)
    ]
    starts = np.concatenate([np.zeros(1, dtype=np.int64), *found])
    return starts[starts < len(tokens)]


def document_numbers(tokens: Ids, separator: int) -> npt.NDArray[np.int32]:
    """Numbers the documents in each row from 0; every one but the last ends with `separator`.

    Shapes: `(count, seq_len)` -> `(count, seq_len)`.
    """
    numbers = np.zeros(tokens.shape, dtype=np.int32)
    np.cumsum(tokens[:, :-1] == separator, axis=1, dtype=np.int32, out=numbers[:, 1:])
    return numbers


def require_length(source: Source, seq_len: int) -> None:
    """Raises `UserError` where a source is shorter than one sequence and its last target."""
    if not len(source.tokens):
        raise UserError("the source is empty", where=f"source {source.name!r}", got="no token")
    if len(source.tokens) <= seq_len:
        raise UserError(
            "the source is shorter than one sequence", where=f"source {source.name!r}",
            got=f"{len(source.tokens)} tokens", expected=f"at least {seq_len + 1} (seq_len + 1)",
            cure="Leave it out, or add text to it.",
        )  # fmt: skip


def permutation(entropy: list[int], count: int) -> Numbers:
    """The permutation of `range(count)` that sorts raw Philox words."""
    words = np.random.Philox(np.random.SeedSequence(entropy)).random_raw(count)
    return np.argsort(words, kind="stable")


def name_number(name: str) -> int:
    """A number that stands for a name, so that other sources do not change its order."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
