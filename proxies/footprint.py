"""How many members of a population a device has memory for, by measuring one step of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mutransfer.errors import UserError
from proxies.allocation import LiveStorages
from proxies.data import Corpus
from proxies.population import Population
from proxies.run import RunSpec

_SPARE = 0.1  # of the free memory, for what fragments and for what other programs take


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Peak memory of a population, in bytes: `fixed`, and `per_member` for each of its members."""

    fixed: int
    per_member: int

    def of(self, members: int) -> int:
        """Peak of so many."""
        return self.fixed + members * self.per_member

    def fitting(self, free: int) -> int:
        """The most members that fit into this many bytes, a tenth spared; may be none."""
        return max(0, int((free * (1 - _SPARE) - self.fixed) // self.per_member))


def measure_footprint(corpus: Corpus, spec: RunSpec, *, device: str = "cpu") -> Footprint:
    """Builds one and two members, takes two steps with each and evaluates; uncompiled.

    The second step is that of the hand-over to Muon, where there is one.

    A compiled step keeps less, so that it fits too. What the step allocates on a CPU is counted
    operation by operation, on a GPU by its allocator.
    """
    if torch.device(device).type == "cuda":
        _peak(corpus, [spec], device)  # libraries take their workspaces once, and keep them
    one, two = (_peak(corpus, [spec] * members, device) for members in (1, 2))
    return Footprint(fixed=max(0, 2 * one - two), per_member=max(1, two - one))


def free_memory(device: str = "cpu") -> int:
    """Bytes that this process may still allocate there.

    Raises:
        UserError: A CPU's system does not tell.
    """
    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free) + idle
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError as error:
        raise UserError(
            "the free memory is unknown on this system", where="/proc/meminfo",
            cure="Sweeps need Linux, which tells.",
        ) from error  # fmt: skip
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))


def require_fit(footprint: Footprint, members: int, free: int) -> None:
    """Refuses more members than fit.

    Raises:
        UserError: They do not.
    """
    if members > (most := footprint.fitting(free)):
        raise UserError(
            "a population of this size does not fit into the free memory",
            where="--members",
            got=f"{members}, which take {megabytes(footprint.of(members))} of {megabytes(free)}",
            expected=f"at most {most}, at {megabytes(footprint.per_member)} each",
            cure="Lower it, or leave it out to have it measured."
            if most
            else "Lower [train] batch_size, or use a smaller proxy.",
        )


def megabytes(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / 2**20:,.0f} MiB"


def _peak(corpus: Corpus, specs: Sequence[RunSpec], device: str) -> int:
    train = specs[0].train

    def work() -> None:
        population = Population(corpus, specs, device=device)
        population.step()
        for member in population.members:  # on to the hand-over, if there is one
            member.step = max(member.step, member.spec.train.schedule.decay_start(train.steps))
        population.step()
        population.evaluate(population.members)

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return int(torch.cuda.max_memory_allocated(device)) - before
    with LiveStorages() as live:
        peak: int = live.added(work)
        return peak
