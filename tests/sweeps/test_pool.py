"""Worker processes: the same runs as inline, and what arrives when one of them fails or dies."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mutransfer.errors import UserError
from mutransfer.progress import quiet
from proxies.footprint import _peak, free_memory, measure_footprint
from proxies.population import Population
from proxies.run import Runner, RunResult, RunSpec
from sweeps.desk import Desk, Job
from sweeps.experiment import Experiment
from sweeps.pool import PoolConfig, cores, run_jobs, run_missing
from sweeps.worker import COMPILE_STEPS, CPU_MEMBERS, Assignment, Worker, Workplace
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
    broken = PoolConfig(workers=2, threads=-1)  # torch has an error of its own
    with pytest.raises(RuntimeError, match="positive") as error:
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
    multiprocessing.connection.wait([worker.sentinel])  # not join(), which the pool does


def long_run(spec: RunSpec) -> RunSpec:
    train = spec.train.model_copy(update={"steps": 600, "rungs": 30, "last": 1})
    return spec.model_copy(update={"train": train})


def while_it_trains(kills: int) -> Callable[..., bool]:
    """Asked to stop a run, kills the worker a moment later: the first so many."""
    killers: list[threading.Thread] = []

    def on_report(job: Job, step: int, loss: float) -> bool:
        if len(killers) < kills and not any(killer.is_alive() for killer in killers):
            killers.append(threading.Thread(target=lambda: (time.sleep(0.1), kill_worker())))
            killers[-1].start()
        return False

    return on_report


def while_it_waits_for_an_answer(kills: int) -> Callable[..., bool]:
    killed: list[int] = []

    def on_report(job: Job, step: int, loss: float) -> bool:
        if len(killed) < kills:
            killed.append(step)
            kill_worker()
        return False

    return on_report


@pytest.mark.parametrize("moment", [while_it_trains, while_it_waits_for_an_answer])
def test_the_run_of_a_killed_worker_goes_on_in_another(
    place: Workspace, tmp_path: Path, moment: Callable[..., Any]
) -> None:
    """From where it was saved last, to the same result."""
    job = Job(long_run(specs(place, 1)[0]), "a")
    said: list[str] = []
    config = PoolConfig(workers=2, threads=1, save_every=0.0)
    results = run(
        config, place, [job], on_report=moment(2), saves=tmp_path,
        say=lambda line, share=None: said.append(line),
    )  # fmt: skip
    assert results == run(INLINE, place, [job])
    deaths = "a worker died (exit code -9); another one takes up its 1 runs"
    assert said.count(deaths) == 2
    steps = [int(re.findall(r"from step (\d+) of 600", line)[0]) for line in said if line != deaths]
    if moment is while_it_trains:  # in the other, the first may be killed before it was saved
        assert 0 < steps[0] <= steps[-1] < 600
    assert list(tmp_path.iterdir()) == [], "the state of a finished run is not kept"


def test_a_run_that_kills_three_workers_is_given_up(place: Workspace) -> None:
    jobs = [Job(spec, tag) for tag, spec in enumerate(specs(place, 2))]
    with pytest.raises(RuntimeError, match=r"a worker died.*as 2 others did.*run the same command"):
        run(TWO, place, jobs[:1], on_report=while_it_waits_for_an_answer(3))
    assert multiprocessing.active_children() == []


def test_a_worker_that_is_killed_before_it_reads_its_job(place: Workspace) -> None:
    jobs, killed = [Job(specs(place, 1)[0], "a")], list[bool]()

    def next_job() -> Job | None:
        if jobs:
            return jobs.pop()
        if not killed:
            killed.append(True)
            kill_worker()  # it has been started and is still importing
        return None

    results = []
    run_jobs(TWO, place.corpus.folder, next_job, lambda job, result: results.append(result))
    assert killed
    assert len(results) == 1


def test_a_worker_s_population_changes_nothing(place: Workspace) -> None:
    """Neither its size nor what its members are; of two shapes, no worker has both at once."""
    narrow, e = specs(place, 5), place.experiment
    wide = [place.spec(e.model_at(e.transfer_check.widths[-1]), e.params, seed) for seed in (0, 1)]
    jobs = [Job(spec, tag) for tag, spec in enumerate([*narrow[:3], *wide, *narrow[3:]])]
    alone = run(PoolConfig(workers=1, threads=1, members=1), place, jobs)
    assert run(PoolConfig(workers=1, threads=1, members=3), place, jobs) == alone
    assert run(PoolConfig(workers=2, threads=1, members=2), place, jobs) == alone
    # and by the single trainer
    runner = Runner(place.corpus)
    assert alone == {j.tag: runner.run(j.spec).model_dump(exclude={"seconds"}) for j in jobs}


class Clerk:
    """A parent that has its jobs ready, writes down what it is asked, and stops the first one."""

    def __init__(self, jobs: list[RunSpec], planned_steps: int = 0) -> None:
        self.waiting = [
            Assignment(number=n, spec=spec, planned_steps=planned_steps)
            for n, spec in enumerate(jobs)
        ]
        self.rooms: list[int] = []
        self.lines: list[str] = []
        self.results: dict[int, RunResult | None] = {}

    def take(self, room: int) -> list[Assignment]:
        self.rooms.append(room)
        given, self.waiting = self.waiting[:room], self.waiting[room:]
        return given

    def report(self, number: int, step: int, loss: float) -> bool:
        return number == 0

    def done(self, number: int, result: RunResult | None) -> None:
        self.results[number] = result

    def say(self, line: str) -> None:
        self.lines.append(line)


def test_a_free_place_is_taken_at_once(place: Workspace) -> None:
    clerk = Clerk(specs(place, 5))
    Worker(Workplace(corpus=place.corpus.folder, free=2**32, members=3), clerk).work()
    assert clerk.rooms[:4] == [1, 2, 1, 2], "one is stopped, and then two are done"
    assert [number for number, result in clerk.results.items() if result is None] == [0]
    assert sorted(clerk.results) == [0, 1, 2, 3, 4]
    assert re.fullmatch(
        r"cpu: a member at d_model \d+ takes \d+ MiB; \d+ fit into the [\d,]+ MiB that are free, "
        "3 are wanted",
        *clerk.lines,
    )


def test_members_that_do_not_fit_are_refused_before_training(
    place: Workspace,
) -> None:
    footprint = measure_footprint(place.corpus, specs(place, 1)[0])
    clerk, free = Clerk(specs(place, 1)), footprint.of(50)
    wanted = Workplace(corpus=place.corpus.folder, members=51, free=free)
    with pytest.raises(UserError, match=r"--members: a population of this size.*51, which take"):
        Worker(wanted, clerk).work()
    assert clerk.results == {}
    # what is chosen is what fits
    clerk, free = Clerk(specs(place, 1)), int(footprint.of(3) / 0.9) + 1
    Worker(Workplace(corpus=place.corpus.folder, free=free), clerk).work()
    assert clerk.rooms[:2] == [1, 2]
    clerk = Clerk(specs(place, 1))
    with pytest.raises(UserError, match=r"--members: .*at most 0"):
        Worker(Workplace(corpus=place.corpus.folder, free=footprint.of(1)), clerk).work()


def test_what_is_chosen_on_a_cpu(place: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Little to train: a small population; much: one compiled model."""
    seen: list[bool] = []

    class Spy(Population):
        def __init__(self, *args: Any, compile: bool, **rest: Any) -> None:
            seen.append(compile)
            super().__init__(*args, **rest)

    monkeypatch.setattr("sweeps.worker.Population", Spy)
    for planned, rooms in ((COMPILE_STEPS - 1, [1, CPU_MEMBERS - 1]), (COMPILE_STEPS, [1, 1])):
        clerk = Clerk(specs(place, 1), planned)
        Worker(Workplace(corpus=place.corpus.folder, free=2**34), clerk).work()
        assert clerk.rooms[:2] == rooms
    assert seen == [False, True]
    Worker(
        Workplace(corpus=place.corpus.folder, free=2**34, compile=False),
        Clerk(specs(place, 1), 10**9),
    ).work()
    assert seen[-1] is False


