"""Which coordinate check of an experiment: over what, how late in a run, in what precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from mutransfer.coord_expect import Axis
from mutransfer.errors import UserError
from mutransfer.optimizers import Optimizers
from proxies.data import Batches, Corpus
from proxies.decoder import Decoder, DecoderConfig, meta_decoder
from proxies.float8 import Float8
from proxies.population import MemberState
from proxies.run import TrainConfig, clip, train_steps

Precision = Literal["fp32", "bf16", "fp8"]
"""Of the forward and backward pass; weights and optimizers are fp32 throughout."""


@dataclass(frozen=True, kw_only=True)
class CoordOptions:
    """A check; the default is the one that `export` reads.

    Attributes:
        axis: What the models differ in.
        late: Steps of a proxy run that the models are trained for before the check; 0 for as
            many as the learning rate's decay allows, `None` for none.
        precision: What the model computes in. `bf16` is `torch.autocast`, as in the trainer;
            `fp8` its linear layers in FP8 under delayed scaling.
    """

    axis: Axis = "width"
    late: int | None = None
    precision: Precision = "fp32"

    @property
    def suffix(self) -> str:
        """What the names of this check's files end with; empty for the default one."""
        return "".join(f"_{word}" for word in self._words)

    @property
    def title(self) -> str:
        """Which check it was, for a verdict line: ` (depth, late, bf16)`."""
        return f" ({', '.join(self._words)})" if self._words else ""

    @property
    def _words(self) -> list[str]:
        words = {"depth": self.axis == "depth", "late": self.late is not None,
                 self.precision: self.precision != "fp32"}  # fmt: skip
        return [word for word, wanted in words.items() if wanted]

    def late_steps(self, train: TrainConfig, measured: int) -> int:
        """Steps to train before the check; 0 for none.

        Args:
            train: How proxies train.
            measured: Steps of the check itself.

        Raises:
            UserError: The check would run into the decay of the learning rate.
        """
        if self.late is None:
            return 0
        start = train.schedule.decay_start(train.steps)
        most = start - measured
        if most < max(self.late, 1):
            raise UserError(
                "the late check must end before the learning rate's decay starts",
                where="--late",
                got=f"{self.late} steps and {measured} measured ones",
                expected=f"at most {most}, as the decay starts after step {start} of {train.steps}"
                if most > 0
                else f"a decay that starts after more than {measured} steps, not {start}",
                cure="Train longer ([train] steps) or check earlier.",
            )
        return self.late or most


DEFAULT = CoordOptions()


def build(config: DecoderConfig, precision: Precision) -> Decoder:
    """A decoder that can compute in this precision; its values are still to be drawn."""
    if precision == "fp8":
        return Decoder(config, Float8(scaling="delayed"))
    return meta_decoder(config).to_empty(device="cpu")


def loss_in(model: Decoder, precision: Precision) -> Callable[[Tensor], Tensor]:
    """Tokens (batch, seq + 1) -> the loss in nats, computed in this precision."""

    def loss(tokens: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return model.loss(tokens)

    return loss


def set_scales(loss_of: Callable[[Tensor], Tensor], batch: Tensor, optimizers: Optimizers) -> None:
    """One pass that leaves FP8's delayed scaling its first scales, and nothing else.

    Without it the first pass casts with a scale of 1, whatever the size of what it casts, and
    the change after a step would be that of the scales.
    """
    loss_of(batch).backward()
    optimizers.zero_grad()


def train_until(
    steps: int,
    train: TrainConfig,
    model: Decoder,
    optimizers: Optimizers,
    loss_of: Callable[[Tensor], Tensor],
    corpus: Corpus,
    seed: int,
) -> None:
    """The first `steps` of a proxy run; what the optimizers do afterwards goes on like it.

    What a population cannot train, as FP8 is not for stacked layers.

    Args:
        steps: How many.
        train: Schedule, batches and clipping.
        model: The model, fresh.
        optimizers: Its optimizers, fresh.
        loss_of: Tokens -> loss.
        corpus: The text.
        seed: Of the order of the text.
    """
    batches = Batches(corpus.train, seq_len=train.seq_len, batch_size=train.batch_size, seed=seed)
    stretch = train_steps(
        train, model, optimizers, lambda step: loss_of(torch.from_numpy(batches.at(step)))
    )
    for _ in islice(stretch, steps):
        pass
    go_on(steps, train, model, optimizers)


def take_over(
    steps: int, train: TrainConfig, model: Decoder, optimizers: Optimizers, state: MemberState
) -> None:
    """Puts a member of a population into a model of its own, as `train_until` would leave it."""
    weights = {name: state.tensors[name] for name, _ in model.named_parameters()}
    model.load_state_dict(weights)
    optimizers.load_state_tensors(
        {name: tensor for name, tensor in state.tensors.items() if name not in weights}
    )
    go_on(steps, train, model, optimizers)


def go_on(steps: int, train: TrainConfig, model: Decoder, optimizers: Optimizers) -> None:
    """Leaves the learning rate where it is after so many steps, and has gradients clipped."""
    optimizers.set_lr(train.schedule.factor(steps, train.steps))
    # The first of the two optimizers to step clips the gradients of all.
    optimizers.aux.register_step_pre_hook(lambda *_: clip(model, train.clip_norm))
