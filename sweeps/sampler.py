"""Where the next trial looks: a start that is spread evenly, then a model of the loss.

A sampler is made for one trial, seeded by its number, so that a resumed study draws what it would
have. Which point of the start or of a design a trial gets depends on how many trials were drawn
before it, in the storage that all workers share, so that no two get the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial

from mutransfer.errors import UserError
from sweeps.proposal import Proposal, propose
from sweeps.space import Design, Space, from_unit, grid, sobol, space_of, uniform
from sweeps.surrogate import Floats

if TYPE_CHECKING:
    from sweeps.experiment import Range, SweepConfig


def make_sampler(config: SweepConfig, search: Mapping[str, Range], number: int) -> BaseSampler:
    """The sampler of the trial `number`.

    Raises:
        UserError: The sampler needs a library that is not installed.
    """
    space = space_of(search)
    seed = (config.seed + 1000 * number) % 2**32
    start = sobol(len(space), config.seed)
    if config.sampler in _DESIGNS:
        design = {
            "qmc": start,
            "random": uniform(len(space), config.seed),
            "grid": grid(len(space), config.trials, config.seed),
        }[config.sampler]
        return Planned(space, design)
    return Planned(space, start, config.startup, _model(config.sampler, space, seed))


def outlook(
    config: SweepConfig, search: Mapping[str, Range], study: optuna.Study
) -> Proposal | None:
    """What the surrogate expects of a trial more, whichever sampler is at work."""
    trials = study.get_trials(deepcopy=False)
    return propose(space_of(search), trials, np.random.default_rng((config.seed, len(trials))))


_DESIGNS = ("qmc", "random", "grid")


def _model(name: str, space: Space, seed: int) -> BaseSampler:
    with warnings.catch_warnings():
        # what is marked experimental is pinned by our tests
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "tpe":
            return TPESampler(seed=seed, n_startup_trials=0, multivariate=True,
                              constant_liar=True)  # fmt: skip
        if name == "gp":
            try:
                import scipy  # type: ignore[import-untyped]  # noqa: F401
            except ImportError:
                raise UserError(
                    "this sampler needs scipy, which is not installed",
                    where="sweep.sampler",
                    got="gp",
                    cure="Run pip install 'mutransfer[gp]', or leave the default.",
                ) from None
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=0)
    return SurrogateSampler(space, seed)


class Planned(BaseSampler):
    """Points of a design for the first trials that are drawn, and then those of a model.

    Trials whose hyperparameters were all given, or are tried again, take up no point.

    Args:
        space: The search space.
        design: Its points.
        startup: How many of them; `None` is all.
        then: What takes over.
    """

    def __init__(
        self,
        space: Space,
        design: Design,
        startup: int | None = None,
        then: BaseSampler | None = None,
    ) -> None:
        self._space, self._design, self._startup, self._then = space, design, startup, then
        self._rest = RandomSampler(seed=0)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """The whole space, whatever the trials so far have."""
        return dict(self._space)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The trial's point."""
        index = sum(
            t.number < trial.number
            and not self._space.keys() <= t.system_attrs.get("fixed_params", {}).keys()
            for t in study.get_trials(deepcopy=False)
        )
        if self._startup is None or index < self._startup:
            return from_unit(self._space, self._design(index))
        assert self._then is not None
        found = self._then.sample_relative(
            study, trial, self._then.infer_relative_search_space(study, trial)
        )
        # before any trial is complete, Optuna's models know no space
        return found or from_unit(self._space, self._design(index))

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """What is not in the space: nothing, as `sample_relative` has all of it."""
        raise AssertionError(f"{param_name} is not in the search space")


class SurrogateSampler(BaseSampler):
    """Looks where the surrogate expects to gain most; see `sweeps.proposal`.

    Args:
        space: The search space.
        seed: Of the places that are looked at.
        candidates: The only places allowed in the unit cube; `None` is all.
    """

    def __init__(self, space: Space, seed: int, candidates: Floats | None = None) -> None:
        self._space, self._seed, self._candidates = space, seed, candidates

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """The whole space."""
        return dict(self._space)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The next point, or none while nothing is known."""
        trials = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
        found = propose(self._space, trials, np.random.default_rng(self._seed), self._candidates)
        return {} if found is None else from_unit(self._space, found.place)

    sample_independent = Planned.sample_independent
