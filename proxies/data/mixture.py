"""Weighted mixtures of sources: any batch from its position alone, without those before it.

Three functions in closed form are put together. Which source the i-th sequence of a stretch is
from: the golden-ratio sequence (H. Weyl's, equidistributed), cut at the cumulative weights. How
many of the first n are from each source: a sum of floors, by Euclid's algorithm. Where in its
source's stream a sequence begins: windows that lie end to end, shuffled within an epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from mutransfer.errors import UserError
from proxies.data.stream import (
    BLOCK,
    Numbers,
    Sequences,
    Source,
    Stream,
    documents,
    name_number,
    permutation,
    require_length,
)

TOLERANCE = Fraction(1, 1000)
"""How far the sum of given weights may be from 1."""

GROUP = 2**16
"""Sequences of one source that are shuffled together."""

_MODULUS = 2**64
_STEP = 0x9E3779B97F4A6E57
"""2^64 over the golden ratio, moved by 3.1e-16 of itself to where `_STEP / _MODULUS` has no partial
quotient above 5: counts stay as close to their shares in the 10^12-th sequence as at first."""


def normalize(weights: Mapping[str, float], where: str) -> dict[str, Fraction]:
    """Weights that sum to 1, exactly, sorted by name; taken by the decimals they were written with.

    Raises:
        UserError: There is none, one is not positive and finite, or their sum is more than
            `TOLERANCE` away from 1.
    """
    if not weights:
        raise UserError("the mixture names no source", where=where)
    for name, weight in weights.items():
        if not 0 < weight < float("inf"):
            raise UserError("not a weight", where=f"{where}.{name}", got=weight,
                            expected="a number above 0", cure="Leave out what has none.",
                            )  # fmt: skip
    exact = {name: Fraction(repr(float(weight))) for name, weight in weights.items()}
    total = sum(exact.values(), Fraction())
    if abs(total - 1) > TOLERANCE:
        raise UserError("the weights do not sum to 1", where=where, got=float(total),
                        expected=f"1, give or take {float(TOLERANCE)}")  # fmt: skip
    return {name: exact[name] / total for name in sorted(exact)}


class Allotment:
    """Which source each sequence of an endless row is from.

    Sequence i has the point (offset + i * step) / 2^64 modulo 1 and is from the source in whose
    part of [0, 1) it falls. In every stretch of the row the counts stay within a few sequences
    of their shares.

    Args:
        weights: They sum to 1; the order of names matters.
        offset: Where the row begins, below 2^64.
    """

    def __init__(self, weights: Mapping[str, Fraction], *, offset: int) -> None:
        self.names = tuple(weights)
        self._offset = offset
        self._ends = [int(end * _MODULUS) for end in accumulate(weights.values())]
        self._cuts = np.array(self._ends[:-1], dtype=np.uint64)

    def sources(self, start: int, count: int) -> npt.NDArray[np.intp]:
        """Numbers of the sources of `count` sequences from `start` on, shape `(count,)`."""
        first = np.uint64((self._offset + start * _STEP) % _MODULUS)
        points = first + np.arange(count, dtype=np.uint64) * np.uint64(_STEP)  # wraps at 2^64
        return np.searchsorted(self._cuts, points, side="right")

    def counts(self, n: int) -> list[int]:
        """How many of the first `n` sequences are from each source."""
        whole = _floors(n, _MODULUS, _STEP, self._offset)
        below = [
            n + whole - _floors(n, _MODULUS, _STEP, self._offset + _MODULUS - end)
            for end in self._ends
        ]
        return [high - low for low, high in zip([0, *below], below, strict=False)]


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """A part of a run with one sequence length and one mixture.

    Attributes:
        seq_len: Tokens per sequence.
        sequences: How many there are in all.
        weights: Given weights by source.
    """

    seq_len: int
    sequences: int
    weights: Mapping[str, float]


class Mixture:
    """The sequences of a run of stretches, over all of its sources.

    Each source is a stream that is read on from where the stretch before stopped, to the token:
    nothing is left out and nothing comes twice in an epoch, whatever changes at a border. Within
    a stretch the windows of one source that begin in one epoch are shuffled, `GROUP` at a time,
    by Philox words seeded by (seed, name, stretch, first window).

    Args:
        sources: By name; those that no stretch names are not used.
        stretches: In order.
        seed: Of all orders; at least 0.
        mark_documents: Whether document numbers are wanted.
        block: See `Stream`.
        group: Sequences shuffled together.

    Raises:
        UserError: Weights are refused, or a source is missing, empty or shorter than a sequence.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        stretches: Sequence[Stretch],
        *,
        seed: int,
        mark_documents: bool = False,
        block: int = BLOCK,
        group: int = GROUP,
    ) -> None:
        if seed < 0:
            raise UserError("the seed is negative", where="seed", got=seed, expected="at least 0")
        self.stretches, self.mark_documents = tuple(stretches), mark_documents
        self._seed, self._group = seed, group
        self._streams: dict[str, Stream] = {}
        self._allotments: list[Allotment] = []
        self._begun: list[dict[str, int]] = [{}]  # tokens of each source before each stretch
        self._orders: dict[tuple[int, str], tuple[int, Numbers]] = {}
        for number, stretch in enumerate(self.stretches):
            weights = normalize(stretch.weights, f"mixture of stretch {number}")
            for name in weights:
                if name not in sources:
                    raise UserError("no such source", where=f"mixture of stretch {number}",
                                    got=name, expected=", ".join(sources))  # fmt: skip
                require_length(sources[name], stretch.seq_len)
                self._streams.setdefault(name, Stream(sources[name], seed=seed, block=block))
            words = np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)
            self._allotments.append(Allotment(weights, offset=int(words[0])))
            self._begun.append(self.consumed(number, stretch.sequences))

    def consumed(self, stretch: int, position: int) -> dict[str, int]:
        """Tokens of each source before the sequence at `position` of a stretch."""
        done, allotment = dict(self._begun[stretch]), self._allotments[stretch]
        for name, count in zip(allotment.names, allotment.counts(position), strict=True):
            done[name] = done.get(name, 0) + count * self.stretches[stretch].seq_len
        return done

    def take(self, stretch: int, position: int, count: int) -> Sequences:
        """`count` sequences of a stretch from a position in it on.

        Raises:
            ValueError: The stretch has no such sequences.
        """
        seq_len, total = self.stretches[stretch].seq_len, self.stretches[stretch].sequences
        if not 0 <= position <= position + count <= total:
            raise ValueError(f"{count} sequences from {position} on, of {total}")
        allotment = self._allotments[stretch]
        numbers, before = allotment.sources(position, count), allotment.counts(position)
        tokens = np.empty((count, seq_len + 1), dtype=np.int64)
        marked = np.empty((count, seq_len), dtype=np.int32) if self.mark_documents else None
        for number, name in enumerate(allotment.names):
            rows = np.flatnonzero(numbers == number)
            stream = self._streams[name]
            windows = self._windows(stretch, number, before[number], len(rows))
            starts = self._begun[stretch].get(name, 0) + windows * seq_len
            for row, start in zip(rows.tolist(), starts.tolist(), strict=True):
                marks = stream.read(start, tokens[row])
                if marked is not None:
                    documents(marks, marked[row])
        return Sequences(tokens=tokens, documents=marked)

    def _windows(self, stretch: int, number: int, rank: int, count: int) -> Numbers:
        """The windows, in order of the stream, that a source's sequences of these ranks are."""
        found = [np.empty(0, dtype=np.int64)]
        while count:
            first, order = self._shuffled(stretch, number, rank)
            part = order[rank - first : rank - first + count]
            found.append(first + part)
            rank, count = rank + len(part), count - len(part)
        return np.concatenate(found)

    def _shuffled(self, stretch: int, number: int, rank: int) -> tuple[int, Numbers]:
        """The group of windows that a rank is in: its first, and the order of the others."""
        name = self._allotments[stretch].names[number]
        kept = self._orders.get((stretch, name))
        if kept is not None and 0 <= rank - kept[0] < len(kept[1]):
            return kept
        seq_len, begun = self.stretches[stretch].seq_len, self._begun[stretch].get(name, 0)
        size = self._streams[name].n_tokens
        epoch = (begun + rank * seq_len) // size
        opens = max(0, -((begun - epoch * size) // seq_len))  # the first that begins in the epoch
        closes = -((begun - (epoch + 1) * size) // seq_len)
        first = rank - (rank - opens) % self._group
        total = (self._begun[stretch + 1][name] - begun) // seq_len
        length = min(first + self._group, closes, total) - first
        entropy = [self._seed, name_number(name), stretch, first]
        self._orders[stretch, name] = first, permutation(entropy, length)
        return self._orders[stretch, name]


def _floors(n: int, m: int, a: int, b: int) -> int:
    """Sum of floor((a i + b) / m) over i from 0 to n - 1, for b >= 0, in O(log m) steps.

    Whole parts are taken out; what is left counts lattice points below a line, which are then
    counted along the other axis, as Euclid's algorithm swaps its two numbers.
    """
    total = 0
    while n:
        total += n * (n - 1) // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        last = a * n + b
        n, b, m, a = last // m, last % m, a, m
    return total
