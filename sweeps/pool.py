"""Worker processes that train proxies; the parent alone decides, records and stores.

One writer means that no trial is lost, doubled or over budget, whatever happens to a worker.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from mutransfer.errors import UserError
from mutransfer.progress import Report, quiet
from proxies.run import Pruned, Runner, RunResult, RunSpec
from sweeps.ledger import Ledger


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


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """How the machine is shared out.

    Attributes:
        workers: Processes; each trains one proxy at a time.
        threads: Threads per process; `None` shares the cores out evenly.
        device: Where they train.
        compile: Whether they `torch.compile` each shape once and reuse it.
    """

    workers: int = 1
    threads: int | None = None
    device: str = "cpu"
    compile: bool = False

    @property
    def threads_each(self) -> int:
        """Threads of one worker."""
        return self.threads or max(1, cores() // self.workers)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(
    config: PoolConfig,
    corpus_folder: Path,
    next_job: NextJob,
    on_done: OnDone,
    on_report: OnReport | None = None,
) -> None:
    """Runs jobs until `next_job` has none and all are done.

    Args:
        config: Workers, threads, device.
        corpus_folder: What `proxies.data.prepare` left; each worker maps it.
        next_job: The next job, or `None` if there is none *now*; asked again after each
            result.
        on_done: Takes the result, or `None` where the run was stopped by `on_report`.
        on_report: (job, step, held-out loss) -> whether to stop the run.

    Raises:
        UserError: A worker met one.
        RuntimeError: A worker died.
    """
    if config.workers == 1:
        _run_inline(config, corpus_folder, next_job, on_done, on_report)
        return
    context = multiprocessing.get_context("spawn")
    workers: dict[Connection, Any] = {}
    busy: dict[Connection, Job] = {}
    try:
        idle: list[Connection] = []
        while True:
            while (idle or len(workers) < config.workers) and (job := next_job()) is not None:
                if not idle:
                    ours, theirs = context.Pipe()
                    process = context.Process(
                        target=_work, args=(theirs, config, str(corpus_folder)), daemon=True
                    )
                    process.start()
                    theirs.close()
                    workers[ours] = process
                    idle.append(ours)
                connection = idle.pop()
                with _alive(workers[connection]):
                    connection.send(job.spec.model_dump(mode="json"))
                busy[connection] = job
            if not busy:
                return
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                connection = ready
                job = busy[connection]
                with _alive(workers[connection]):
                    kind, *content = connection.recv()
                if kind == "report":
                    stop = on_report is not None and on_report(job, *content)
                    with _alive(workers[connection]):
                        connection.send(stop)
                elif kind == "error":
                    error, text = content
                    raise UserError(text) if error == "user" else RuntimeError(text)
                else:
                    del busy[connection]
                    idle.append(connection)
                    record = content[0]
                    on_done(job, None if record is None else RunResult.model_validate(record))
    finally:
        for connection, process in workers.items():
            connection.close()
            if connection in busy:
                process.terminate()
            process.join()


@contextmanager
def _alive(process: Any) -> Iterator[None]:
    """Around a word with a worker: says so where its end of the pipe is gone."""
    try:
        yield
    except (EOFError, ConnectionError):
        process.join()
        raise RuntimeError(
            f"a worker died (exit code {process.exitcode}); run the same command again to go on"
        ) from None


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

    def done(job: Job, result: RunResult | None) -> None:
        assert result is not None, "nobody asked the run to stop"
        ledger.add(result)
        del left[job.spec.key]
        loss = "diverged" if result.loss is None else f"loss {result.loss:.4f}"
        line = f"{describe(job)}: {loss} · {len(left)} to go"
        progress(line, 1 - sum(left.values()) / total)

    waiting = iter(missing)
    run_jobs(config, corpus_folder, lambda: next(waiting, None), done)


def _cost(job: Job) -> int:
    return job.spec.model.n_parameters * job.spec.train.horizon_tokens


def _runner(config: PoolConfig, corpus_folder: Path) -> Runner:
    import torch

    from proxies.data import open_corpus

    torch.set_num_threads(config.threads_each)
    return Runner(open_corpus(corpus_folder), device=config.device, compile=config.compile)


def _run_inline(
    config: PoolConfig,
    corpus_folder: Path,
    next_job: NextJob,
    on_done: OnDone,
    on_report: OnReport | None,
) -> None:
    runner = _runner(config, corpus_folder)
    while (job := next_job()) is not None:
        result = None
        with suppress(Pruned):
            result = runner.run(job.spec, _bind(on_report, job))
        on_done(job, result)


def _bind(on_report: OnReport | None, job: Job) -> Callable[[int, float], bool] | None:
    return None if on_report is None else lambda step, loss: on_report(job, step, loss)


def _work(connection: Connection, config: PoolConfig, corpus_folder: str) -> None:
    """The life of a worker: ends when the parent closes the pipe, or dies."""

    def report(step: int, loss: float) -> bool:
        connection.send(("report", step, loss))
        return bool(connection.recv())

    try:
        runner = _runner(config, Path(corpus_folder))
        while True:
            spec = RunSpec.model_validate(connection.recv())
            try:
                result = runner.run(spec, report).model_dump(mode="json")
            except Pruned:
                result = None
            connection.send(("done", result))
    except (EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        return
    except UserError as error:
        connection.send(("error", "user", str(error)))
    except Exception:
        connection.send(("error", "bug", traceback.format_exc()))
