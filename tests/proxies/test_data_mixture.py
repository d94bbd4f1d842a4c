"""Mixtures: shares at every prefix, any position alone, epochs without repetition."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from mutransfer.errors import UserError
from proxies.data.mixture import _MODULUS, _STEP, Allotment, Mixture, Stretch, _floors, normalize
from proxies.data.stream import (
    Sequences,
    Source,
    Stream,
    document_numbers,
    document_starts,
)

RECIPE = Path(__file__).parents[3] / "shared" / "reference" / "xmodel_recipe.json"
DECAY = (0.18725, 0.03716, 0.02209, 0.00287, 0.01722, 0.01722, 0.01147, 0.009, 0.009, 0.01801,
         0.6687)  # fmt: skip

STRETCHES = (
    Stretch(seq_len=5, sequences=60, weights={"a": 0.5, "b": 0.5}),
    Stretch(seq_len=8, sequences=50, weights={"a": 0.85, "b": 0.1, "c": 0.05}),
    Stretch(seq_len=5, sequences=90, weights={"b": 1}),
    Stretch(seq_len=20, sequences=30, weights={"c": 0.3, "a": 0.7}),
)


def source(name: str, size: int, first: int, document: int = 7) -> Source:
    """A source in which every token is another one."""
    return Source(name=name, tokens=np.arange(first, first + size, dtype=np.uint16),
                  starts=np.arange(0, size, document), fingerprint="f")  # fmt: skip


SOURCES = {s.name: s for s in (source("a", 101, 0), source("b", 307, 1000), source("c", 64, 2000))}


def mixture(**change: object) -> Mixture:
    """Small blocks and groups, so that every border is met."""
    options = {"seed": 3, "mark_documents": True, "block": 32, "group": 7, **change}
    return Mixture(SOURCES, STRETCHES, **options)  # type: ignore[arg-type]


def equal(left: Sequences, right: Sequences) -> bool:
    if left.documents is None or right.documents is None:
        return left.documents is right.documents and np.array_equal(left.tokens, right.tokens)
    return np.array_equal(left.tokens, right.tokens) and np.array_equal(
        left.documents, right.documents
    )


def test_weights_are_normalized_by_their_decimals() -> None:
    exact = normalize({"a": 0.1, "b": 0.9005}, "here")
    assert exact == {"a": Fraction(1000, 10005), "b": Fraction(9005, 10005)}
    assert sum(normalize(dict(zip("abcdefghijk", DECAY, strict=True)), "here").values()) == 1


@pytest.mark.parametrize("rest", [0.499, 0.501])
def test_a_sum_that_is_off_by_the_tolerance_is_accepted(rest: float) -> None:
    assert sum(normalize({"a": 0.5, "b": rest}, "here").values()) == 1


@pytest.mark.parametrize("rest", [0.4989999, 0.5010001, 5.0])
def test_a_sum_that_is_off_by_more_is_refused(rest: float) -> None:
    with pytest.raises(
        UserError, match=r"here: the weights do not sum to 1; got [0-9.]+; expected 1"
    ):
        normalize({"a": 0.5, "b": rest}, "here")


@pytest.mark.parametrize("weight", [0.0, -0.1, float("nan"), float("inf")])
def test_what_is_not_a_weight_is_refused(weight: float) -> None:
    with pytest.raises(UserError, match=r"here\.b: not a weight"):
        normalize({"a": 1.0, "b": weight}, "here")
    with pytest.raises(UserError, match="names no source"):
        normalize({}, "here")


def test_sums_of_floors() -> None:
    numbers = np.random.default_rng(0).integers(0, 200, (500, 4)).tolist()
    for n, m, a, b in numbers:
        assert _floors(n, m + 1, a, b) == sum((a * i + b) // (m + 1) for i in range(n))


@pytest.mark.parametrize("offset", [0, 1, 2**63 + 12345, 2**64 - 1])
@pytest.mark.parametrize("weights", [DECAY, (0.5, 0.5), (0.001, 0.999), (1.0,)])
def test_shares_hold_at_every_prefix_and_counts_are_exact(
    weights: tuple[float, ...], offset: int
) -> None:
    names = dict(zip("abcdefghijk", weights, strict=False))
    exact = normalize(names, "here")
    allotment = Allotment(exact, offset=offset)
    n = 50_000
    numbers = allotment.sources(0, n)
    counts = (numbers[:, None] == np.arange(len(weights))).cumsum(axis=0)
    ideal = np.arange(1, n + 1)[:, None] * np.array([float(w) for w in exact.values()])
    assert np.abs(counts - ideal).max() < 4  # chance alone would be off by 200
    assert allotment.counts(0) == [0] * len(weights)
    for prefix in (1, 2, 3, 1000, 49_999, n):
        assert allotment.counts(prefix) == counts[prefix - 1].tolist()
    assert np.array_equal(allotment.sources(31_234, 99), numbers[31_234:31_333])


def test_counts_far_out_are_exact_and_stay_with_the_shares() -> None:
    exact = normalize(dict(zip("abcdefghijk", DECAY, strict=True)), "here")
    allotment = Allotment(exact, offset=99)
    far = 10**12
    before, after = allotment.counts(far), allotment.counts(far + 960)
    batch = Counter(allotment.sources(far, 960).tolist())
    assert [b - a for a, b in zip(before, after, strict=True)] == [batch[i] for i in range(11)]
    assert sum(before) == far
    assert all(abs(n - far * w) < 8 for n, w in zip(before, exact.values(), strict=True))


def test_the_step_is_badly_approximable_all_the_way() -> None:
    quotients, a, m = [], _STEP, _MODULUS
    while a:
        quotients.append(m // a)
        a, m = m % a, a
    assert m == 1  # odd: every point of the circle comes once
    assert max(quotients) == 5


@pytest.mark.skipif(not RECIPE.is_file(), reason="needs ../shared")
def test_the_mixtures_of_the_reference_are_accepted() -> None:
    phases = json.loads(RECIPE.read_text(encoding="utf-8"))["phases"]
    mixtures = [phase["data"] for phase in phases if "data" in phase]
    assert {len(weights) for weights in mixtures} == {11, 13}
    for weights in mixtures:
        assert sum(normalize(weights, "reference").values()) == 1


def test_any_position_equals_reading_from_the_beginning() -> None:
    for number, stretch in enumerate(STRETCHES):
        whole = mixture().take(number, 0, stretch.sequences)
        for first in range(0, stretch.sequences, 3):
            part = mixture().take(number, first, min(4, stretch.sequences - first))
            rows = slice(first, first + len(part.tokens))
            assert whole.documents is not None
            assert equal(part, Sequences(tokens=whole.tokens[rows],
                                         documents=whole.documents[rows]))  # fmt: skip


def test_one_mixture_asked_in_any_order_equals_fresh_ones() -> None:
    one = mixture()
    asked = [(3, 25), (0, 0), (1, 44), (0, 55), (1, 0), (3, 1), (2, 80), (2, 3), (3, 25)]
    for stretch, position in asked:
        assert equal(one.take(stretch, position, 5), mixture().take(stretch, position, 5))


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_ranks_share_a_batch(ranks: int) -> None:
    whole = mixture().take(1, 15, 30)
    parts = [mixture().take(1, 15 + r * 30 // ranks, 30 // ranks) for r in range(ranks)]
    assert np.array_equal(np.concatenate([p.tokens for p in parts]), whole.tokens)
    for ahead in parts[1:]:
        assert not equal(ahead, parts[0])


def inputs() -> dict[str, list[int]]:
    """All inputs of the run, by source, in the order of their windows in the stream."""
    run = mixture()
    rows: dict[str, list[tuple[int, list[int]]]] = {name: [] for name in SOURCES}
    for number, stretch in enumerate(STRETCHES):
        for row in run.take(number, 0, stretch.sequences).tokens.tolist():
            name = next(n for n, s in SOURCES.items() if row[0] in s.tokens)
            assert all(token in SOURCES[name].tokens for token in row)  # never two sources
            rows[name].append((number, row))
    return {name: [token for _, row in found for token in row[:-1]] for name, found in rows.items()}


def test_every_token_comes_equally_often_whatever_changes_at_the_borders() -> None:
    found, consumed = inputs(), mixture().consumed(3, 30)
    for name, tokens in found.items():
        assert len(tokens) == consumed[name]
        counts = Counter(tokens)
        whole, rest = divmod(consumed[name], len(SOURCES[name].tokens))
        often = Counter(counts[t] for t in SOURCES[name].tokens.tolist())
        size = len(SOURCES[name].tokens)
        expected = {whole: size - rest, whole + 1: rest}
        assert dict(often) == {k: v for k, v in expected.items() if v}, name
    assert mixture().consumed(3, 30)["a"] > 5 * 101  # several epochs were met


def test_no_token_comes_twice_within_an_epoch() -> None:
    run = Mixture({"b": SOURCES["b"]}, [Stretch(seq_len=5, sequences=200, weights={"b": 1})],
                  seed=0, block=32, group=7)  # fmt: skip
    # an epoch has 307 tokens: windows that begin in it are 62, then 61 or 62
    tokens = run.take(0, 0, 200).tokens
    borders = [-(-epoch * 307 // 5) for epoch in range(4)]
    epochs = [tokens[a:b] for a, b in pairwise(borders)]
    for epoch in epochs:
        firsts = epoch[:, 0].tolist()
        assert len(set(firsts)) == len(firsts) >= 61
    assert not np.array_equal(epochs[0][:20], epochs[1][:20])
    every = [t for row in epochs[0] for t in row[:-1].tolist()]
    assert len(set(every[:300])) == 300 or Counter(every).most_common(1)[0][1] <= 2
    assert set(every) == set(range(1000, 1307))


def test_the_order_in_which_weights_are_written_changes_nothing() -> None:
    weights = {"a": 0.2, "b": 0.5, "c": 0.3}
    turned = dict(reversed(weights.items()))
    one, other = (
        Mixture(SOURCES, [Stretch(seq_len=5, sequences=50, weights=w)], seed=0).take(0, 0, 50)
        for w in (weights, turned)
    )
    assert equal(one, other)


def test_orders_differ_by_seed_stretch_and_epoch_but_not_by_other_sources() -> None:
    weights = {"b": 1.0}
    stretches = [Stretch(seq_len=5, sequences=70, weights=weights)] * 2
    one = Mixture(SOURCES, stretches, seed=0)
    assert not equal(one.take(0, 0, 40), Mixture(SOURCES, stretches, seed=1).take(0, 0, 40))
    assert equal(one.take(0, 0, 40), Mixture({"b": SOURCES["b"]}, stretches, seed=0).take(0, 0, 40))
    rows = one.take(0, 0, 61).tokens
    assert (np.diff(rows[:, 0].astype(int)) == 5).mean() < 0.2  # shuffled


def test_targets_are_the_next_tokens_of_the_stream() -> None:
    stream = Stream(SOURCES["b"], seed=3, block=32)
    row = np.empty(4 * 307, dtype=np.int64)
    stream.read(0, row)
    for epoch in range(4):
        assert sorted(row[epoch * 307 : (epoch + 1) * 307].tolist()) == list(range(1000, 1307))
    assert row[:307].tolist() != row[307:614].tolist()
    # blocks keep their order inside; 9 whole ones and one of 19 tokens
    assert (np.diff(row[:307]) != 1).sum() <= 9
    for position in range(0, 1200, 11):
        part = np.empty(25, dtype=np.int64)
        stream.read(position, part)
        assert part.tolist() == row[position : position + 25].tolist()


def test_documents_change_where_one_begins_or_the_text_jumps() -> None:
    run = mixture()
    for number, stretch in enumerate(STRETCHES):
        taken = run.take(number, 0, stretch.sequences)
        assert taken.documents is not None
        assert taken.documents.shape == (stretch.sequences, stretch.seq_len)
        for row, marked in zip(taken.tokens.tolist(), taken.documents.tolist(), strict=True):
            base = next(s for s in SOURCES.values() if row[0] in s.tokens).tokens[0]
            places = [token - int(base) for token in row[:-1]]
            expected, document = [0], 0
            for before, after in pairwise(places):
                document += after != before + 1 or after % 7 == 0
                expected.append(document)
            assert marked == expected
    assert mixture(mark_documents=False).take(0, 0, 3).documents is None


def test_documents_by_separator() -> None:
    tokens = np.array([[5, 0, 6, 7, 0, 0], [1, 2, 3, 4, 5, 6], [0, 1, 0, 1, 2, 0]])
    assert document_numbers(tokens, 0).tolist() == [
        [0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0], [0, 1, 1, 2, 2, 2],
    ]  # fmt: skip
    assert document_starts(np.array([5, 0, 6, 7, 0, 0, 8, 0]), 0).tolist() == [0, 2, 5, 6]


def test_consumed_is_what_was_taken() -> None:
    run = mixture()
    done: Counter[str] = Counter()
    for number, stretch in enumerate(STRETCHES):
        for position in range(stretch.sequences):
            assert run.consumed(number, position) == {
                name: done[name] for name in run.consumed(number, position)
            }
            first = run.take(number, position, 1).tokens[0, 0]
            done[next(n for n, s in SOURCES.items() if first in s.tokens)] += stretch.seq_len


@pytest.mark.parametrize(("position", "count"), [(-1, 1), (0, -1), (59, 2), (61, 0)])
def test_sequences_outside_a_stretch_are_refused(position: int, count: int) -> None:
    assert len(mixture().take(0, 60, 0).tokens) == 0
    with pytest.raises(ValueError, match="of 60"):
        mixture().take(0, position, count)


def test_sources_that_cannot_serve_are_refused() -> None:
    stretch = Stretch(seq_len=64, sequences=3, weights={"c": 1})
    with pytest.raises(UserError, match="source 'c': .*shorter than one sequence; got 64 tokens"):
        Mixture(SOURCES, [stretch], seed=0)
    Mixture({"c": source("c", 65, 0)}, [stretch], seed=0)
    with pytest.raises(UserError, match="source 'c': the source is empty"):
        Mixture({"c": source("c", 0, 0)}, [stretch], seed=0)
    with pytest.raises(UserError, match="no such source; got c; expected a, b"):
        Mixture({n: SOURCES[n] for n in "ab"}, [stretch], seed=0)
    with pytest.raises(UserError, match="the seed is negative"):
        Mixture(SOURCES, STRETCHES, seed=-1)
