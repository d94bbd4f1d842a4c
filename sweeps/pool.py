"""Worker processes that train proxies; the parent alone decides, records and stores.

One writer means that no trial is lost, doubled or over budget, whatever happens to a worker.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from mutransfer.errors import UserError
from mutransfer.progress import Report, quiet
from proxies.footprint import free_memory
from proxies.run import RunResult, RunSpec
from sweeps.desk import Desk, Job, NextJob, OnDone, OnReport, shape_of
from sweeps.ledger import Ledger
from sweeps.worker import Assignment, Worker, Workplace


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """How the machine is shared out; what is `None` is chosen.

    Attributes:
        workers: Processes; each trains one population of proxies.
        threads: Threads per process; by default an even share of the cores.
        device: `cpu` or `cuda`; of several GPUs each worker has one.
        compile: Whether they `torch.compile` each shape once and reuse it; by default where there
            is enough to train.
        members: Proxies that a worker trains at once; by default what measures best on a CPU, and
            on a GPU as many as fit.
        save_every: Seconds after which a run that goes on is saved, at its next evaluation.
    """

    workers: int = 1
    threads: int | None = None
    device: str = "cpu"
    compile: bool | None = None
    members: int | None = None
    save_every: float = 60.0

    @property
    def threads_each(self) -> int:
        """Threads of one worker."""
        return self.threads or max(1, cores() // self.workers)

    def workplace(
        self, index: int, corpus: Path, saves: Path | None, free: dict[str, int]
    ) -> Workplace:
        """What the worker of this number has; of several GPUs, one.

        Args:
            index: The worker's number.
            corpus: The text's folder.
            saves: Folder for states of runs.
            free: Bytes that were free on each device before any worker started; filled in here.
        """
        device, sharing = self.device, self.workers
        if device == "cuda":
            import torch

            gpus = max(1, torch.cuda.device_count())
            device, sharing = f"cuda:{index % gpus}", -(-self.workers // gpus)
        if device not in free:
            free[device] = free_memory(device)
        return Workplace(
            corpus=corpus,
            device=device,
            threads=self.threads_each,
            free=free[device] // sharing,
            compile=self.compile,
            members=self.members,
            saves=saves,
            save_every=self.save_every,
        )


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(
    config: PoolConfig,
    corpus_folder: Path,
    next_job: NextJob,
    on_done: OnDone,
    on_report: OnReport | None = None,
    *,
    at_once: int | None = None,
    in_training: int | None = None,
    steps: Callable[[RunSpec], int] = lambda spec: spec.train.steps,
    saves: Path | None = None,
    say: Report = quiet,
) -> None:
    """Runs jobs until `next_job` has none and all are done.

    A worker that dies is replaced, and its runs go on from where they were last saved.

    Args:
        config: Workers, threads, device.
        corpus_folder: What `proxies.data.prepare` left; each worker maps it.
        next_job: The next job, or `None` if there is none *now*; asked again after each
            result.
        on_done: Takes the result, or `None` where the run was stopped by `on_report`.
        on_report: (job, step, held-out loss) -> whether to stop the run.
        at_once: The most jobs that a worker may have, whatever fits.
        in_training: The most jobs that all workers may have together.
        steps: A run -> optimizer steps that all jobs of its shape take together, on which it
            depends whether to compile.
        saves: Folder for the states of runs that take long; `None`: none are kept.
        say: Takes what workers tell the user.

    Raises:
        UserError: A worker met one.
        RuntimeError: A worker met a bug, or run after run of one job died with its worker.
    """
    desk = Desk(config.workers, next_job, on_done, on_report, at_once, in_training, steps, say)
    if config.workers == 1:
        Worker(config.workplace(0, corpus_folder, saves, {}), _Inline(desk)).work()
    else:
        _Crew(config, desk, corpus_folder, saves).work()


class _Inline:
    """The parent of a worker in this process."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def take(self, room: int) -> list[Assignment]:
        return self._desk.give(0, room)

    def report(self, number: int, step: int, loss: float) -> bool:
        return self._desk.report(0, number, step, loss)

    def done(self, number: int, result: RunResult | None) -> None:
        self._desk.done(0, number, result)

    def say(self, line: str) -> None:
        self._desk.say(line)


