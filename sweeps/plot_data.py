"""What the plots of a sweep show: its trials, their places on parallel axes, importance."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import optuna
import pandas as pd
from optuna.trial import TrialState

from mutransfer.errors import UserError
from mutransfer.transfer_fit import Floats
from mutransfer.transfer_plot import loss_ceiling
from sweeps.interrupted import is_interrupted

STATES = ("COMPLETE", "PRUNED", "FAIL")
_MIN_TRIALS, _TOP_TRIALS, _TOP_FRACTION = 10, 5, 0.1


@dataclass(frozen=True, kw_only=True)
class SweepData:
    """What the plots of a sweep show.

    Attributes:
        trials: One row per trial that ended, by number: `number`, `state` (`COMPLETE`, `PRUNED`
            or `FAIL`), `loss` (nats; NaN unless complete) and one column per hyperparameter.
            Trials that were interrupted and taken up again under another number are left out.
        parameters: The hyperparameters, as named in the study.
        log: Those that were searched on a logarithmic scale.
        best: Number of the trial that is marked as the best; `None` where none is complete.
    """

    trials: pd.DataFrame
    parameters: tuple[str, ...]
    log: frozenset[str]
    best: int | None

    @property
    def complete(self) -> pd.DataFrame:
        """The complete trials, the worst first, so that the best are drawn on top."""
        rows = self.trials[self.trials["state"] == "COMPLETE"]
        return rows.sort_values("loss", ascending=False)

    @property
    def best_row(self) -> pd.DataFrame:
        """The best trial, as a frame of one row, or of none."""
        return self.trials[self.trials["number"] == self.best]


def sweep_data(study: optuna.Study, best: int | None = None) -> SweepData:
    """Collects the trials of a study that minimizes one loss.

    Args:
        study: The study.
        best: Number of the trial to mark, where another rule than the lowest loss chose it.

    Raises:
        UserError: The study does not minimize one loss, no trial has ended, or `best` is none
            of those that did.
    """
    where = f"study {study.study_name!r}"
    if study.directions != [optuna.study.StudyDirection.MINIMIZE]:
        raise UserError("not a study that minimizes one loss", where=where,
                        got=[direction.name for direction in study.directions])  # fmt: skip
    ended = [
        trial
        for trial in study.get_trials(deepcopy=False)
        if trial.state.name in STATES and not is_interrupted(trial) and trial.params
    ]
    if not ended:
        raise UserError("no trial has ended, so there is nothing to draw", where=where)
    scales = {name: d for trial in ended for name, d in trial.distributions.items()}
    trials = pd.DataFrame(
        [
            {
                "number": trial.number,
                "state": trial.state.name,
                "loss": trial.value if trial.state == TrialState.COMPLETE else math.nan,
                **{name: trial.params.get(name, math.nan) for name in scales},
            }
            for trial in ended
        ]
    )
    if best is None and trials["loss"].notna().any():
        best = int(trials["number"].to_numpy()[trials["loss"].argmin()])
    elif best is not None and best not in set(trials["number"]):
        raise UserError("no such trial has ended", where=where, got=best)
    return SweepData(
        trials=trials,
        parameters=tuple(scales),
        log=frozenset(name for name, scale in scales.items() if getattr(scale, "log", False)),
        best=best,
    )


def importance_data(study: optuna.Study) -> tuple[pd.Series[float], str]:
    """How much each hyperparameter decides whether a trial is among the best.

    PED-ANOVA (2304.10255): how far the density of the best trials departs from that of all. The
    best are a tenth of the complete ones, but at least 5.

    Returns:
        Shares that add up to 1, largest first, and a note: how they were found, or why the
        series is empty.
    """
    complete = len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
    if complete < _MIN_TRIALS:
        empty = pd.Series(dtype=float)
        return empty, f"{complete} complete trials: importance needs at least {_MIN_TRIALS}"
    top = max(_TOP_FRACTION, _TOP_TRIALS / complete)
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=top)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    note = f"PED-ANOVA, best {math.ceil(top * complete)} of {complete} complete trials"
    return pd.Series(shares, dtype=float), "; ".join([note, *{str(w.message) for w in caught}])


def parallel_data(data: SweepData) -> tuple[Floats, Floats]:
    """Heights of the trials on parallel axes: the hyperparameters and, last, the loss.

    Returns:
        Heights in [0, 1], shape `(trial, axis)`, in the order of `data.trials`; NaN for a loss
        that is not there, 1 for one above `loss_ceiling`, and 0.5 where all are equal. And the
        ends of the axes, shape `(axis, 2)`.
    """
    values = data.trials[[*data.parameters, "loss"]].to_numpy(dtype=float)
    ends = np.full((values.shape[1], 2), math.nan)
    for axis, column in enumerate(values.T):
        known = column[~np.isnan(column)]
        if known.size:
            last = axis == values.shape[1] - 1
            ends[axis] = known.min(), loss_ceiling(known) if last else known.max()
    log = np.array([name in data.log for name in (*data.parameters, "loss")])
    low, high = np.log2(ends, where=log[:, None], out=ends.copy()).T
    scaled = np.log2(values, where=log, out=values.copy())
    heights = (scaled - low) / np.where(high > low, high - low, 1.0) + 0.5 * (high <= low)
    return np.minimum(heights, 1.0), ends
