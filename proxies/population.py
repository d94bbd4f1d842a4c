"""Many proxies of one shape, trained together in one program, each as if it were alone.

A population is a stack of members that may differ in base hyperparameters, parametrization
and seed. Each has its own step count, so that one may leave and another take its place at any
time; none reads another's numbers, so that one that diverges does no harm.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from mutransfer.apply import initialize
from mutransfer.errors import UserError
from mutransfer.optimizers import Matrix
from mutransfer.stacked_optimizers import StackedOptimizers
from mutransfer.table import Table
from proxies.data import Batches, Corpus, heldout_batches
from proxies.decoder import Decoder, next_token_loss
from proxies.run import RunResult, RunSpec, check, conclude, passes_in
from proxies.stacked import Stacked
from proxies.tables import decoder_table

Prune = Callable[[RunSpec, int, float], bool]
"""(run, step, held-out loss) -> whether to stop it here."""


@dataclass(frozen=True, kw_only=True)
class MemberState:
    """All that it takes to go on with one member, here or alone.

    Attributes:
        spec: Its run.
        evaluations: (step, held-out loss) pairs so far.
        seconds: Its share of the wall-clock time so far.
        tensors: Weights by their names in the single model, and `Optimizers.state_tensors`.
    """

    spec: RunSpec
    evaluations: tuple[tuple[int, float], ...]
    seconds: float
    tensors: dict[str, Tensor]


@dataclass(eq=False, kw_only=True)
class Member:
    """One run of a population.

    Attributes:
        spec: The run.
        step: Steps done.
        evaluations: (step, held-out loss) pairs so far, finite ones only.
        diverged_at: Step of the evaluation that was not finite.
        seconds: Its share of the wall-clock time: that of the population over its members.
    """

    spec: RunSpec
    step: int = 0
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    diverged_at: int | None = None
    seconds: float = 0.0

    @property
    def done(self) -> bool:
        """Whether there is nothing left to train."""
        return self.diverged_at is not None or self.step >= self.spec.train.steps


class Population:
    """Proxies of one shape and training configuration in one stack.

    Args:
        corpus: The text.
        specs: The runs; equal in `model` and `train`.
        device: Where to train.
        dtype: Of weights and optimizer states.
        matrix: Which optimizer the hidden matrices start with.
        compile: Whether to `torch.compile` the stack's losses, once per size of the stack. The
            stack then keeps its size as members leave, with copies in their places that no longer
            learn, and is halved as half of it has left.

    Attributes:
        members: Those in the stack, in its order; copies lie behind them.

    Raises:
        UserError: There is no run, two differ in shape, or one is not of this corpus.
    """

    def __init__(
        self,
        corpus: Corpus,
        specs: Sequence[RunSpec],
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        matrix: Matrix = "adamw",
        compile: bool = False,
    ) -> None:
        if not specs:
            raise UserError("a population needs members", where="specs", expected="at least one")
        self.corpus, self.device = corpus, torch.device(device)
        self.model_config, self.train = specs[0].model, specs[0].train
        for spec in specs:
            self._check(spec)
        train = self.train
        # one member alone: where initial weights are drawn, as the single model draws them
        self._single = Decoder(self.model_config).to(self.device, dtype)
        self._model = Decoder(self.model_config, Stacked(len(specs))).to(self.device, dtype)
        self._compile = compile
        self._losses = _compiled(self._model) if compile else self._model.losses
        self._batches: dict[int, Batches] = {}
        self._heldout = [
            torch.from_numpy(batch).to(self.device)
            for batch in heldout_batches(
                corpus.heldout,
                seq_len=train.seq_len,
                batch_size=train.batch_size,
                max_tokens=train.heldout_tokens,
            )
        ]
        self._optimizers = StackedOptimizers(
            self._model, self._single, [_table(spec) for spec in specs], matrix
        )
        self.members = [Member(spec=spec) for spec in specs]
        for row, spec in enumerate(specs):
            self._put(row, spec)

    def run(
        self, waiting: Iterable[RunSpec] = (), prune: Prune | None = None
    ) -> Iterator[RunResult]:
        """Trains until nobody is left, and yields results as they come.

        Args:
            waiting: Runs that take the places of those that end.
            prune: Asked at every evaluation; a run that it stops has no result.
        """
        queue = iter(waiting)
        while self.members:
            leave = []
            for member in self.advance():
                pruned = (
                    member.diverged_at is None
                    and prune is not None
                    and prune(member.spec, *member.evaluations[-1])
                )
                if member.done or pruned:
                    leave.append(member)
                    if not pruned:
                        yield self.result(member)
            self.exchange(leave, list(islice(queue, len(leave))))

    def advance(self) -> list[Member]:
        """Trains until members come to an evaluation; returns them, evaluated.

        Members that are done leave first.
        """
        self.exchange([member for member in self.members if member.done])
        started, due = time.monotonic(), list[int]()
        while self.members and not due:
            self.step()
            at = self.train.evaluate_after
            due = [row for row, member in enumerate(self.members) if member.step in at]
        evaluated = [self.members[row] for row in due]
        for member, loss in zip(evaluated, self.evaluate(evaluated), strict=True):
            if math.isfinite(loss):
                member.evaluations.append((member.step, loss))
            else:
                member.diverged_at = member.step
        for member in self.members:
            member.seconds += (time.monotonic() - started) / len(self.members)
        return evaluated

    def exchange(
        self, leave: Collection[Member] = (), join: Sequence[RunSpec | MemberState] = ()
    ) -> list[Member]:
        """Takes members out and puts new ones, or states of earlier ones, in their places.

        The rest is moved together where fewer join than leave. A state moves to this device.

        Returns:
            The new members.

        Raises:
            UserError: A run is not of this shape or corpus.
        """
        for entry in join:
            self._check(entry if isinstance(entry, RunSpec) else entry.spec)
        joined = [
            Member(spec=entry)
            if isinstance(entry, RunSpec)
            else Member(spec=entry.spec, evaluations=list(entry.evaluations), seconds=entry.seconds)
            for entry in join
        ]
        waiting, places = list(joined), list[tuple[int, Member]]()
        for row, member in enumerate(self.members):
            if member not in leave:
                places.append((row, member))
            elif waiting:
                places.append((row, waiting.pop(0)))
        places += [(0, member) for member in waiting]
        rows = [row for row, _ in places]
        if self._compile and self._size < 2 * len(rows):
            rows += [rows[0]] * (self._size - len(rows))
        if rows and rows != list(range(self._size)):
            self._optimizers.select(rows)
            index = torch.tensor(rows, device=self.device)
            for name, buffer in self._model.named_buffers():
                setattr(self._model, name, buffer.index_select(0, index))
        self.members = [member for _, member in places]
        for member, entry in zip(joined, join, strict=True):
            self._put(self.members.index(member), entry)
        return joined

    def result(self, member: Member) -> RunResult:
        """What a member measured that is done."""
        return conclude(
            member.spec, self.corpus, member.evaluations, member.diverged_at, member.seconds
        )

    def state(self, member: Member) -> MemberState:
        """A copy of a member, for a checkpoint or for `exchange`."""
        row = self.members.index(member)
        live = {name: p.detach()[row] for name, p in self._model.named_parameters()}
        live |= self._optimizers.state_tensors(row)
        return MemberState(
            spec=member.spec,
            evaluations=tuple(member.evaluations),
            seconds=member.seconds,
            tensors={name: tensor.clone() for name, tensor in live.items()},
        )

    @property
    def _size(self) -> int:
        """Rows of the stack; more than members where copies fill it, or where all have left."""
        return len(self._optimizers.steps)

    def _check(self, spec: RunSpec) -> None:
        check(spec, self.corpus)
        for name, expected in (("model", self.model_config), ("train", self.train)):
            if getattr(spec, name) != expected:
                raise UserError("members of a population have one shape", where=name,
                                got=getattr(spec, name), expected=expected)  # fmt: skip

    @torch.no_grad()
    def _put(self, row: int, entry: RunSpec | MemberState) -> None:
        """Fills a row with a fresh member, or with one that goes on."""
        spec = entry if isinstance(entry, RunSpec) else entry.spec
        table = _table(spec)
        initialize(self._single, table, seed=spec.seed)
        stacked = dict(self._model.named_parameters()) | dict(self._model.named_buffers())
        for name, tensor in (*self._single.named_parameters(), *self._single.named_buffers()):
            stacked[name][row].copy_(tensor)
        self._optimizers.reset(row, table)
        if isinstance(entry, MemberState):
            weights = {name for name, _ in self._single.named_parameters()}
            for name in weights:
                if name not in entry.tensors:
                    raise UserError("a weight is missing from the member's state", where=name)
                stacked[name][row].copy_(entry.tensors[name])
            rest = {name: t for name, t in entry.tensors.items() if name not in weights}
            self._optimizers.load_state_tensors(row, rest)
        self.members[row].step = int(self._optimizers.steps[row])

    def step(self) -> None:
        """One step of every member, in the order of `proxies.run.train_steps`."""
        train, schedule = self.train, self.train.schedule
        if train.handover:
            start = schedule.decay_start(train.steps)
            rows = [row for row, member in enumerate(self.members) if member.step == start]
            self._optimizers.hand_over(rows, train.momentum)
        factors = [schedule.factor(m.step, train.steps) for m in self.members]
        batches = [self._stream(m.spec.seed).at(m.step) for m in self.members]
        copies = self._size - len(self.members)
        self._optimizers.set_lr(factors + [0.0] * copies)
        tokens = torch.from_numpy(np.stack(batches + batches[:1] * copies))
        with passes_in(train.precision, self.device):
            losses = self._losses(tokens.to(self.device))
        losses.sum().backward()
        self._optimizers.step(train.clip_norm)
        self._optimizers.zero_grad()
        for member in self.members:
            member.step += 1

    def _stream(self, seed: int) -> Batches:
        """The batches of a seed, shared by all members that have it."""
        if seed not in self._batches:
            seeds = {member.spec.seed for member in self.members}
            self._batches = {s: b for s, b in self._batches.items() if s in seeds}
            self._batches[seed] = Batches(
                self.corpus.train,
                seq_len=self.train.seq_len,
                batch_size=self.train.batch_size,
                seed=seed,
            )
        return self._batches[seed]

    def evaluate(self, members: Sequence[Member]) -> list[float]:
        """Mean held-out losses of these members, in nats; a compiled stack computes them all."""
        if not members:
            return []
        rows = [self.members.index(member) for member in members]
        with passes_in(self.train.precision, self.device):
            if self._compile:  # with gradients, and in the shape that training compiled
                losses = [
                    self._losses(batch.repeat(self._size, 1, 1)).detach()[rows]
                    for batch in self._heldout
                ]
            else:
                with torch.no_grad():
                    losses = self._losses_of(rows)
        each = torch.stack(losses, 1).tolist()
        return [sum(values) / len(values) for values in each]

    def _losses_of(self, rows: list[int]) -> list[Tensor]:
        """Held-out losses of these members alone, batch by batch: (rows,)."""
        tensors: dict[str, Tensor] = {}
        if rows != list(range(self._size)):
            live = (*self._model.named_parameters(), *self._model.named_buffers())
            tensors = {name: tensor[rows] for name, tensor in live}
        losses = []
        for batch in self._heldout:
            logits = functional_call(self._model, tensors, (batch[..., :-1],))
            losses.append(torch.stack([next_token_loss(one, batch) for one in logits]))
        return losses


def _compiled(model: Decoder) -> Callable[[Tensor], Tensor]:
    """Its losses, compiled: one program per shape, and an error where there would be too many."""
    limits = torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True)
    return limits(torch.compile(model.losses, dynamic=False))  # type: ignore[no-any-return]


def _table(spec: RunSpec) -> Table:
    return decoder_table(
        spec.model, spec.base, spec.params, spec.parametrization, base_width=spec.base_width
    )