def test_all_workers_together_have_no_more_than_they_may(place: Workspace) -> None:
    waiting = iter([Job(spec, tag) for tag, spec in enumerate(specs(place, 5))])
    desk = Desk(2, lambda: next(waiting, None), lambda job, result: None, None, 2, 3,
                lambda spec: 0, quiet)  # fmt: skip
    assert len(desk.give(0, 8)) == 2
    assert [each.number for each in desk.give(1, 8)] == [3]
    desk.done(1, 3, None)
    assert [each.number for each in desk.give(1, 8)] == [4]


def test_what_a_worker_s_system_refuses_arrives_as_that(place: Workspace, tmp_path: Path) -> None:
    """A file is where its folder should be: a full disk would come the same way."""
    (tmp_path / "saves").write_text("")
    config = PoolConfig(workers=2, threads=1, save_every=0.0)
    with pytest.raises(OSError, match="saves") as error:
        run(config, place, [Job(specs(place, 1)[0])], saves=tmp_path / "saves")
    assert not isinstance(error.value, UserError)
    assert multiprocessing.active_children() == []


def test_each_gpu_has_its_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    free = {"cuda:0": 100, "cuda:1": 80}
    config = PoolConfig(workers=3, device="cuda")
    places = [config.workplace(index, tmp_path, None, free) for index in range(3)]
    assert [place.device for place in places] == ["cuda:0", "cuda:1", "cuda:0"]
    assert [place.free for place in places] == [50, 40, 50]
    assert PoolConfig(workers=3).workplace(0, tmp_path, None, {"cpu": 90}).free == 30


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


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_a_worker_on_a_gpu(place: Workspace, compile: bool) -> None:
    """Its members, as many as fit, end where those of a CPU do, but for rounding."""
    clerk, cpu = Clerk(specs(place, 5)), Clerk(specs(place, 5))
    free = free_memory("cuda:0")
    gpu = Workplace(corpus=place.corpus.folder, device="cuda:0", free=free, compile=compile)
    Worker(gpu, clerk).work()
    Worker(Workplace(corpus=place.corpus.folder, free=2**34), cpu).work()
    assert clerk.rooms[1] > 100, "tiny members: a GPU has room for many"
    for number in (1, 2, 3, 4):
        ours, theirs = clerk.results[number], cpu.results[number]
        assert ours is not None
        assert theirs is not None
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-3)


@pytest.mark.gpu
def test_a_gpu_s_footprint_is_linear_in_members(place: Workspace) -> None:
    spec = specs(place, 1)[0]
    footprint = measure_footprint(place.corpus, spec, device="cuda")
    assert footprint.per_member > 4 * 4 * spec.model.n_parameters
    peak = _peak(place.corpus, [spec] * 64, "cuda")
    assert peak == pytest.approx(footprint.of(64), rel=0.2)
