"""Batches as a pure function of (tokens, seed, position): any step without the steps before."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mutransfer.errors import UserError

Tokens = npt.NDArray[np.unsignedinteger[Any]]
Batch = npt.NDArray[np.int64]

_CHUNK = 2**24  # tokens looked at together


class Batches:
    """An endless stream of sequences, shuffled anew in every epoch.

    The text is cut into `n_windows` windows of `seq_len` tokens that do not overlap, each with
    the token after it as the last target. Epoch e is the permutation of the windows that sorts
    raw Philox words seeded by (seed, e). The position in the stream is a number of sequences,
    so it stays true where the batch size changes.

    Args:
        tokens: Ids, shape `(tokens,)`; may be memory-mapped.
        seq_len: Tokens per sequence.
        batch_size: Sequences per batch of `at`.
        seed: Of the order; at least 0.
        vocab_size: Where given, all ids must be below it.

    Raises:
        UserError: The text is shorter than one batch, or an id is out of the vocabulary.
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        vocab_size: int | None = None,
    ) -> None:
        if seed < 0:
            raise UserError("the seed is negative", where="seed", got=seed, expected="at least 0")
        self.n_windows = _count_windows(tokens, seq_len, batch_size, "training text")
        if vocab_size is not None:
            require_ids_below(tokens, vocab_size, "training text")
        self.tokens, self.seq_len, self.batch_size, self.seed = tokens, seq_len, batch_size, seed
        self._orders: dict[int, npt.NDArray[np.int64]] = {}

    def at(self, step: int) -> Batch:
        """The batch of `step`, from 0, shape `(batch_size, seq_len + 1)`."""
        return self.take(step * self.batch_size, self.batch_size)

    def take(self, position_sequences: int, count: int) -> Batch:
        """`count` sequences from a position in the stream on, shape `(count, seq_len + 1)`.

        Raises:
            ValueError: A number is negative.
        """
        if position_sequences < 0 or count < 0:
            raise ValueError(f"negative position or count: {position_sequences}, {count}")
        epochs, places = np.divmod(
            np.arange(position_sequences, position_sequences + count), self.n_windows
        )
        windows = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            windows[chosen] = self._order(epoch)[places[chosen]]
        return _gather(self.tokens, windows, self.seq_len)

    def epochs(self, n_sequences: int) -> float:
        """Passes over the text that `n_sequences` sequences make."""
        return n_sequences / self.n_windows

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Permutation of the windows in one epoch, shape `(n_windows,)`; the last two are kept."""
        if epoch not in self._orders:
            words = np.random.Philox(np.random.SeedSequence([self.seed, epoch]))
            order = np.argsort(words.random_raw(self.n_windows), kind="stable")
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = order
        return self._orders[epoch]


def heldout_batches(
    tokens: Tokens, seq_len: int, batch_size: int, max_tokens: int | None = None
) -> list[Batch]:
    """The held-out text from its beginning, in windows that do not overlap.

    All batches are full, so that the mean of their losses is the mean over their tokens; the
    windows that do not fill one are not used.

    Args:
        tokens: Ids, shape `(tokens,)`.
        seq_len: Tokens per sequence.
        batch_size: Sequences per batch.
        max_tokens: At most so many tokens are predicted; `None`: as many as there are.

    Returns:
        Arrays of shape `(batch_size, seq_len + 1)`; the same for the same arguments.

    Raises:
        UserError: The text, or `max_tokens`, is shorter than one batch.
    """
    n_batches = _count_windows(tokens, seq_len, batch_size, "held-out text") // batch_size
    if max_tokens is not None:
        if max_tokens < seq_len * batch_size:
            raise UserError(
                "fewer held-out tokens than one batch", where="max_tokens", got=max_tokens,
                expected=f"at least {seq_len * batch_size} (batch_size x seq_len)",
            )  # fmt: skip
        n_batches = min(n_batches, max_tokens // (seq_len * batch_size))
    starts = np.arange(n_batches * batch_size).reshape(n_batches, batch_size)
    return [_gather(tokens, windows, seq_len) for windows in starts]


def require_ids_below(tokens: Tokens, vocab_size: int, where: str) -> None:
    """Raises `UserError` where an id is not below `vocab_size`."""
    for start in range(0, len(tokens), _CHUNK):
        chunk = tokens[start : start + _CHUNK]
        if (largest := int(chunk.max())) >= vocab_size:
            raise UserError(
                "a token id is outside the vocabulary", where=where,
                got=f"id {largest} at token {start + int(chunk.argmax())}",
                expected=f"ids below vocab_size = {vocab_size}",
                cure="Use the vocab_size of the corpus, or tokenize again.",
            )  # fmt: skip


def _count_windows(tokens: Tokens, seq_len: int, batch_size: int, where: str) -> int:
    for name, value in (("seq_len", seq_len), ("batch_size", batch_size)):
        if value < 1:
            raise UserError("not a positive number", where=name, got=value, expected="at least 1")
    n_windows = (len(tokens) - 1) // seq_len
    if n_windows < batch_size:
        raise UserError(
            "too short for one batch", where=where, got=f"{len(tokens)} tokens",
            expected=f"at least {batch_size * seq_len + 1} ({batch_size=} x {seq_len=} + 1)",
            cure="Add text, or make seq_len or batch_size smaller.",
        )  # fmt: skip
    return n_windows


def _gather(tokens: Tokens, windows: npt.NDArray[np.int64], seq_len: int) -> Batch:
    """Windows by number, shape `(n, seq_len + 1)`."""
    places = windows[:, None] * seq_len + np.arange(seq_len + 1)
    return np.asarray(tokens[places], dtype=np.int64)
