"""The recipe of a full-scale run: phases, and what the run owns besides the bundle.

A recipe knows steps, lengths, batches and the *shape* of the learning rate in fractions of the
peak. Everything per parameter, absolute learning rates included, is the bundle's.
"""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, Self

import rfc8785
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mutransfer.optimizers import Matrix, Momentum
from mutransfer.schedule import Shape, interpolate
from mutransfer.schema import MAX_INTEGER, find_shipped, parse, read_toml
from proxies.data import DataConfig, SourceConfig
from proxies.data.mixture import normalize
from proxies.decoder import DecoderConfig
from proxies.memory import Memory
from proxies.presets import get_preset

_RECORD = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
_DATA = "data"
_LATER = ("mixture", "mask_documents", "parametrization", "recompute", "loss_chunk")
_CADENCE = {"log_every", "checkpoint_every", "keep_last", "evaluate_every", "heldout_tokens"}


class Phase(BaseModel):
    """A stretch of steps with one sequence length, batch, learning-rate shape and optimizer."""

    model_config = _RECORD

    name: str = Field(pattern=_NAME, description="unique in the recipe")
    steps: int = Field(ge=1, le=10**9, description="optimizer steps")
    seq_len: int = Field(ge=2, le=2**24, description="tokens per sequence")
    batch_size: int = Field(ge=1, le=2**24, description="sequences per step")
    micro_batch: int | None = Field(
        None, ge=1, description="sequences per forward pass (gradient accumulation); None: all"
    )
    lr_start: float = Field(1.0, ge=0, le=1, description="fraction of the peak before step 1")
    lr_end: float = Field(1.0, ge=0, le=1, description="fraction of the peak at the last step")
    shape: Shape = Field("constant", description="how the learning rate gets there")
    optimizer: Matrix = Field("adamw", description="of the hidden matrices: adamw or muon")
    momentum: Momentum = Field(
        "seed", description="Muon's first momentum, where this phase begins with the hand-over"
    )
    recompute: bool = Field(
        False, description="whether blocks are computed again in the backward pass, to save memory"
    )
    loss_chunk: int | None = Field(
        None, ge=1, description="tokens whose logits exist at a time; None: of all of micro_batch"
    )
    mixture: dict[str, float] | None = Field(
        None, description="weights of the sources; None: those of the recipe"
    )

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.shape == "constant" and self.lr_start != self.lr_end:
            raise ValueError(
                f"shape is constant but lr_start is {self.lr_start} and lr_end {self.lr_end}; "
                "make them equal or name another shape"
            )
        if self.batch_size % self.micro:
            raise ValueError(
                f"micro_batch {self.micro} does not divide batch_size {self.batch_size}"
            )
        return self

    @property
    def micro(self) -> int:
        """Sequences per forward pass."""
        return self.micro_batch or self.batch_size

    @property
    def memory(self) -> Memory:
        """What its passes compute twice."""
        return Memory(loss_chunk=self.loss_chunk, recompute=self.recompute)

    @property
    def batch_tokens(self) -> int:
        """Tokens per optimizer step."""
        return self.batch_size * self.seq_len

    @property
    def tokens(self) -> int:
        """Tokens of the whole phase."""
        return self.steps * self.batch_tokens

    def factor(self, index: int) -> float:
        """Fraction of the peak at step `index` (0-based) of the phase; the last has `lr_end`."""
        return interpolate(self.shape, (index + 1) / self.steps, self.lr_start, self.lr_end)


class Conversion(BaseModel):
    """Which rule converts what the bundle was tuned for to this run; absent: none may differ."""

    model_config = _RECORD

    batch_rule: Literal["sqrt", "constant"] | None = Field(
        None,
        description="for another batch: `sqrt` multiplies the peak learning rates by "
        "sqrt(B / tuned B) (Malladi et al., 2205.10287, without their change of betas and eps; "
        "coupled weight decay stays, so lr * wd follows); `constant` leaves them",
    )
    horizon_rule: Literal["constant"] | None = Field(
        None, description="for another number of tokens: `constant` leaves the learning rates"
    )


