"""Hyperparameters that a sweep tries first: given ones, or what an earlier sweep found."""

from __future__ import annotations

from collections.abc import Mapping

import optuna

from mutransfer.errors import UserError
from mutransfer.files import read_json
from mutransfer.rules import BaseParams
from mutransfer.schema import parse
from sweeps.experiment import Experiment


def enqueue_first(study: optuna.Study, experiment: Experiment) -> None:
    """Queues the points of `sweep.enqueue` that are not in the study yet.

    Raises:
        UserError: A file has no base hyperparameters, or one lies outside its range.
    """
    known = {trial.user_attrs.get("first") for trial in study.get_trials(deepcopy=False)}
    for index, entry in enumerate(experiment.sweep.enqueue):
        if index in known:
            continue
        where = f"sweep.enqueue[{index}]"
        point = entry if isinstance(entry, Mapping) else _found(entry, experiment, where)
        study.enqueue_trial(dict(point), user_attrs={"first": index})


def _found(path: str, experiment: Experiment, where: str) -> dict[str, float]:
    """What a bundle or a sweep's result holds of the hyperparameters that are searched here."""
    record = read_json(path)
    if not isinstance(record, dict) or "base_hyperparameters" not in record:
        raise UserError("no base hyperparameters in this file", where=f"{where}: {path}",
                        expected="a bundle.json or a sweep.json")  # fmt: skip
    params = parse(BaseParams, record["base_hyperparameters"], path)
    point = {name: getattr(params, name) for name in experiment.search}
    experiment.check_point(point, f"{where}: {path}")
    return point
