"""A worker: trains the runs that it is given as one population, until there are no more.

There is one way to train on any hardware. On a GPU the population has as many members as fit and
the parent lets it have; on a CPU a few small ones share what each operation costs; compiled, where
that does not help, there is one.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from mutransfer.progress import duration
from proxies.data import open_corpus
from proxies.footprint import measure_footprint, megabytes, require_fit
from proxies.member_file import load_member, save_member
from proxies.population import Member, Population
from proxies.run import RunResult, RunSpec

COMPILE_STEPS = 10_000  # of one shape in one worker: `benchmarks/sweep_throughput.py` weighs it
CPU_MEMBERS = 8  # uncompiled, likewise


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """A run, as a worker is given it.

    Attributes:
        number: Names it between the parent and the worker.
        spec: The run.
        planned_steps: Optimizer steps of its shape that this worker can expect in all.
    """

    number: int
    spec: RunSpec
    planned_steps: int


class Parent(Protocol):
    """Whom a worker asks."""

    def take(self, room: int) -> list[Assignment]:
        """At most `room` runs, of the shape of those in training.

        To a worker without any it answers when there is one, with none where there will be no
        more.
        """

    def report(self, number: int, step: int, loss: float) -> bool:
        """Whether to stop this run after its evaluation: optimizer step, held-out loss in nats."""

    def done(self, number: int, result: RunResult | None) -> None:
        """Takes a run's result, or that it was stopped."""

    def say(self, line: str) -> None:
        """Tells the user something."""


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """What a worker works on and with.

    Attributes:
        corpus: The text's folder, as `proxies.data.prepare` left it; mapped.
        device: Such as `cpu` or `cuda:1`.
        threads: For torch's operations.
        free: Bytes of memory that this worker may take there.
        compile: Whether to `torch.compile`; `None` where it pays.
        members: Members of a population; `None`: what measures best, as far as it fits.
        saves: Folder for states of runs that take long; `None`: none are kept.
        save_every: Seconds between these.
    """

    corpus: Path
    free: int
    device: str = "cpu"
    threads: int = 1
    compile: bool | None = None
    members: int | None = None
    saves: Path | None = None
    save_every: float = 60.0


@dataclass(eq=False)
class _Place:
    """A member in training, and when it was last saved."""

    member: Member
    number: int
    saved: float = field(default_factory=time.monotonic)


class Worker:
    """Trains what it is given.

    Args:
        workplace: What with.
        parent: Whom to ask.
    """

    def __init__(self, workplace: Workplace, parent: Parent) -> None:
        torch.set_num_threads(workplace.threads)
        _keep_compiled_programs()
        self._w, self._parent = workplace, parent
        self._corpus = open_corpus(workplace.corpus)
        self._shape: tuple[object, ...] | None = None
        self._population: Population
        self._seats = 1
        self._places: list[_Place] = []

    def work(self) -> None:
        """Works until the parent has nothing more."""
        while first := self._parent.take(1):
            self._open(first[0])
            self._seat([], first)
            self._seat([], self._ask())
            while self._places:
                leave = self._advance()
                # an empty population asks for its next run above, where it may be of any shape
                self._seat(leave, self._ask() if self._places else [])

    def _ask(self) -> list[Assignment]:
        """Runs for the seats that are free."""
        free = self._seats - len(self._places)
        return self._parent.take(free) if free > 0 else []

    def _open(self, first: Assignment) -> None:
        """Makes an empty population for runs of this shape, where the last one had another."""
        spec, w = first.spec, self._w
        compile = w.compile if w.compile is not None else first.planned_steps >= COMPILE_STEPS
        if self._shape != (shape := (spec.model, spec.train, compile)):
            if self._shape is not None:
                del self._population  # before the memory for the next one is measured
            self._seats = self._count_seats(spec, compile)
            self._population = Population(self._corpus, [spec], device=w.device, compile=compile)
            self._population.exchange(list(self._population.members))
            self._shape = shape

    def _count_seats(self, spec: RunSpec, compile: bool) -> int:
        w, best = self._w, None
        if not w.device.startswith("cuda"):
            best = 1 if compile else CPU_MEMBERS
            if w.members is None and best * _at_least(spec) < w.free / 20:
                return best  # so small that it need not be measured
        footprint = measure_footprint(self._corpus, spec, device=w.device)
        require_fit(footprint, w.members or 1, w.free)
        most = footprint.fitting(w.free)
        self._parent.say(
            f"{w.device}: a member at d_model {spec.model.d_model} takes "
            f"{megabytes(footprint.per_member)}; {most} fit into the {megabytes(w.free)} that are "
            f"free" + (f", {w.members} are wanted" if w.members else "")
        )
        return w.members or min(best or most, most)

    def _seat(self, leave: list[Member], new: list[Assignment]) -> None:
        """Lets runs take the places of members that have left."""
        entries = []
        for assignment in new:
            state = None
            if (path := self._save_path(assignment.spec)) is not None:
                state = load_member(path, assignment.spec)
            if state is not None:
                step = next(
                    int(tensor) for name, tensor in state.tensors.items() if name.endswith("/step")
                )
                self._parent.say(
                    f"a run goes on from step {step} of {state.spec.train.steps}, "
                    f"after {duration(state.seconds)}"
                )
            entries.append(state or assignment.spec)
        joined = self._population.exchange(leave, entries)
        self._places += [
            _Place(member, assignment.number)
            for member, assignment in zip(joined, new, strict=True)
        ]

    def _advance(self) -> list[Member]:
        """Trains to the next evaluation; returns the members that have to leave."""
        leave, places = [], {place.member: place for place in self._places}
        for member in self._population.advance():
            place = places[member]
            pruned = member.diverged_at is None and self._parent.report(
                place.number, *member.evaluations[-1]
            )
            if not (member.done or pruned):
                continue
            leave.append(member)
            self._places.remove(place)
            self._parent.done(place.number, None if pruned else self._population.result(member))
            if (path := self._save_path(member.spec)) is not None:
                path.unlink(missing_ok=True)
        for place in self._places:
            path = self._save_path(place.member.spec)
            if path is not None and time.monotonic() - place.saved >= self._w.save_every:
                save_member(path, self._population.state(place.member))
                place.saved = time.monotonic()
        return leave

    def _save_path(self, spec: RunSpec) -> Path | None:
        return self._w.saves and self._w.saves / f"{spec.key}.safetensors"


def _at_least(spec: RunSpec) -> int:
    """Bytes that a member takes at least: weights, gradients and moments; logits and their own."""
    logits = spec.train.batch_tokens * spec.model.vocab_size
    return 4 * (4 * spec.model.n_parameters + 3 * logits)


def _keep_compiled_programs() -> None:
    """Lets compiled programs outlive the process, in a folder of the user's own."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(base) / "mutransfer" / "inductor"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
