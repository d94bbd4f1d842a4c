"""The next batches, made in a thread beside the training."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

Made = TypeVar("Made")


class Prefetch(Generic[Made]):
    """Makes what the next steps need before it is asked for; a context manager.

    Any step may be asked for; the ones after it are then under way. What making one raises is
    raised where that one is asked for.

    Args:
        make: Makes what a step needs, in the other thread.
        stop: The first step that there is not.
        ahead: How many steps to be ahead at most.

    Attributes:
        waited: Seconds that `get` has waited so far.
    """

    def __init__(self, make: Callable[[int], Made], *, stop: int, ahead: int = 2) -> None:
        self._make, self._stop, self._ahead = make, stop, ahead
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._pending: dict[int, Future[Made]] = {}
        self.waited = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def get(self, step: int) -> Made:
        """What `step` needs.

        Raises:
            IndexError: There is no such step.
        """
        if not 0 <= step < self._stop:
            raise IndexError(f"no step {step} of {self._stop}")
        wanted = range(step, min(step + 1 + self._ahead, self._stop))
        for other in [other for other in self._pending if other not in wanted]:
            self._pending.pop(other).cancel()
        for number in wanted:
            if number not in self._pending:
                self._pending[number] = self._executor.submit(self._make, number)
        started = time.perf_counter()
        try:
            return self._pending.pop(step).result()
        finally:
            self.waited += time.perf_counter() - started

    def close(self) -> None:
        """Ends the thread, after the one that it is making; the rest is dropped."""
        self._executor.shutdown(cancel_futures=True)
        self._pending.clear()
