"""The evidence in a bundle: the study, the two checks, and whether they agree with themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from mutransfer.errors import UserError
from mutransfer.verdict import SEVERITY, Verdict, worst

if TYPE_CHECKING:
    from mutransfer.transfer_measure import Estimate

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Loss = Annotated[float, Field(ge=-1e6, le=1e6)]
State = Literal["COMPLETE", "PRUNED", "FAIL", "INTERRUPTED", "RUNNING", "WAITING"]

_STATISTICS = 1e-9  # sums in another order differ by less


class Record(BaseModel):
    """A part of a bundle: immutable, without unknown fields, NaN or infinities."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Trial(Record):
    """One trial; `losses` by seed, in nats, with their mean and its standard error."""

    number: int = Field(ge=0)
    state: State
    params: dict[str, float]
    losses: dict[str, Loss]
    mean_loss: float | None = Field(description="null without losses")
    standard_error: float | None = Field(description="null with fewer than two losses")

    @classmethod
    def of(
        cls, number: int, state: State, params: Mapping[str, float], losses: Mapping[int, float]
    ) -> Trial:
        """The trial with its mean and standard error filled in."""
        mean, error = mean_and_error(list(losses.values()))
        return cls(
            number=number,
            state=state,
            params=dict(params),
            losses={str(seed): loss for seed, loss in losses.items()},
            mean_loss=mean,
            standard_error=error,
        )


class Study(Record):
    """A whole study, with every trial, so that its selection can be repeated."""

    name: str
    selection: Literal["lowest_mean_loss"]
    seeds: tuple[int, ...] = Field(min_length=1)
    trials: tuple[Trial, ...] = Field(min_length=1)

    @property
    def winner(self) -> Trial | None:
        """Lowest mean loss among complete trials that have every seed; ties: the first."""
        seeds = {str(seed) for seed in self.seeds}
        whole = [t for t in self.trials if t.state == "COMPLETE" and t.losses.keys() == seeds]
        return min(
            whole, key=lambda t: (math.fsum(t.losses.values()) / len(seeds), t.number), default=None
        )


class Slope(Record):
    """One line of a coordinate check: slope of log2 quantity on log2 width at step `t`.

    Slope and interval are null where a quantity is zero or infinite.
    """

    optimizer: str = Field(description="of the hidden matrices")
    kind: str
    name: str
    t: int
    slope: float | None
    low: float | None
    high: float | None
    expected: float | None
    verdict: Verdict


class Size(Record):
    """One value of the replayed model; see `mutransfer.preflight.sizes`."""

    optimizer: Literal["adamw", "muon"] = Field(description="of the hidden matrices")
    kind: str
    name: str
    t: int = Field(ge=0)
    value: float = Field(ge=0)


class Replay(Record):
    """The narrowest model of the coordinate check: what it takes to measure it again."""

    width: int = Field(ge=1)
    n_layers: int = Field(ge=1)
    seed: int = Field(ge=0)
    steps: int = Field(ge=2, le=10000)
    tokens: tuple[tuple[int, ...], ...] = Field(
        min_length=1, description="its batch, (batch, seq + 1)"
    )
    sizes: tuple[Size, ...] = Field(min_length=1)


class CoordCheck(Record):
    """What the coordinate checks found, one per optimizer, and at which base learning rate."""

    verdict: Verdict
    lr: float = Field(gt=0, description="base learning rate that it ran at")
    symbolic_findings: int = Field(ge=0, description="differences from the table; any is a FAIL")
    result_sha256: Sha256
    widths: tuple[int, ...] = Field(description="of the models that it checked, if known")
    replay: Replay | None = Field(description="what `mutransfer preflight` measures again")
    slopes: tuple[Slope, ...] = Field(min_length=1)


class Optimum(Record):
    """The best learning rate at one width; null where the grid does not contain it."""

    width: int = Field(ge=1)
    log2_lr: float | None
    low: float | None
    high: float | None


class TransferCheck(Record):
    """What the transfer check found: drift in octaves, regret in nats, with their bounds."""

    verdict: Verdict
    drift: float | None
    drift_low: float | None
    drift_high: float | None
    regret: float | None
    regret_low: float | None
    regret_high: float | None
    optima: tuple[Optimum, ...]
    seeds: tuple[int, ...]
    result_sha256: Sha256


class Evidence(Record):
    """Why to believe the base hyperparameters, and that they transfer."""

    study: Study
    coord_check: CoordCheck | None
    transfer_check: TransferCheck | None


def mean_and_error(losses: list[float]) -> tuple[float | None, float | None]:
    """Mean and its standard error (with n - 1); `None` where there are too few losses."""
    n = len(losses)
    if not n:
        return None, None
    mean = math.fsum(losses) / n
    if n == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in losses) / (n - 1) / n)


def check_study(study: Study) -> Trial:
    """The winner, once every trial is there and its statistics follow from its losses.

    Raises:
        UserError: A trial is left out, a statistic is wrong, or nobody wins.
    """
    where, seeds = "evidence.study.trials", {str(seed) for seed in study.seeds}
    numbers = [trial.number for trial in study.trials]
    if numbers != list(range(len(numbers))):
        raise UserError("trials are missing or out of order", where=where, got=numbers,
                        expected=f"0 … {len(numbers) - 1}, in order")  # fmt: skip
    for trial in study.trials:
        if odd := sorted(trial.losses.keys() - seeds):
            raise UserError("losses of seeds that are not the study's",
                            where=f"{where}.{trial.number}.losses", got=odd,
                            expected=list(study.seeds))  # fmt: skip
        mean, error = mean_and_error(list(trial.losses.values()))
        for name, expected in (("mean_loss", mean), ("standard_error", error)):
            if not _agree(got := getattr(trial, name), expected):
                raise UserError("does not follow from the trial's losses",
                                where=f"{where}.{trial.number}.{name}", got=repr(got),
                                expected=repr(expected))  # fmt: skip
    if study.winner is None:
        raise UserError("no complete trial has every seed", where=where,
                        expected=f"losses of seeds {list(study.seeds)}")  # fmt: skip
    return study.winner


