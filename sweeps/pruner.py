"""Which trials are stopped at a rung: successive halving, with every worker deciding at once.

Asynchronous successive halving (Li et al. 2018, 1810.05934, algorithm 2), for trials that cannot be
paused: a trial goes on past a rung if it is among the best there, of all that came so far. It waits
for no other trial, and what it is compared with lies in the storage that all workers share.

All trials of a sweep have one learning-rate schedule, so that losses at equal steps are losses at
an equal fraction of it: no trial that has begun to decay is held against one that has not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import optuna
from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial

from sweeps.interrupted import is_interrupted

FACTOR = 2  # a rung stops all but the best 1 / FACTOR


class HalvingPruner(BasePruner):
    """Stops a trial that is not among the best share at a rung.

    Rungs lie at the first evaluation at or after 1/2, 1/4, 1/8 … of the run.

    Optuna's own pruner counts the rungs of a trial that was cut off and is tried again twice, and
    stops the second trial of all if it is worse than the first.

    Args:
        evaluations: Steps after which a trial reports, the last one of the run included.
        startup: Trials that a rung has to have seen before it stops one.
        factor: A rung lets the best 1 / `factor` go on.
    """

    def __init__(self, evaluations: Sequence[int], *, startup: int, factor: int = FACTOR) -> None:
        *early, steps = sorted(evaluations)
        found, at = set(), round(steps / factor)
        while early and at >= early[0]:
            found.add(next((step for step in early if step >= at), early[-1]))
            at = round(at / factor)
        self.rungs, self._startup, self._factor = tuple(sorted(found)), startup, factor

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether the trial stops at the rung that it reported last."""
        step = trial.last_step
        if step is None or step not in self.rungs:
            return False
        loss = trial.intermediate_values[step]
        others = [
            other.intermediate_values[step]
            for other in study.get_trials(deepcopy=False)
            if other.number != trial.number
            and step in other.intermediate_values
            and not is_interrupted(other)
        ]
        if len(others) < self._startup:
            return False
        better = sum(other < loss for other in others)
        return better >= math.ceil((len(others) + 1) / self._factor)