class Recipe(BaseModel):
    """Everything that a run owns; see the module's description."""

    model_config = _RECORD

    name: str = Field(pattern=_NAME, description="names the run folder")
    model: DecoderConfig = Field(description="a preset's name or a table; the bundle's target")
    parametrization: str | None = Field(
        None, description="name of the rules that the bundle must be of; None: any"
    )
    data: DataConfig = Field(
        DataConfig(),
        description="the tokenizer, the held-out text and, without a mixture, the text",
    )
    sources: dict[Annotated[str, Field(pattern=_NAME)], SourceConfig] = Field(
        {}, description="what mixtures may name, beside `data`: the training text of [data]"
    )
    mixture: dict[str, float] | None = Field(
        None, description="weight of each source in phases without their own; None: all of `data`"
    )
    mask_documents: bool = Field(False, description="whether attention stays within a document")
    conversion: Conversion = Field(
        default_factory=Conversion, description="rules for another batch or horizon"
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="of the forward and backward pass; weights and moments stay fp32"
    )
    clip_norm: float | None = Field(None, gt=0, description="global gradient norm; None: off")
    seed: int = Field(
        0, ge=0, le=MAX_INTEGER, description="of the initial weights and the data order"
    )
    max_skipped: int = Field(
        10, ge=1, description="non-finite steps in a row after which the run gives up"
    )
    log_every: int = Field(10, ge=1, description="steps between lines of metrics")
    checkpoint_every: int | None = Field(
        None, ge=1, description="steps between checkpoints; None: only at the end or when stopped"
    )
    keep_last: int = Field(3, ge=1, description="checkpoints to keep")
    evaluate_every: int | None = Field(
        None, ge=1, description="steps between evaluations; None: only as phases end"
    )
    heldout_tokens: int = Field(65536, ge=1, description="held-out tokens per evaluation")
    phases: tuple[Phase, ...] = Field(min_length=1, description="in order")

    @field_validator("model", mode="before")
    @classmethod
    def _preset(cls, value: object) -> object:
        return get_preset(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        names = [phase.name for phase in self.phases]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two phases are called {twice[0]!r}")
        for before, after in pairwise(self.phases):
            if before.optimizer == "muon" and after.optimizer == "adamw":
                raise ValueError(
                    f"phase {after.name!r} goes back from muon to adamw; the hand-over goes one way"
                )
        for phase in self.phases:
            if phase.seq_len > self.model.max_seq_len:
                raise ValueError(
                    f"phase {phase.name!r} has seq_len {phase.seq_len}, but the model's "
                    f"max_seq_len is {self.model.max_seq_len}"
                )
        if self.data.vocab_size != self.model.vocab_size:
            raise ValueError(
                f"data.vocab_size is {self.data.vocab_size}, but the model's is "
                f"{self.model.vocab_size}"
            )
        self._require_mixtures()
        first = self.phases[0]
        if self.heldout_tokens < (least := first.micro * first.seq_len):
            raise ValueError(
                f"heldout_tokens is {self.heldout_tokens}; one forward pass of the first phase "
                f"takes {least}"
            )
        return self

    def _require_mixtures(self) -> None:
        """Every phase has a mixture, or none; sources are named, used and kept from held-out."""
        if _DATA in self.sources:
            raise ValueError(
                "a source cannot be called 'data'; that is the training text of [data]"
            )
        named: set[str] = set()
        for phase in self.phases if self.mixed else ():
            if (weights := self.mixture_of(phase)) is None:
                raise ValueError(f"phase {phase.name!r} has no mixture, but others have")
            normalize(weights, f"mixture of phase {phase.name!r}")
            if unknown := sorted(weights.keys() - self.sources.keys() - {_DATA}):
                known = ", ".join((*self.sources, _DATA))
                raise ValueError(
                    f"the mixture of phase {phase.name!r} names {unknown[0]!r}; sources: {known}"
                )
            named |= weights.keys()
        if unused := sorted(self.sources.keys() - named):
            raise ValueError(f"no mixture of a phase names the source {unused[0]!r}")
        for name, source in self.sources.items():
            if source.text and not self.data.heldout:
                raise ValueError(
                    f"source {name!r} is text, so data.heldout must name the held-out text: what "
                    "is split off data.train could be in the source too"
                )

    @property
    def mixed(self) -> bool:
        """Whether the run trains on a mixture."""
        return self.mixture is not None or any(p.mixture is not None for p in self.phases)

    def mixture_of(self, phase: Phase) -> dict[str, float] | None:
        """The given weights of a phase, its own or the recipe's."""
        return self.mixture if phase.mixture is None else phase.mixture

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return sum(phase.steps for phase in self.phases)

    @property
    def horizon_tokens(self) -> int:
        """Tokens of the whole run."""
        return sum(phase.tokens for phase in self.phases)

    @property
    def batch_tokens(self) -> int:
        """Tokens per step of the first phase that stays at the peak, or else of the first.

        It is what the bundle's `batch_tokens` is compared with. Later changes of batch are the
        recipe's own and leave the learning rate alone, as in the reference's second stable phase.
        """
        stable = (p for p in self.phases if p.shape == "constant" and p.lr_end == 1)
        return next(stable, self.phases[0]).batch_tokens

    @property
    def sha256(self) -> str:
        """Over the RFC 8785 form of all that decides the weights.

        Left out: how often something is logged, evaluated or saved, which may change between
        two launches of a run, and `data` and `sources`, which fingerprints of the content stand
        for. What came later is left out where it is off, so that older checkpoints fit.
        """
        content = self.model_dump(mode="json", exclude=_CADENCE | {"data", "sources"})
        for record in (content, *content["phases"]):
            for name in _LATER:
                if not record.get(name):
                    record.pop(name, None)
        return hashlib.sha256(rfc8785.dumps(content)).hexdigest()

    def at(self, step: int) -> tuple[Phase, int]:
        """The phase of `step` (0-based) and the step's number within it (0-based).

        Raises:
            IndexError: The run has no such step.
        """
        if step >= 0:
            for phase in self.phases:
                if step < phase.steps:
                    return phase, step
                step -= phase.steps
        raise IndexError("the recipe has no such step")

    def tokens_before(self, step: int) -> int:
        """Tokens consumed by the first `step` steps."""
        tokens = 0
        for phase in self.phases:
            tokens += min(step, phase.steps) * phase.batch_tokens
            step -= min(step, phase.steps)
        return tokens

    @property
    def jumps(self) -> tuple[str, ...]:
        """Where the learning rate does not go on from where the phase before left it."""
        return tuple(
            f"the learning rate jumps from {before.lr_end:g} to {after.lr_start:g} of the peak "
            f"as {after.name} starts"
            for before, after in pairwise(self.phases)
            if before.lr_end != after.lr_start
        )


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Reads a recipe: the path of a `.toml` file, or the name of a shipped one.

    Raises:
        UserError: There is none, it is not TOML, or a field is unknown, missing or wrong.
    """
    path = find_shipped(str(name_or_path), Path(__file__).parent / "recipes", "recipe")
    return parse(Recipe, read_toml(path), str(name_or_path))
