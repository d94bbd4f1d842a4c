"""Samplers that choose among recorded points: each by what it maximizes in a sweep.

A sampler that proposes a place anywhere gets the nearest recorded point, which for a model is a
worse one than it would choose itself: nearness knows no steep and no flat directions. So the models
of `sweeps.sampler` are asked for the best of the recorded points by their own acquisition function.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.samplers import BaseSampler, GPSampler, TPESampler

from sweeps.sampler import SurrogateSampler
from sweeps.space import Space, from_unit, to_unit


class ChoosingTPE(TPESampler):
    """Multivariate TPE with the highest ratio of densities among the candidates."""

    def __init__(self, seed: int, candidates: list[dict[str, float]]) -> None:
        super().__init__(seed=seed, n_startup_trials=0, multivariate=True, constant_liar=True)
        self._candidates = candidates

    def _compute_acquisition_func(self, samples: Any, mpe_below: Any, mpe_above: Any) -> Any:
        columns = {name: np.array([c[name] for c in self._candidates]) for name in samples}
        self._best = int(super()._compute_acquisition_func(columns, mpe_below, mpe_above).argmax())
        return np.zeros(next(iter(samples.values())).size)

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        super().sample_relative(study, trial, search_space)
        return self._candidates[self._best]


class ChoosingGP(GPSampler):
    """Optuna's GP with its highest acquisition among the candidates."""

    def __init__(self, seed: int, space: Space, candidates: list[dict[str, float]]) -> None:
        super().__init__(seed=seed, n_startup_trials=0)
        self._space, self._candidates = space, candidates

    def _sample_relative_impl(
        self, study: Any, completed: Any, running: Any, search_space: Any
    ) -> Any:
        self._names = list(search_space)
        return super()._sample_relative_impl(study, completed, running, search_space)

    def _optimize_acqf(self, acqf: Any, best_params: Any) -> NDArray[Any]:
        ordered = {name: self._space[name] for name in self._names}
        places = np.stack([to_unit(ordered, c) for c in self._candidates])
        best: NDArray[Any] = places[acqf.eval_acqf_no_grad(places).argmax()]
        return best


def choosing(
    name: str, seed: int, space: Space, candidates: list[dict[str, float]]
) -> BaseSampler | None:
    """The model called `name` over the candidates; `None` for what has no model."""
    match name:
        case "tpe":
            return ChoosingTPE(seed, candidates)
        case "gp":
            return ChoosingGP(seed, space, candidates)
        case "surrogate":
            places = np.stack([to_unit(space, c) for c in candidates])
            return SurrogateSampler(space, seed, places)
    return None


def choice(
    sampler: BaseSampler, study: optuna.Study, trial: optuna.Trial, space: Space
) -> dict[str, float]:
    """What the sampler makes of a trial that is under way without hyperparameters of its own."""
    frozen = study._storage.get_trial(trial._trial_id)
    names = sampler.infer_relative_search_space(study, frozen)
    return sampler.sample_relative(study, frozen, names) or from_unit(
        space, np.full(len(space), 0.5)
    )
