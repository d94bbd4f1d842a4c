"""Batches: every window once per epoch, and any position without those before it."""

from __future__ import annotations

import numpy as np
import pytest

from mutransfer.errors import UserError
from proxies.data import Batches, heldout_batches, require_ids_below

SEQ = 8


def stream(n_windows: int = 37, extra: int = 3) -> np.ndarray:
    """Ids that are their own places, with a rest that fills no window."""
    return np.arange(n_windows * SEQ + 1 + extra, dtype=np.uint16)


def batches(tokens: np.ndarray, batch_size: int = 4, seed: int = 0) -> Batches:
    return Batches(tokens, seq_len=SEQ, batch_size=batch_size, seed=seed)


def test_a_sequence_is_a_window_and_the_token_after_it() -> None:
    batch = batches(stream()).at(5)
    assert batch.shape == (4, SEQ + 1)
    assert batch.dtype == np.int64
    assert (batch[:, 0] % SEQ == 0).all()
    assert (np.diff(batch, axis=1) == 1).all()


def test_each_window_comes_once_per_epoch_in_a_new_order() -> None:
    shuffled = batches(stream())
    orders = [(shuffled.take(e * 37, 37)[:, 0] // SEQ).tolist() for e in range(5)]
    assert all(sorted(order) == list(range(37)) for order in orders)
    assert len({tuple(order) for order in [*orders, list(range(37))]}) == 6
    other = batches(stream(), seed=1)
    assert (other.take(0, 37)[:, 0] // SEQ).tolist() not in orders


def test_take_anywhere_is_a_slice_of_one_long_stream() -> None:
    tokens = stream()
    long = batches(tokens).take(0, 200)  # more than 5 epochs
    source = np.random.default_rng(0)
    seekable = batches(tokens)
    for _ in range(50):
        start = int(source.integers(0, 190))
        count = int(source.integers(0, 200 - start))
        np.testing.assert_array_equal(seekable.take(start, count), long[start : start + count])
    for size in (1, 4, 37):
        of_size = batches(tokens, size)
        for step in reversed(range(200 // size)):
            np.testing.assert_array_equal(of_size.at(step), long[step * size : (step + 1) * size])


def test_far_positions_need_nothing_before_them() -> None:
    far = batches(stream())
    assert far.at(10**12).shape == (4, SEQ + 1)
    assert len(far._orders) <= 2
    assert far.epochs(37) == 1
    assert far.epochs(74 + 1) == 75 / 37


def test_order_is_of_raw_philox_words() -> None:
    """Pinned: raw words are stable over NumPy versions, `Generator.permutation` need not be."""
    words = np.random.Philox(np.random.SeedSequence([3, 1])).random_raw(37)
    expected = sorted(range(37), key=lambda window: int(words[window]))
    assert (batches(stream(), seed=3).take(37, 37)[:, 0] // SEQ).tolist() == expected
    assert (batches(stream(), seed=3).take(0, 5)[:, 0] // SEQ).tolist() == [21, 0, 16, 1, 2]


def test_heldout_is_the_text_from_its_beginning() -> None:
    tokens = stream(10, extra=0)
    found = heldout_batches(tokens, SEQ, 4)
    assert [batch.shape for batch in found] == [(4, SEQ + 1)] * 2  # 2 of 10 windows fill no batch
    inputs = np.concatenate([batch[:, :-1].ravel() for batch in found])
    targets = np.concatenate([batch[:, 1:].ravel() for batch in found])
    np.testing.assert_array_equal(inputs, np.arange(64))
    np.testing.assert_array_equal(targets, np.arange(1, 65))
    for max_tokens, count in ((32, 1), (63, 1), (64, 2), (10**9, 2), (None, 2)):
        limited = heldout_batches(tokens, SEQ, 4, max_tokens)
        np.testing.assert_array_equal(limited, found[:count])
    with pytest.raises(UserError, match=r"max_tokens: .*got 31; expected at least 32"):
        heldout_batches(tokens, SEQ, 4, 31)


def test_shortest_text_is_one_batch_and_its_last_target() -> None:
    assert batches(stream(4, extra=0)).n_windows == 4
    assert len(heldout_batches(stream(4, extra=0), SEQ, 4)) == 1
    short = stream(4, extra=-1)
    expected = r"too short for one batch; got 32 tokens; expected at least 33"
    with pytest.raises(UserError, match=f"training text: {expected}"):
        batches(short)
    with pytest.raises(UserError, match=f"held-out text: {expected}"):
        heldout_batches(short, SEQ, 4)
    with pytest.raises(UserError, match="got 0 tokens"):
        batches(short[:0])


def test_ids_outside_the_vocabulary_are_found_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("proxies.data.batches._CHUNK", 50)
    tokens = stream()
    largest = int(tokens[-1])
    require_ids_below(tokens, largest + 1, "here")
    Batches(tokens, seq_len=SEQ, batch_size=1, seed=0, vocab_size=largest + 1)
    with pytest.raises(UserError, match=r"training text: .*id 99 at token 99; expected ids below"):
        Batches(tokens[:100], seq_len=SEQ, batch_size=1, seed=0, vocab_size=99)


@pytest.mark.parametrize("wrong", [{"seq_len": 0}, {"batch_size": 0}, {"seed": -1}], ids=str)
def test_numbers_out_of_range(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Batches(stream(), **({"seq_len": SEQ, "batch_size": 1, "seed": 0} | wrong))
    with pytest.raises(ValueError, match="negative"):
        batches(stream()).at(-1)
