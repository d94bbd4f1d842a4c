"""One proxy run: what it is, as data, and the program that trains it.

A `RunSpec` says everything that the result depends on, so its hash names the result: a run
that is on record is never run again, and one that was cut off is started anew.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import rfc8785
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from mutransfer.apply import initialize
from mutransfer.errors import UserError
from mutransfer.hardware import Precision
from mutransfer.optimizers import Momentum, Optimizers
from mutransfer.rules import DEFAULT, BaseParams, get_parametrization
from mutransfer.schedule import WSD, Shape
from proxies.data import Batches, Corpus, heldout_batches
from proxies.decoder import Decoder, DecoderConfig
from proxies.tables import decoder_table

_RECORD = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TrainConfig(BaseModel):
    """How long and on how much a proxy trains: the recipe's shape in fractions of the run."""

    model_config = _RECORD

    steps: int = Field(200, ge=2, le=10**7, description="optimizer steps")
    batch_size: int = Field(16, ge=1, le=2**20, description="sequences per step")
    seq_len: int = Field(128, ge=2, le=2**20, description="tokens per sequence")
    warmup: float = Field(0.1, ge=0, le=1, description="fraction of steps with rising lr")
    decay: float = Field(0.2, ge=0, le=1, description="fraction of steps with falling lr")
    final_lr: float = Field(0.0, ge=0, le=1, description="last lr over the peak")
    decay_shape: Shape = Field("wsd_exponential", description="shape of the decay")
    handover: bool = Field(False, description="hidden matrices go to Muon as the decay starts")
    momentum: Momentum = Field("seed", description="Muon's first momentum at the hand-over")
    clip_norm: float | None = Field(1.0, gt=0, description="global gradient norm, None = off")
    precision: Precision = Field(
        "fp32", description="of the passes, fp32 or bf16; weights and moments stay fp32"
    )
    rungs: int = Field(4, ge=1, le=100, description="evaluations at equal steps, for pruning")
    last: int = Field(3, ge=1, le=20, description="evaluations whose mean is the result")
    heldout_tokens: int = Field(32768, ge=1, description="held-out tokens per evaluation")

    @model_validator(mode="after")
    def _fractions(self) -> TrainConfig:
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup + decay must be at most 1; got {self.warmup} + {self.decay}")
        if self.handover and round(self.decay * self.steps) == 0:
            raise ValueError("handover happens as the decay starts, but there is no decay")
        return self

    @property
    def batch_tokens(self) -> int:
        """Tokens per optimizer step."""
        return self.batch_size * self.seq_len

    @property
    def horizon_tokens(self) -> int:
        """Tokens of the whole run."""
        return self.steps * self.batch_tokens

    @property
    def schedule(self) -> WSD:
        """The learning-rate schedule."""
        return WSD(
            warmup=self.warmup, decay=self.decay, final=self.final_lr, shape=self.decay_shape
        )

    @property
    def evaluate_after(self) -> tuple[int, ...]:
        """Steps after which the held-out loss is measured; the last few are averaged."""
        rungs = {round(self.steps * i / self.rungs) for i in range(1, self.rungs + 1)}
        gap = max(1, self.steps // 100)
        tail = {max(1, self.steps - gap * i) for i in range(self.last)}
        return tuple(sorted((rungs | tail) - {0}))


class RunSpec(BaseModel):
    """Everything that the result of one proxy run depends on."""

    model_config = _RECORD

    model: DecoderConfig
    base: DecoderConfig = Field(description="the proxy that ratios refer to")
    base_width: int = Field(ge=1, description="width at which m = 1")
    parametrization: str = DEFAULT
    rules_version: int = Field(1, ge=1, description="of the parametrization's rules")
    params: BaseParams = BaseParams()
    train: TrainConfig = TrainConfig()
    seed: int = Field(0, ge=0, description="of the initial weights and the data order")
    data: str = Field(description="fingerprint of the corpus")

    @property
    def key(self) -> str:
        """SHA-256 over the RFC 8785 form: the name of this run's result."""
        return hashlib.sha256(rfc8785.dumps(self.model_dump(mode="json"))).hexdigest()


class RunResult(BaseModel):
    """What a run measured.

    Attributes:
        key: Of the spec.
        loss: Mean held-out loss over the last evaluations, in nats; `None` if diverged.
        evaluations: (step, held-out loss) pairs.
        diverged_at: Step at which the loss stopped being finite, or ended above that of a
            uniform guess; `None` for a good run.
        tokens: Tokens trained on.
        epochs: Passes over the training text.
        seconds: Wall-clock time.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    loss: float | None
    evaluations: tuple[tuple[int, float], ...]
    diverged_at: int | None
    tokens: int
    epochs: float
    seconds: float


Report = Callable[[int, float], bool]
"""(step, held-out loss) -> whether to stop here."""


class Pruned(Exception):
    """The caller of a run asked it to stop at an evaluation."""


class Runner:
    """Trains proxies one after another in one process, reusing one model per shape.

    Args:
        corpus: The text.
        device: Where to train.
        compile: Whether to `torch.compile` each shape (once; later runs reuse it).
    """

    def __init__(self, corpus: Corpus, *, device: str = "cpu", compile: bool = False) -> None:
        self.corpus, self.device, self.compile = corpus, torch.device(device), compile
        self._models: dict[DecoderConfig, tuple[Decoder, Callable[[Tensor], Tensor]]] = {}

    def run(self, spec: RunSpec, report: Report | None = None) -> RunResult:
        """Trains one proxy from scratch.

        Args:
            spec: The run.
            report: Called after each evaluation; a true answer stops the run.

        Raises:
            Pruned: `report` asked for it.
            UserError: The spec's data or vocabulary is not the corpus's.
        """
        check(spec, self.corpus)
        started, train = time.monotonic(), spec.train
        model, compiled = self._model(spec.model)

        def loss_of(tokens: Tensor) -> Tensor:
            with passes_in(train.precision, self.device):
                return compiled(tokens)

        table = decoder_table(
            spec.model, spec.base, spec.params, spec.parametrization, base_width=spec.base_width
        )
        initialize(model, table, seed=spec.seed)
        optimizers = Optimizers(model, table)
        batches = Batches(
            self.corpus.train, seq_len=train.seq_len, batch_size=train.batch_size, seed=spec.seed
        )
        heldout = [
            self._tensor(batch)
            for batch in heldout_batches(
                self.corpus.heldout,
                seq_len=train.seq_len,
                batch_size=train.batch_size,
                max_tokens=train.heldout_tokens,
            )
        ]
        evaluations: list[tuple[int, float]] = []
        diverged_at = None
        steps = train_steps(
            train, model, optimizers, lambda step: loss_of(self._tensor(batches.at(step)))
        )
        for done in steps:
            if done in train.evaluate_after:
                value = _mean_loss(loss_of, heldout)
                if not math.isfinite(value):
                    diverged_at = done
                    break
                evaluations.append((done, value))
                if report is not None and report(done, value):
                    raise Pruned
        seconds = time.monotonic() - started
        return conclude(spec, self.corpus, evaluations, diverged_at, seconds)

    def _tensor(self, batch: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(batch).to(self.device)

    def _model(self, config: DecoderConfig) -> tuple[Decoder, Callable[[Tensor], Tensor]]:
        """The process's one model of this shape, with its loss, compiled if so wished."""
        if config not in self._models:
            model = Decoder(config).to(self.device)
            # dynamic=False: one program per shape; the multipliers are tensors, so trials share it
            loss = torch.compile(model.loss, dynamic=False) if self.compile else model.loss
            self._models[config] = (model, loss)
        return self._models[config]


def passes_in(precision: Precision, device: torch.device) -> torch.autocast:
    """What forward passes run within."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def check(spec: RunSpec, corpus: Corpus) -> None:
    """Raises `UserError` where a run's data, rules or vocabulary are not those at hand."""
    if spec.data != corpus.fingerprint:
        raise UserError("run belongs to another corpus", where="data", got=spec.data,
                        expected=corpus.fingerprint)  # fmt: skip
    known = get_parametrization(spec.parametrization).version
    if spec.rules_version != known:
        raise UserError(
            "the rules of this parametrization have another version here",
            where="rules_version",
            got=spec.rules_version,
            expected=known,
        )
    if spec.model.vocab_size != corpus.vocab_size:
        raise UserError("model and tokenizer differ in vocabulary", where="vocab_size",
                        got=spec.model.vocab_size, expected=corpus.vocab_size,
                        cure="Set model.vocab_size to the tokenizer's.")  # fmt: skip


def conclude(
    spec: RunSpec,
    corpus: Corpus,
    evaluations: Sequence[tuple[int, float]],
    diverged_at: int | None,
    seconds: float,
) -> RunResult:
    """The result of a run that came to its end, or diverged."""
    train, final = spec.train, None
    if diverged_at is None:
        last = [value for _, value in evaluations[-train.last :]]  # a short run has fewer
        final = sum(last) / len(last)
        if final >= math.log(spec.model.vocab_size):
            final, diverged_at = None, train.steps
    done = diverged_at or train.steps
    return RunResult(
        key=spec.key,
        loss=final,
        evaluations=tuple(evaluations),
        diverged_at=diverged_at,
        tokens=done * train.batch_tokens,
        epochs=done * train.batch_tokens / corpus.train_tokens,
        seconds=seconds,
    )


def train_steps(
    train: TrainConfig,
    model: nn.Module,
    optimizers: Optimizers,
    loss_at: Callable[[int], Tensor],
) -> Iterator[int]:
    """Trains a model as a proxy trains, from its first step on; yields the steps done so far.

    Args:
        train: Schedule, hand-over and clipping.
        model: The model.
        optimizers: Its optimizers, fresh.
        loss_at: Step (0-based) -> the loss of its batch, in nats.
    """
    schedule, decay_start = train.schedule, train.schedule.decay_start(train.steps)
    for step in range(train.steps):
        if train.handover and step == decay_start:
            optimizers.hand_over(train.momentum)
        optimizers.set_lr(schedule.factor(step, train.steps))
        loss_at(step).backward()
        clip(model, train.clip_norm)
        optimizers.step()
        optimizers.zero_grad()
        yield step + 1


def clip(model: nn.Module, norm: float | None) -> None:
    """Clips the gradients at this global norm; `None` leaves them."""
    if norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), norm)


def _mean_loss(loss_of: Callable[[Tensor], Tensor], batches: list[Tensor]) -> float:
    """Mean loss over equal batches; keeps grad mode so that a compiled program is reused."""
    total = sum(float(loss_of(batch).detach()) for batch in batches)
    return total / len(batches)
