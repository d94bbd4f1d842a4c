"""Samplers: same start, whole space, no point twice, and what the surrogate makes of trials."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState, create_trial

from mutransfer.errors import UserError
from mutransfer.schema import parse
from sweeps.experiment import Experiment, Range, SweepConfig
from sweeps.first_points import enqueue_first
from sweeps.proposal import foretell, observe, propose, warp
from sweeps.sampler import make_sampler
from sweeps.space import from_unit, grid, sobol, space_of, to_unit

SEARCH = {
    "lr": Range(low=2**-10, high=2**-2),
    "init_std": Range(low=0.01, high=0.16),
    "beta2": Range(low=0.9, high=0.99),
}
SPACE = space_of(SEARCH)
ALL = ("surrogate", "tpe", "gp", "qmc", "grid", "random")


@pytest.fixture(autouse=True)
def _quiet_optuna() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def loss(params: dict[str, float]) -> float:
    x = to_unit(SPACE, params)
    return float(2.5 + 2 * (x[0] - 0.35) ** 2 + (x[1] - 0.7) ** 2 + 0.05 * x[2])


def ask(study: optuna.Study, config: SweepConfig) -> optuna.Trial:
    study.sampler = make_sampler(config, SEARCH, len(study.trials))
    return study.ask(dict(SPACE))


def search(config: SweepConfig, trials: int, parallel: int = 1) -> optuna.Study:
    study = optuna.create_study()
    running: list[optuna.Trial] = []
    for _ in range(trials):
        running.append(ask(study, config))
        if len(running) == parallel:
            trial = running.pop(0)
            study.tell(trial, loss(trial.params))
    for trial in running:
        study.tell(trial, loss(trial.params))
    return study


def places(study: optuna.Study) -> Any:
    return np.stack([to_unit(SPACE, t.params) for t in study.trials])


def config(name: Any, **fields: Any) -> SweepConfig:
    return SweepConfig(sampler=name, **{"startup": 4, "trials": 8, **fields})


@pytest.mark.parametrize("name", ALL)
def test_a_search_is_repeated_exactly_and_leaves_no_range(name: str) -> None:
    if name == "gp":
        pytest.importorskip("scipy")
    first, second = (places(search(config(name), 7)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.min() >= -1e-9
    assert first.max() <= 1 + 1e-9
    assert len(np.unique(first.round(9), axis=0)) == 7


def test_models_have_the_same_start_and_then_part() -> None:
    tpe, ours, qmc = (places(search(config(name), 6)) for name in ("tpe", "surrogate", "qmc"))
    np.testing.assert_array_equal(tpe[:4], ours[:4])
    np.testing.assert_array_equal(tpe[:4], qmc[:4])
    assert np.abs(tpe[4:] - ours[4:]).max() > 1e-3


@pytest.mark.parametrize("parallel", [1, 4])
def test_the_surrogate_finds_the_bottom_of_a_bowl(parallel: int) -> None:
    study = search(config("surrogate"), 20, parallel)
    evenly = search(config("qmc"), 20)
    assert study.best_value - 2.5 < 0.02 < evenly.best_value - 2.5
    drawn = places(study)
    gaps = np.linalg.norm(drawn[:, None] - drawn[None], axis=-1)[np.triu_indices(20, 1)]
    assert gaps.min() > 1e-4


def test_trials_that_are_given_take_no_point_and_half_given_ones_do() -> None:
    study = optuna.create_study()
    whole = {"lr": 0.01, "init_std": 0.02, "beta2": 0.95}
    study.enqueue_trial(whole)
    study.enqueue_trial({"lr": 0.01})
    drawn = [ask(study, config("qmc")).params for _ in range(4)]
    points = [from_unit(SPACE, sobol(3, 0)(index)) for index in range(3)]
    assert drawn[0] == whole
    assert drawn[1] == points[0] | {"lr": 0.01}
    assert drawn[2:] == points[1:]


def test_a_grid_visits_every_point_once_before_it_starts_over() -> None:
    design = grid(3, 30, seed=5)
    points = {tuple(design(index)) for index in range(27)}
    assert points == {(a, b, c) for a in (0, 0.5, 1) for b in (0, 0.5, 1) for c in (0, 0.5, 1)}
    np.testing.assert_array_equal(design(27), design(0))


def trial(u: float, value: float | None, state: TrialState, rungs: dict[int, float]) -> Any:
    return create_trial(
        params=from_unit(SPACE, np.array([u, 0.5, 0.5])),
        distributions=dict(SPACE),
        value=value,
        state=state,
        intermediate_values=rungs,
    )


def test_what_trials_show() -> None:
    trials = [trial(i / 10, 2 + i / 10, TrialState.COMPLETE, {5: 3 + i / 5}) for i in range(9)]
    trials += [
        trial(0.95, None, TrialState.PRUNED, {5: 5.0}),
        trial(1.0, None, TrialState.FAIL, {}),
        trial(0.5, None, TrialState.RUNNING, {5: 3.0}),
    ]
    seen = observe(SPACE, trials)
    assert seen is not None
    np.testing.assert_allclose(seen.y, [2 + i / 10 for i in range(9)] + [3.0, 3.0])
    assert seen.extra[9] == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(seen.pending, [[0.5, 0.5, 0.5]])


def test_an_interrupted_trial_shows_nothing() -> None:
    trials = [trial(i / 10, 2.0, TrialState.COMPLETE, {}) for i in range(3)]
    cut = trial(0.9, None, TrialState.FAIL, {})
    cut.user_attrs["interrupted"] = True
    seen = observe(SPACE, [*trials, cut])
    assert seen is not None
    assert len(seen.y) == 3
    assert observe(SPACE, [trials[0], cut]) is None


def test_few_trials_shift_what_a_rung_foretells_and_many_tilt_it() -> None:
    few = [trial(0.1 * i, 2 + i / 10, TrialState.COMPLETE, {5: 3 + i / 5}) for i in range(3)]
    found = foretell(few, 5, 4.0)
    assert found is not None
    assert found[0] == pytest.approx(4.0 - 1.1)
    assert found[1] == pytest.approx(0.01)
    assert foretell(few, 6, 4.0) is None


def test_warping_keeps_the_order_and_the_scale_at_the_best() -> None:
    y = np.array([2.0, 2.001, 2.5, 4.0, 9.0])
    warped, slope = warp(y)
    assert (np.diff(warped) > 0).all()
    assert warped[0] == 2.0
    assert slope[0] == 1.0
    assert warped[1] - warped[0] == pytest.approx(0.001, rel=0.01)
    assert warped[-1] < 4.0


def test_less_is_expected_to_be_gained_as_a_search_goes_on() -> None:
    study = search(config("surrogate"), 20)
    early = propose(SPACE, study.trials[:5], np.random.default_rng(0))
    late = propose(SPACE, study.trials, np.random.default_rng(0))
    assert early is not None
    assert late is not None
    assert late.gain < early.gain / 5


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"lr": 1.0}, "outside the range that is searched"),
        ({"beta1": 0.9}, "not searched; got beta1"),
    ],
)
def test_points_that_cannot_be_tried_are_refused(
    experiment: Experiment, entry: dict[str, float], message: str
) -> None:
    record = experiment.canonical
    record["sweep"]["enqueue"] = [entry]
    with pytest.raises(UserError, match=message):
        parse(Experiment, record, "x.toml")


def test_points_are_queued_once(experiment: Experiment, tmp_path: Any) -> None:
    path = tmp_path / "sweep.json"
    path.write_text('{"base_hyperparameters": {"lr": 0.004, "init_std": 0.03}}')
    record = experiment.canonical
    record["sweep"]["enqueue"] = [{"lr": 0.01}, str(path)]
    e = Experiment.model_validate(record)
    study = optuna.create_study()
    enqueue_first(study, e)
    enqueue_first(study, e)
    assert [t.system_attrs["fixed_params"] for t in study.trials] == [{"lr": 0.01}, {"lr": 0.004}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "no base hyperparameters"),
        ('{"base_hyperparameters": {"lr": 0.5}}', r"outside the range"),
        ('{"base_hyperparameters": {"lr": "x"}}', "lr"),
    ],
)
def test_files_that_do_not_help_are_refused(
    experiment: Experiment, tmp_path: Any, text: str, message: str
) -> None:
    path = tmp_path / "sweep.json"
    path.write_text(text)
    record = experiment.canonical
    record["sweep"]["enqueue"] = [str(path)]
    study = optuna.create_study()
    with pytest.raises(UserError, match=message):
        enqueue_first(study, Experiment.model_validate(record))
    assert not study.trials


def test_an_absent_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "scipy", None)
    with pytest.raises(UserError, match=r"scipy.*mutransfer\[gp\]"):
        make_sampler(config("gp"), SEARCH, 0)


def test_places_and_hyperparameters_are_one_another() -> None:
    u = np.array([0.0, 0.25, 1.0])
    params = from_unit(SPACE, u)
    np.testing.assert_allclose(to_unit(SPACE, params), u, atol=1e-12)
    assert params["lr"] == 2**-10
    assert params["beta2"] == pytest.approx(0.99)
    assert params["init_std"] == pytest.approx(0.01 * math.sqrt(math.sqrt(16)))