class _Crew:
    """Workers in processes of their own, started as there is work for them."""

    def __init__(
        self, config: PoolConfig, desk: Desk, corpus_folder: Path, saves: Path | None
    ) -> None:
        self._config, self._desk = config, desk
        self._corpus_folder, self._saves = corpus_folder, saves
        self._free: dict[str, int] = {}
        self._context = multiprocessing.get_context("spawn")
        self._workers: dict[Connection, tuple[int, Any]] = {}
        self._first: dict[Connection, list[Assignment]] = {}
        self._idle: list[Connection] = []

    def work(self) -> None:
        try:
            while True:
                self._employ()
                busy = [each for each in self._workers if each not in self._idle]
                if not busy:
                    return
                for ready in wait(busy):
                    assert isinstance(ready, Connection)
                    self._attend(ready)
        finally:
            for connection, (index, process) in self._workers.items():
                connection.close()
                if self._desk.held(index):
                    process.terminate()
                process.join()

    def _employ(self) -> None:
        """Gives what there is to do to those who wait, and then to new workers."""
        for connection in list(self._idle):
            if assignments := self._desk.give(self._workers[connection][0], 1):
                self._idle.remove(connection)
                self._answer(connection, assignments)
        while len(self._workers) < self._config.workers and self._desk.has_more():
            taken = {index for index, _ in self._workers.values()}
            index = min(set(range(self._config.workers)) - taken)
            ours, theirs = self._context.Pipe()
            workplace = self._config.workplace(index, self._corpus_folder, self._saves, self._free)
            process = self._context.Process(target=_work, args=(theirs, workplace), daemon=True)
            process.start()
            theirs.close()
            self._workers[ours] = (index, process)
            self._first[ours] = self._desk.give(index, 1)

    def _attend(self, connection: Connection) -> None:
        """Hears one worker out, and answers."""
        index = self._workers[connection][0]
        try:
            kind, *content = connection.recv()
        except (EOFError, OSError):
            self._bury(connection)
            return
        if kind == "take":
            given = self._first.pop(connection, None) or self._desk.give(index, content[0])
            if given or self._desk.held(index):
                self._answer(connection, given)
            else:
                self._idle.append(connection)
        elif kind == "report":
            self._answer(connection, self._desk.report(index, *content))
        elif kind == "done":
            number, result = content
            record = None if result is None else RunResult.model_validate(result)
            self._desk.done(index, number, record)
        elif kind == "say":
            self._desk.say(content[0])
        else:
            error, text = content
            if error == "system":
                raise OSError(*text)
            raise UserError(text) if error == "user" else RuntimeError(text)

    def _answer(self, connection: Connection, content: object) -> None:
        try:
            connection.send(content)
        except ConnectionError:
            self._bury(connection)

    def _bury(self, connection: Connection) -> None:
        """Takes note that the other end of the pipe is gone."""
        index, process = self._workers.pop(connection)
        self._first.pop(connection, None)
        connection.close()
        process.join()
        self._desk.lost(index, f"exit code {process.exitcode}")


class _Remote:
    """The parent of a worker at the other end of a pipe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def take(self, room: int) -> list[Assignment]:
        assignments: list[Assignment] = self._ask("take", room)
        return assignments

    def report(self, number: int, step: int, loss: float) -> bool:
        return bool(self._ask("report", number, step, loss))

    def done(self, number: int, result: RunResult | None) -> None:
        record = None if result is None else result.model_dump(mode="json")
        self._connection.send(("done", number, record))

    def say(self, line: str) -> None:
        self._connection.send(("say", line))

    def _ask(self, *question: object) -> Any:
        self._connection.send(question)
        return self._connection.recv()


def _work(connection: Connection, workplace: Workplace) -> None:
    """The life of a worker: ends when the parent closes the pipe, or dies."""
    try:
        Worker(workplace, _Remote(connection)).work()
    except (EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        return
    except UserError as error:
        connection.send(("error", "user", str(error)))
    except OSError as error:  # no room on the disk, most of all
        connection.send(("error", "system", (error.errno, error.strerror, error.filename)))
    except Exception:
        connection.send(("error", "bug", traceback.format_exc()))


def run_missing(
    config: PoolConfig,
    corpus_folder: Path,
    ledger: Ledger,
    jobs: Iterable[Job],
    describe: Callable[[Job], str],
    progress: Report = quiet,
) -> None:
    """Runs to their ends those jobs that are not on record, and puts them there.

    Args:
        config: Workers, threads, device.
        corpus_folder: See `run_jobs`.
        ledger: The record, open.
        jobs: All the jobs; those on record count as done, equal runs as one.
        describe: A job in a few words.
        progress: Takes a line per run. Runs count by their parameters: a wide model takes longer.
    """
    jobs = list(jobs)
    distinct = {job.spec.key: job for job in jobs}
    missing = [job for key, job in distinct.items() if ledger.get(key) is None]
    total = sum(map(_cost, distinct.values()))
    left = {job.spec.key: _cost(job) for job in missing}
    steps = Counter[tuple[object, ...]]()
    for job in distinct.values():  # those on record too: who resumes decides as before
        steps[shape_of(job.spec)] += job.spec.train.steps

    def done(job: Job, result: RunResult | None) -> None:
        assert result is not None, "nobody asked the run to stop"
        ledger.add(result)
        del left[job.spec.key]
        loss = "diverged" if result.loss is None else f"loss {result.loss:.4f}"
        line = f"{describe(job)}: {loss} · {len(left)} to go"
        progress(line, 1 - sum(left.values()) / total)

    waiting = iter(missing)
    run_jobs(
        config,
        corpus_folder,
        lambda: next(waiting, None),
        done,
        at_once=-(-len(missing) // config.workers) or None,
        steps=lambda spec: steps[shape_of(spec)],
        saves=ledger.path.parent / "unfinished",
        say=progress,
    )


def _cost(job: Job) -> int:
    return job.spec.model.n_parameters * job.spec.train.horizon_tokens
