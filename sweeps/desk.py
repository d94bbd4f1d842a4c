"""The parent's desk: which worker has which job, and what becomes of those of a dead one."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mutransfer.progress import Report
from proxies.run import RunResult, RunSpec
from sweeps.worker import Assignment

_DEATHS = 3  # of workers at one run, after which it is not tried again


@dataclass(frozen=True)
class Job:
    """A run to do, with what the caller needs to know it again.

    Attributes:
        spec: The run.
        tag: Anything; the pool does not look at it.
    """

    spec: RunSpec
    tag: Any = None


NextJob = Callable[[], Job | None]
OnReport = Callable[[Job, int, float], bool]
OnDone = Callable[[Job, RunResult | None], None]


class Desk:
    """Where jobs are given out and results come in; workers are numbered.

    Args:
        workers: How many there may be.
        next_job, on_done, on_report, at_once, in_training, steps, say: See `sweeps.pool.run_jobs`.
    """

    def __init__(
        self,
        workers: int,
        next_job: NextJob,
        on_done: OnDone,
        on_report: OnReport | None,
        at_once: int | None,
        in_training: int | None,
        steps: Callable[[RunSpec], int],
        say: Report,
    ) -> None:
        self._workers, self._steps, self.say = workers, steps, say
        self._next, self._done, self._report = next_job, on_done, on_report
        self._at_once, self._in_training = at_once, in_training
        self._ready: deque[Job] = deque()
        self._held: dict[int, dict[int, Job]] = {}
        self._deaths = Counter[str]()
        self._given = 0

    def has_more(self) -> bool:
        """Whether there is a job that nobody has."""
        if not self._ready and (job := self._next()) is not None:
            self._ready.append(job)
        return bool(self._ready)

    def held(self, worker: int) -> int:
        """How many jobs a worker has."""
        return len(self._held.get(worker, {}))

    def give(self, worker: int, room: int) -> list[Assignment]:
        """At most `room` jobs, of one shape with those that the worker has."""
        held, given = self._held.setdefault(worker, {}), list[Assignment]()
        if self._at_once is not None:
            room = min(room, self._at_once - len(held))
        if self._in_training is not None:
            room = min(room, self._in_training - sum(map(len, self._held.values())))
        while len(given) < room and self.has_more():
            like = next(iter(held.values()), None)
            if like is not None and shape_of(like.spec) != shape_of(self._ready[0].spec):
                break
            job = self._ready.popleft()
            self._given += 1
            held[self._given] = job
            planned = self._steps(job.spec) // self._workers
            given.append(Assignment(number=self._given, spec=job.spec, planned_steps=planned))
        return given

    def report(self, worker: int, number: int, step: int, loss: float) -> bool:
        """Whether to stop this run."""
        return self._report is not None and self._report(self._held[worker][number], step, loss)

    def done(self, worker: int, number: int, result: RunResult | None) -> None:
        """A run has ended."""
        self._done(self._held[worker].pop(number), result)

    def lost(self, worker: int, how: str) -> None:
        """A worker is gone: its jobs are the next ones.

        Raises:
            RuntimeError: One of them has met this too often.
        """
        jobs = list(self._held.pop(worker, {}).values())
        self._deaths.update(job.spec.key for job in jobs)
        if any(self._deaths[job.spec.key] >= _DEATHS for job in jobs):
            raise RuntimeError(
                f"a worker died ({how}), as {_DEATHS - 1} others did at the same run; "
                "run the same command again to go on"
            )
        self._ready.extendleft(reversed(jobs))
        self.say(f"a worker died ({how}); another one takes up its {len(jobs)} runs")


def shape_of(spec: RunSpec) -> tuple[object, ...]:
    """What runs must have in common to be members of one population."""
    return spec.model, spec.train