def check_verdicts(
    evidence: Evidence | None, base: Mapping[str, object], accept_unverified: bool, *, lr: float
) -> tuple[str, ...]:
    """Notes on verdicts other than PASS, and on what a PASS does not cover.

    Args:
        evidence: The evidence, if any.
        base: Config of the base model.
        accept_unverified: Whether a missing or failed verdict is a note, not an error.
        lr: The base learning rate of the bundle.

    Raises:
        UserError: A verdict is missing or FAIL, or better than its own numbers allow.
    """
    notes = []
    for name in ("coord_check", "transfer_check"):
        check: CoordCheck | TransferCheck | None = getattr(evidence, name, None)
        if isinstance(check, CoordCheck):
            _check_coord_numbers(check)
        elif check is not None:
            _check_transfer_numbers(check, base.get("d_model"))
        verdict: str = check.verdict if check is not None else "missing"
        if verdict in ("FAIL", "missing"):
            if not accept_unverified:
                raise UserError("no evidence that the hyperparameters transfer",
                                where=f"evidence.{name}", got=verdict, expected="PASS or WARN",
                                cure="Run the check and export again, or accept it explicitly "
                                "(--accept-unverified).")  # fmt: skip
            verdict = f"{verdict}, accepted unverified"
        if verdict != "PASS":
            notes.append(f"evidence.{name}: {verdict}")
    coord = evidence.coord_check if evidence else None
    if coord is not None and coord.lr < lr * (1 - _STATISTICS):
        notes.append(
            f"evidence.coord_check ran at learning rate {coord.lr:.3g}, below the bundle's "
            f"{lr:.3g}: what only larger steps show was not looked for"
        )
    return tuple(notes)


def _check_coord_numbers(check: CoordCheck) -> None:
    where = "evidence.coord_check"
    for index, line in enumerate(check.slopes):
        _check_interval(f"{where}.slopes.{index}.slope", line.low, line.slope, line.high)
    slopes = worst(line.verdict for line in check.slopes)
    _check_verdict(where, check.verdict, "FAIL" if check.symbolic_findings else slopes)


def _check_transfer_numbers(check: TransferCheck, proxy_width: object) -> None:
    """Drift and verdict must follow from the numbers; regret and bounds must be intervals."""
    from mutransfer.transfer import MIN_SEEDS, judge

    where = "evidence.transfer_check"
    _check_interval(f"{where}.drift", check.drift_low, check.drift, check.drift_high)
    _check_interval(f"{where}.regret", check.regret_low, check.regret, check.regret_high)
    for index, best in enumerate(check.optima):
        _check_interval(f"{where}.optima.{index}.log2_lr", best.low, best.log2_lr, best.high)
    found = {best.width: best.log2_lr for best in check.optima}
    if len(found) < len(check.optima):
        raise UserError("two optima have one width", where=f"{where}.optima",
                        got=[best.width for best in check.optima])  # fmt: skip
    known = [value for value in found.values() if value is not None]
    drift, cautions = None, [] if len(set(check.seeds)) >= MIN_SEEDS else ["few seeds"]
    if len(known) < len(found) or len(found) < 2:
        cautions.append("no drift")
    else:
        proxy = found[proxy_width if proxy_width in found else min(found)]
        assert proxy is not None
        drift = max(abs(value - proxy) for value in known)
    if not _agree(check.drift, drift):
        raise UserError("does not follow from the optima", where=f"{where}.drift",
                        got=repr(check.drift), expected=repr(drift))  # fmt: skip
    allowed, _ = judge(
        drift=_estimate(check.drift, check.drift_low, check.drift_high),
        regret=_estimate(check.regret, check.regret_low, check.regret_high),
        cautions=cautions,
    )
    _check_verdict(where, check.verdict, allowed)


def _estimate(value: float | None, low: float | None, high: float | None) -> Estimate:
    """A null bound is none."""
    from mutransfer.transfer_measure import Estimate

    return Estimate(value, -math.inf if low is None else low, math.inf if high is None else high)


def _check_interval(where: str, low: float | None, value: float | None, high: float | None) -> None:
    known = [x for x in (low, value, high) if x is not None]
    if any(a > b and not _agree(a, b) for a, b in pairwise(known)):
        raise UserError("lies outside its interval", where=where, got=value,
                        expected=f"from {low} to {high}")  # fmt: skip


def _check_verdict(where: str, verdict: Verdict, allowed: Verdict) -> None:
    if SEVERITY.index(verdict) < SEVERITY.index(allowed):
        raise UserError("better than its own numbers allow", where=f"{where}.verdict", got=verdict,
                        expected=allowed)  # fmt: skip


def _agree(got: float | None, expected: float | None) -> bool:
    if got is None or expected is None:
        return got is expected
    return math.isclose(got, expected, rel_tol=_STATISTICS, abs_tol=1e-12)
