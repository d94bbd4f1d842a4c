"""How fast this machine trains a decoder: a few passes of one and of two blocks, timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from mutransfer.apply import initialize
from mutransfer.hardware import Precision
from mutransfer.optimizers import Matrix, Optimizers
from mutransfer.rules import BaseParams
from proxies.decoder import Decoder, DecoderConfig
from proxies.memory import Memory
from proxies.run import passes_in
from proxies.tables import decoder_table


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of a step's parts.

    Attributes:
        passes: One forward and backward pass of a micro-batch.
        update: Clipping and the optimizers' step.
    """

    passes: float
    update: float


def timing(
    config: DecoderConfig,
    *,
    micro_batch: int,
    seq_len: int,
    optimizer: Matrix = "adamw",
    precision: Precision = "fp32",
    memory: Memory | None = None,
    repeats: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Times a step on the processor; deeper models are on the straight line through two depths.

    Args:
        config: The model.
        micro_batch: Sequences per pass.
        seq_len: Tokens per sequence.
        optimizer: Of the hidden matrices.
        precision: Of the passes.
        memory: What is computed twice.
        repeats: Steps timed, after one that is not; the median counts.
        clock: Seconds.
    """

    def at(n_layers: int) -> Timing:
        shape = config.model_copy(update={"n_layers": n_layers})
        model = Decoder(shape)
        table = decoder_table(shape, shape, BaseParams())
        initialize(model, table, seed=0)
        model.memory = memory or Memory()
        optimizers = Optimizers(model, table, optimizer)
        generator = torch.Generator().manual_seed(0)
        size = (micro_batch, seq_len + 1)
        tokens = torch.randint(0, shape.vocab_size, size, generator=generator)
        passes, updates = [], []
        for _ in range(repeats + 1):
            started = clock()
            with passes_in(precision, torch.device("cpu")):
                loss = model.loss(tokens)
            loss.backward()
            half = clock()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers.step()
            optimizers.zero_grad()
            passes.append(half - started)
            updates.append(clock() - half)
        return Timing(passes=statistics.median(passes[1:]), update=statistics.median(updates[1:]))

    if config.n_layers <= 2:
        return at(config.n_layers)
    one, two = at(1), at(2)
    more = config.n_layers - 1
    return Timing(
        passes=one.passes + max(0.0, two.passes - one.passes) * more,
        update=one.update + max(0.0, two.update - one.update) * more,
    )
