"""Worker processes: the same runs as inline, and what arrives when one of them fails or dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from mutransfer.errors import UserError
from proxies.run import RunResult, RunSpec
from sweeps.experiment import Experiment
from sweeps.pool import Job, PoolConfig, cores, run_jobs, run_missing
from sweeps.workspace import Workspace

INLINE = PoolConfig(workers=1, threads=1)
TWO = PoolConfig(workers=2, threads=1)


@pytest.fixture(scope="module")
def place(tiny_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with its corpus."""
    workspace = Workspace(tiny_experiment, tmp_path_factory.mktemp("pool"))
    assert workspace.corpus.train_tokens > 0
    return workspace


def specs(place: Workspace, count: int) -> list[RunSpec]:
    """Runs that differ in learning rate and seed."""
    e = place.experiment
    return [
        place.spec(e.base, e.params.model_copy(update={"lr": 0.004 * 2**i}), seed=i)
        for i in range(count)
    ]


def run(config: PoolConfig, place: Workspace, jobs: list[Job], **options: Any) -> dict[Any, Any]:
    """Results by tag, without what depends on the clock."""
    waiting, results = iter(jobs), {}

    def done(job: Job, result: RunResult | None) -> None:
        assert job.tag not in results, "a job was done twice"
        results[job.tag] = None if result is None else result.model_dump(exclude={"seconds"})

    run_jobs(config, place.corpus.folder, lambda: next(waiting, None), done, **options)
    assert multiprocessing.active_children() == []
    return results


def test_workers_give_what_inline_gives_and_stop_when_asked(place: Workspace) -> None:
    """More jobs than workers; a job that `on_report` stops is done without a result."""
    jobs = [Job(spec, tag) for tag, spec in enumerate(specs(place, 4))]
    found, seen = {}, {}
    for name, config in (("inline", INLINE), ("workers", TWO)):
        reports: dict[Any, list[tuple[int, float]]] = {job.tag: [] for job in jobs}

        def on_report(job: Job, step: int, loss: float, reports: Any = reports) -> bool:
            reports[job.tag].append((step, loss))
            return job.tag in (1, 3) and step == 6

        found[name], seen[name] = run(config, place, jobs, on_report=on_report), reports
    assert found["workers"] == found["inline"]
    assert seen["workers"] == seen["inline"]
    assert {tag for tag, result in found["inline"].items() if result is None} == {1, 3}
    assert [step for step, _ in seen["inline"][0]] == [6, 10, 11, 12]
    assert [step for step, _ in seen["inline"][1]] == [6]
    assert found["inline"][0]["evaluations"] == tuple(seen["inline"][0])
    assert found["inline"][2]["key"] == jobs[2].spec.key
    # the same without anybody listening
    assert run(INLINE, place, jobs[:1])[0] == found["inline"][0]


@pytest.mark.parametrize("config", [INLINE, TWO])
def test_no_jobs_are_no_work(place: Workspace, config: PoolConfig) -> None:
    assert run(config, place, []) == {}


@pytest.mark.parametrize("config", [INLINE, TWO])
def test_a_users_error_arrives_as_one(place: Workspace, config: PoolConfig) -> None:
    wrong = specs(place, 1)[0].model_copy(update={"data": "f" * 64})
    with pytest.raises(UserError, match=r"data: run belongs to another corpus; got ffff") as error:
        run(config, place, [Job(wrong)])
    assert "\n" not in str(error.value)
    assert multiprocessing.active_children() == []


def test_a_bug_arrives_with_its_traceback(place: Workspace) -> None:
    broken = PoolConfig(workers=2, threads=1, device="abacus")  # torch has an error of its own
    with pytest.raises(RuntimeError, match="abacus") as error:
        run(broken, place, [Job(specs(place, 1)[0])])
    assert type(error.value) is RuntimeError
    assert "Traceback (most recent call last)" in str(error.value)
    assert "in _work" in str(error.value)
    assert multiprocessing.active_children() == []


def test_an_error_of_the_caller_leaves_no_worker_behind(place: Workspace) -> None:
    def fail(job: Job, step: int, loss: float) -> bool:
        raise KeyError("the caller's own")

    with pytest.raises(KeyError, match="the caller's own"):
        run(TWO, place, [Job(specs(place, 1)[0])], on_report=fail)
    assert multiprocessing.active_children() == []


def kill_worker() -> None:
    """Sends the one worker SIGKILL and waits for its end."""
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()


def while_it_trains(spec: RunSpec) -> tuple[list[Job], Callable[..., bool]]:
    killer = threading.Thread(target=lambda: (time.sleep(0.2), kill_worker()))

    def on_report(job: Job, step: int, loss: float) -> bool:
        if killer.ident is None:
            killer.start()
        return False

    long = spec.train.model_copy(update={"steps": 2000, "rungs": 100, "last": 1})
    return [Job(spec.model_copy(update={"train": long}))], on_report


def while_it_waits_for_an_answer(spec: RunSpec) -> tuple[list[Job], Callable[..., bool]]:
    def on_report(job: Job, step: int, loss: float) -> bool:
        kill_worker()
        return False

    return [Job(spec)], on_report


@pytest.mark.parametrize("moment", [while_it_trains, while_it_waits_for_an_answer])
def test_a_worker_that_is_killed(place: Workspace, moment: Callable[..., Any]) -> None:
    jobs, on_report = moment(specs(place, 1)[0])
    with pytest.raises(RuntimeError, match="a worker died.*run the same command again"):
        run(TWO, place, jobs, on_report=on_report)
    assert multiprocessing.active_children() == []


def test_a_worker_that_is_killed_before_it_reads_its_job(place: Workspace) -> None:
    jobs = [Job(specs(place, 1)[0])]

    def next_job() -> Job | None:
        if jobs:
            return jobs.pop()
        kill_worker()  # it has been started and is still importing
        return None

    with pytest.raises(RuntimeError, match="a worker died.*run the same command again"):
        run_jobs(TWO, place.corpus.folder, next_job, lambda job, result: None)
    assert multiprocessing.active_children() == []


def test_threads_are_shared_out() -> None:
    assert PoolConfig(workers=3, threads=5).threads_each == 5
    assert PoolConfig(workers=1).threads_each == cores() >= 1
    assert PoolConfig(workers=10 * cores()).threads_each == 1


def test_equal_runs_are_done_once(place: Workspace) -> None:
    one, two = specs(place, 2)
    lines: list[str] = []
    with place.ledger() as ledger:
        run_missing(
            PoolConfig(workers=1, threads=1), place.corpus.folder, ledger,
            [Job(one, "a"), Job(two, "b"), Job(one, "c")], lambda job: str(job.tag),
            lambda line, share=None: lines.append(f"{line} {share}"),
        )  # fmt: skip
        assert ledger.get(one.key) is not None
        assert ledger.get(two.key) is not None
    assert len(lines) == 2
    assert [line.split()[-1] for line in lines] == ["0.5", "1.0"]
    assert len((place.root / "ledger.jsonl").read_text().splitlines()) == 2
