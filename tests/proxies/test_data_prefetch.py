"""Batches made beside the training: order, bounds, errors and the end of the thread."""

from __future__ import annotations

import threading

import pytest

from proxies.data.prefetch import Prefetch


def prefetch_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_every_step_is_made_once_and_in_the_other_thread() -> None:
    made: list[tuple[int, str]] = []

    def make(step: int) -> int:
        made.append((step, threading.current_thread().name))
        return step * step

    with Prefetch(make, stop=6) as prefetch:
        assert [prefetch.get(step) for step in range(6)] == [0, 1, 4, 9, 16, 25]
    assert [step for step, _ in made] == [0, 1, 2, 3, 4, 5]
    assert all(name.startswith("prefetch") for _, name in made)


def test_it_is_never_further_ahead_than_allowed() -> None:
    made: list[int] = []
    go = threading.Semaphore(0)

    def make(step: int) -> int:
        made.append(step)
        go.release()
        return step

    with Prefetch(make, stop=100, ahead=3) as prefetch:
        prefetch.get(10)
        for _ in range(4):
            assert go.acquire(timeout=60)
        assert prefetch.get(11) == 11
        assert go.acquire(timeout=60)
    assert made == [10, 11, 12, 13, 14]


def test_any_step_may_follow_any_other() -> None:
    with Prefetch(lambda step: -step, stop=50) as prefetch:
        steps = [3, 4, 30, 5, 5, 0, 49, 48]
        assert [prefetch.get(step) for step in steps] == [-step for step in steps]


@pytest.mark.parametrize("step", [-1, 5])
def test_there_are_no_steps_beyond_the_run(step: int) -> None:
    with Prefetch(lambda step: step, stop=5) as prefetch, pytest.raises(IndexError):
        prefetch.get(step)


def test_an_error_comes_where_its_step_is_asked_for() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise OSError("the disk is gone")
        return step

    with Prefetch(make, stop=5) as prefetch:
        assert [prefetch.get(0), prefetch.get(1)] == [0, 1]
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                prefetch.get(2)
        assert prefetch.get(3) == 3


def test_the_thread_ends_and_drops_what_it_had_not_begun() -> None:
    began, release = threading.Event(), threading.Event()
    made: list[int] = []

    def make(step: int) -> int:
        if step == 1:
            began.set()
            release.wait(60)
        made.append(step)
        return step

    before = prefetch_threads()
    prefetch = Prefetch(make, stop=9, ahead=4)
    prefetch.get(0)
    assert began.wait(60)
    last = prefetch._pending[4]
    closing = threading.Thread(target=prefetch.close)
    closing.start()
    while not last.cancelled():
        closing.join(0.01)
    release.set()
    closing.join(60)
    assert prefetch_threads() == before
    assert made == [0, 1]
    with pytest.raises(RuntimeError):
        prefetch.get(5)
    prefetch.close()


def test_only_waiting_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting, now = threading.Event(), [0.0]

    def clock() -> float:
        waiting.set()
        return now[0]

    def make(step: int) -> int:
        if step == 0:
            assert waiting.wait(60)
            now[0] += 7.0
        return step

    monkeypatch.setattr("proxies.data.prefetch.time.perf_counter", clock)
    with Prefetch(make, stop=2) as prefetch:
        assert prefetch.waited == 0
        prefetch.get(0)
        assert prefetch.waited == 7
        now[0] += 100.0  # training
        prefetch.get(1)
        assert prefetch.waited == 7
