"""The memory that training takes, counted by training without memory.

A model of two and one of three blocks take a step on fake tensors, which have shapes and no
data; every storage that appears is counted until it goes. Blocks are alike, so that the rest is a
straight line.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mutransfer.hardware import Precision
from mutransfer.optimizers import Matrix, Optimizers
from mutransfer.rules import BaseParams
from proxies.decoder import Decoder, DecoderConfig
from proxies.memory import Memory
from proxies.run import passes_in
from proxies.tables import decoder_table


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """Bytes that a training process takes beside its program.

    Attributes:
        weights: Parameters in fp32.
        gradients: The same again.
        moments: The optimizers' state.
        passes: Peak of what a forward and backward pass adds: activations, logits, temporaries.
        update: Peak of what the update adds: temporaries and, on logged steps, a copy of the
            weights to measure their change.
    """

    weights: int
    gradients: int
    moments: int
    passes: int
    update: int

    @property
    def state(self) -> int:
        """What is there all the time."""
        return self.weights + self.gradients + self.moments

    @property
    def peak(self) -> int:
        """The most there is at any time."""
        return self.state + max(self.passes, self.update)


def allocation(
    config: DecoderConfig,
    *,
    micro_batch: int,
    seq_len: int,
    optimizer: Matrix = "adamw",
    precision: Precision = "fp32",
    memory: Memory | None = None,
    measured: bool = True,
) -> Allocation:
    """What training a decoder takes in one process; allocates nothing itself.

    Args:
        config: The model.
        micro_batch: Sequences per pass.
        seq_len: Tokens per sequence.
        optimizer: Of the hidden matrices.
        precision: Of the passes; weights and moments are fp32.
        memory: What is computed twice.
        measured: Whether updates are measured, as the trainer does on logged steps.
    """

    def at(n_layers: int) -> Allocation:
        return _count(config.model_copy(update={"n_layers": n_layers}), micro_batch, seq_len,
                      optimizer, precision, memory or Memory(), measured)  # fmt: skip

    if config.n_layers <= 3:
        return at(config.n_layers)
    two, three = at(2), at(3)
    return Allocation(
        **{
            name: value + (getattr(three, name) - value) * (config.n_layers - 2)
            for name, value in vars(two).items()
        }
    )


class LiveStorages(TorchDispatchMode):
    """Counts the storages of the tensors that appear within, as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes, self.peak = 0, 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return out

    def added(self, work: Callable[[], object]) -> int:
        """How much more than before there was at most while `work` ran."""
        before = self.peak = self.bytes
        work()
        return self.peak - before

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.bytes -= size


def _count(
    config: DecoderConfig,
    micro_batch: int,
    seq_len: int,
    optimizer: Matrix,
    precision: Precision,
    memory: Memory,
    measured: bool,
    fake: bool = True,
) -> Allocation:
    table = decoder_table(config, config, BaseParams())
    with FakeTensorMode() if fake else nullcontext():
        model = Decoder(config)
        model.memory = memory
        optimizers = Optimizers(model, table, optimizer)
        tokens = torch.zeros(micro_batch, seq_len + 1, dtype=torch.long)

        def passes() -> None:
            with passes_in(precision, torch.device("cpu")):
                loss = model.loss(tokens)
            loss.backward()

        def update() -> None:
            before = [p.detach().clone() for p in model.parameters()] if measured else []
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers.step()
            for p, old in zip(model.parameters(), before, strict=False):
                (p.detach() - old).square().sum()

        with LiveStorages() as live:
            passes()
            optimizers.step()  # makes the moments; from here on every step is alike
            added = live.added(passes)  # into gradients that are there, as when accumulating
            updated = live.added(update)
        state = optimizers.state_tensors().values()
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        return Allocation(
            weights=weights,
            gradients=weights,
            moments=sum(t.numel() * t.element_size() for t in state),
            passes=added,
            update=updated,
        )
