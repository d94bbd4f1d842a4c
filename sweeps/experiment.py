"""The experiment file: everything a user decides, each field with default, type and range."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import rfc8785
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from mutransfer.errors import UserError
from mutransfer.rules import DEFAULT, BaseParams, get_parametrization
from mutransfer.schema import MAX_INTEGER, find_shipped, parse, read_toml
from proxies.data import DataConfig
from proxies.decoder import DecoderConfig
from proxies.presets import get_preset
from proxies.run import TrainConfig

SHIPPED = Path(__file__).parent / "experiments"

_RECORD = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _distinct(sizes: tuple[int, ...]) -> tuple[int, ...]:
    if twice := [size for size in sizes if sizes.count(size) > 1]:
        raise ValueError(f"every one once, please; got {twice[0]} more than once")
    return sizes


Widths = Annotated[tuple[int, ...], AfterValidator(_distinct)]
Depths = Annotated[
    tuple[Annotated[int, Field(ge=1, le=4096)], ...], AfterValidator(_distinct)
]  # the same bounds as DecoderConfig.n_layers


class ProxyConfig(BaseModel):
    """The proxy: the target at another width (and depth), and nothing else."""

    model_config = _RECORD
    d_model: int = Field(32, ge=1, description="width that the sweep trains at")
    n_layers: int | None = Field(None, ge=1, description="depth; None = the target's")
    base_width: int | None = Field(None, ge=1, description="width at which m = 1; None = d_model")


class Range(BaseModel):
    """A range that a sweep searches, uniformly in the logarithm."""

    model_config = _RECORD
    low: float = Field(gt=0)
    high: float = Field(gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"low must be below high; got {self.low} and {self.high}")
        return self


def _default_search() -> dict[str, Range]:
    return {
        "lr": Range(low=2**-10, high=2**-3),
        "embedding_lr_ratio": Range(low=2**-2, high=2**3),
        "init_std": Range(low=0.01, high=0.2),
        "embedding_multiplier": Range(low=1.0, high=32.0),
        "output_multiplier": Range(low=0.5, high=32.0),
        "residual_multiplier": Range(low=0.25, high=4.0),
    }


Sampler = Literal["tpe", "surrogate", "gp", "qmc", "grid", "random"]


class SweepConfig(BaseModel):
    """How the search is run."""

    model_config = _RECORD
    trials: int = Field(40, ge=1, le=10**6, description="trials in all, over every start")
    seeds: int = Field(1, ge=1, le=100, description="seeds per trial of the search")
    confirm: int = Field(4, ge=1, le=1000, description="best trials repeated over more seeds")
    confirm_seeds: int = Field(3, ge=1, le=100, description="seeds that the winner is chosen on")
    startup: int = Field(12, ge=1, description="first trials, drawn before the model takes over")
    sampler: Sampler = Field("tpe", description="what draws the trials after the start")
    pruning: bool = Field(True, description="stop trials worse than the median at a rung")
    seed: int = Field(0, ge=0, le=MAX_INTEGER, description="of the sampler")
    enqueue: tuple[dict[str, float] | str, ...] = Field(
        (), description="tried first: tables of what is searched, bundle.json or sweep.json files"
    )
    stop: bool = Field(
        False, description="end early, once no trial is expected to gain half the noise"
    )

    @model_validator(mode="after")
    def _seeds(self) -> SweepConfig:
        if self.confirm_seeds < self.seeds:
            raise ValueError(
                f"confirm_seeds must be at least seeds; got {self.confirm_seeds} < {self.seeds}"
            )
        return self


class CoordCheckConfig(BaseModel):
    """What the coordinate check measures, and on what."""

    model_config = _RECORD
    widths: Widths = Field((32, 64, 128, 256), min_length=3, description="d_model")
    depths: Depths = Field(
        (2, 4, 8, 16), min_length=3, description="n_layers of --axis depth, at the proxy's width"
    )
    seeds: int = Field(3, ge=1, le=100)
    steps: int = Field(8, ge=2, le=10000, description="optimizer steps on one fixed batch")
    batch_size: int = Field(8, ge=1, description="sequences")
    seq_len: int = Field(64, ge=2, description="tokens")
    lr: float | None = Field(None, gt=0, description="base lr; None = params.lr")
    optimizers: tuple[str, ...] = Field(("adamw",), description="adamw, muon or both")

    @model_validator(mode="after")
    def _known(self) -> CoordCheckConfig:
        odd = set(self.optimizers) - {"adamw", "muon"}
        if odd or not self.optimizers:
            raise ValueError(f"optimizers must be adamw, muon or both; got {self.optimizers}")
        return self


class TransferCheckConfig(BaseModel):
    """The grid of the transfer check, around the learning rate that the sweep found."""

    model_config = _RECORD
    widths: Widths = Field((32, 64, 128), min_length=2, description="d_model")
    seeds: int = Field(3, ge=1, le=100)
    contrast_seeds: int | None = Field(
        None, ge=1, le=100, description="seeds of the contrast arms; None = as many"
    )
    octaves: int = Field(2, ge=1, le=20, description="grid reaches so far to both sides")
    per_octave: int = Field(1, ge=1, le=8, description="grid points per doubling of lr")
    extend: int = Field(4, ge=0, le=20, description="octaves added while an optimum is on a border")


class Experiment(BaseModel):
    """One experiment: target, proxy, parametrization, data, budgets."""

    model_config = _RECORD
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="of the run folder")
    target: DecoderConfig = Field(get_preset("tiny-256"), description="preset name, or a table")
    proxy: ProxyConfig = ProxyConfig()
    parametrization: str = Field(DEFAULT, description="rules to use")
    contrast: tuple[str, ...] = Field(("sp",), description="rules to show beside them")
    params: BaseParams = Field(BaseParams(), description="values of what is not searched")
    search: dict[str, Range] = Field(default_factory=_default_search, description="what is")
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    sweep: SweepConfig = SweepConfig()
    coord_check: CoordCheckConfig = CoordCheckConfig()
    transfer_check: TransferCheckConfig = TransferCheckConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        for name in (self.parametrization, *self.contrast):
            get_parametrization(name)
        if self.parametrization in self.contrast:
            raise UserError("a parametrization cannot be the contrast of itself", where="contrast",
                            got=self.parametrization, expected="other rules than parametrization",
                            cure="Leave it out: contrast = [] for none.")  # fmt: skip
        self._check_search()
        self._check_lengths()
        if self.data.vocab_size != self.target.vocab_size:
            raise UserError("the text's vocabulary is not the target's", where="data.vocab_size",
                            got=self.data.vocab_size,
                            expected=f"{self.target.vocab_size}, target.vocab_size")  # fmt: skip
        for width in (self.proxy.d_model, *self.coord_check.widths, *self.transfer_check.widths):
            self.model_at(width)
        if self.proxy.d_model not in self.transfer_check.widths:
            raise UserError("the proxy's width is not among the checked ones",
                            where="transfer_check.widths", got=self.transfer_check.widths,
                            expected=f"{self.proxy.d_model} among them")  # fmt: skip
        return self

    def _check_search(self) -> None:
        """Refuses a search for nothing, or for values that `BaseParams` refuses."""
        if not self.search:
            raise UserError("there is nothing to search", where="search",
                            expected="a hyperparameter with its range at least",
                            cure="lr = { low = 0.001, high = 0.125 }, for one.")  # fmt: skip
        for name, bounds in self.search.items():
            if name not in BaseParams.model_fields:
                raise UserError("cannot search an unknown hyperparameter", where=f"search.{name}",
                                got=name, expected=", ".join(BaseParams.model_fields))  # fmt: skip
            for end, value in (("low", bounds.low), ("high", bounds.high)):
                try:
                    BaseParams.model_validate({name: value})
                except ValidationError as error:
                    raise UserError(
                        "no value that this hyperparameter may have",
                        where=f"search.{name}.{end}",
                        got=value,
                        expected=error.errors()[0]["msg"].removeprefix("Input should be "),
                    ) from None

        for index, entry in enumerate(self.sweep.enqueue):
            if not isinstance(entry, str):
                self.check_point(entry, f"sweep.enqueue[{index}]")

    def check_point(self, point: Mapping[str, float], where: str) -> None:
        """Refuses hyperparameters that are not searched, or lie outside their ranges."""
        for name, value in point.items():
            if name not in self.search:
                raise UserError("this hyperparameter is not searched", where=f"{where}.{name}",
                                got=name, expected=", ".join(self.search),
                                cure="Set it in [params].")  # fmt: skip
            bounds = self.search[name]
            if not bounds.low <= value <= bounds.high:
                raise UserError("outside the range that is searched", where=f"{where}.{name}",
                                got=value, expected=f"{bounds.low:.4g} … {bounds.high:.4g}",
                                cure=f"Widen search.{name}.")  # fmt: skip

    def _check_lengths(self) -> None:
        """Refuses sequences and evaluations that do not fit; all in tokens."""
        longest = self.target.max_seq_len
        for where, got in (
            ("train", self.train.seq_len),
            ("coord_check", self.coord_check.seq_len),
        ):
            if got > longest:
                raise UserError("sequences are longer than the target's", where=f"{where}.seq_len",
                                got=got,
                                expected=f"at most {longest}, target.max_seq_len")  # fmt: skip
        if self.train.heldout_tokens < self.train.batch_tokens:
            raise UserError("fewer held-out tokens than one batch", where="train.heldout_tokens",
                            got=self.train.heldout_tokens,
                            expected=f"at least {self.train.batch_tokens}, "
                                     "batch_size x seq_len")  # fmt: skip

    @property
    def base(self) -> DecoderConfig:
        """The proxy model, which ratios refer to."""
        return self.model_at(self.proxy.d_model)

    @property
    def base_width(self) -> int:
        """Width at which m = 1."""
        return self.proxy.base_width or self.proxy.d_model

    def model_at(self, d_model: int, n_layers: int | None = None) -> DecoderConfig:
        """The target narrowed (or widened) to `d_model`, at the proxy's depth or another one."""
        return self.target.narrow(d_model, n_layers=n_layers or self.proxy.n_layers)

    @property
    def canonical(self) -> dict[str, Any]:
        """Every field, defaults included, as plain JSON values."""
        return self.model_dump(mode="json")

    @property
    def sha256(self) -> str:
        """SHA-256 over the RFC 8785 form of `canonical`."""
        return hashlib.sha256(rfc8785.dumps(self.canonical)).hexdigest()


def load_experiment(name: str) -> Experiment:
    """Reads an experiment file.

    Args:
        name: A path to a TOML file, or the name of a shipped experiment.

    Raises:
        UserError: It cannot be read, or a field is unknown, missing or out of range.
    """
    path = find_shipped(name, SHIPPED, "experiment")
    record = read_toml(path)
    record.setdefault("name", path.stem)
    if isinstance(record.get("target"), str):
        record["target"] = get_preset(record["target"]).model_dump()
    elif isinstance(record.get("target"), dict) and "preset" in record["target"]:
        changes = dict(record["target"])
        record["target"] = get_preset(changes.pop("preset")).model_dump() | changes
    return parse(Experiment, record, str(path))


def first_difference(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> str | None:
    """The first field in which two canonical experiments differ, as `a.b: 1, not 2`."""
    for key in sorted(a.keys() | b.keys()):
        left, right = a.get(key), b.get(key)
        if left == right:
            continue
        name = f"{prefix}{key}"
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            return first_difference(left, right, f"{name}.")
        return f"{name}: {left}, not {right}"
    return None
