"""The plots of a sweep: the data from a study, and what the figures mark."""

from __future__ import annotations

import math
from io import BytesIO

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from mutransfer.errors import UserError
from sweeps.plot_data import importance_data, parallel_data, sweep_data
from sweeps.plots import importance_figure, parallel_figure, slice_figure, sweep_figures

SPACE = {
    "lr": FloatDistribution(2**-10, 2**-2, log=True),
    "init_std": FloatDistribution(0.01, 1.0, log=True),
    "mix": FloatDistribution(0.0, 1.0),
}


def add(
    study: optuna.Study,
    lr: float,
    init_std: float,
    mix: float,
    loss: float | None,
    state: TrialState = TrialState.COMPLETE,
    **attributes: object,
) -> None:
    study.add_trial(
        create_trial(
            params={"lr": lr, "init_std": init_std, "mix": mix},
            distributions=SPACE,  # type: ignore[arg-type]
            value=loss,
            state=state,
            user_attrs=attributes,
        )
    )


@pytest.fixture
def study() -> optuna.Study:
    study = optuna.create_study(study_name="tiny")
    add(study, 2**-8, 0.1, 0.0, 3.0)
    add(study, 2**-6, 0.1, 0.5, 2.0)
    add(study, 2**-4, 0.1, 1.0, 2.5)
    add(study, 2**-2, 0.1, 0.5, None, TrialState.FAIL)
    add(study, 2**-10, 0.1, 0.25, 9.0, TrialState.PRUNED)
    add(study, 2**-6, 0.1, 0.5, None, TrialState.FAIL, interrupted=True)
    study.enqueue_trial({"lr": 2**-5})
    return study


def test_data_hold_what_ended_and_the_best(study: optuna.Study) -> None:
    data = sweep_data(study)
    assert data.parameters == ("lr", "init_std", "mix")
    assert data.log == {"lr", "init_std"}
    assert data.best == 1
    assert data.trials["number"].tolist() == [0, 1, 2, 3, 4]
    assert data.trials["state"].tolist() == ["COMPLETE"] * 3 + ["FAIL", "PRUNED"]
    # a pruned trial's last report is not a final loss
    np.testing.assert_equal(data.trials["loss"].tolist(), [3, 2, 2.5, math.nan, math.nan])
    assert data.complete["loss"].tolist() == [3, 2.5, 2]


def test_another_rule_may_choose_the_best(study: optuna.Study) -> None:
    assert sweep_data(study, best=2).best_row["loss"].tolist() == [2.5]
    with pytest.raises(UserError, match="no such trial"):
        sweep_data(study, best=5)


def test_parallel_axes_are_scaled_as_searched(study: optuna.Study) -> None:
    heights, ends = parallel_data(sweep_data(study))
    assert heights[:, 0] == pytest.approx([0.25, 0.5, 0.75, 1, 0])  # octaves
    assert heights[:, 1] == pytest.approx([0.5] * 5)  # all equal: in the middle
    assert heights[:, 2] == pytest.approx([0, 0.5, 1, 0.5, 0.25])
    np.testing.assert_allclose(heights[:, 3], [1, 0, 0.5, math.nan, math.nan])
    np.testing.assert_allclose(ends, [[2**-10, 2**-2], [0.1, 0.1], [0, 1], [2, 3]])


def test_parallel_axes_cut_a_loss_that_would_flatten_the_rest(study: optuna.Study) -> None:
    add(study, 2**-3, 0.1, 0.5, 90.0)
    heights, ends = parallel_data(sweep_data(study))
    assert ends[3].tolist() == [2, 5]  # median 2.75
    assert heights[-1, 3] == 1


def test_importance_finds_the_parameter_that_matters() -> None:
    rng, study = np.random.default_rng(0), optuna.create_study()
    for _ in range(60):
        lr = 2 ** rng.uniform(-10, -2)
        add(study, lr, 10 ** rng.uniform(-2, 0), rng.uniform(), 2 + (math.log2(lr) + 6) ** 2)
    shares, note = importance_data(study)
    assert shares.index[0] == "lr"
    assert shares["lr"] > 0.7
    assert shares.sum() == pytest.approx(1)
    assert note == "PED-ANOVA, best 6 of 60 complete trials"


def test_importance_of_too_few_trials_is_not_invented(study: optuna.Study) -> None:
    shares, note = importance_data(study)
    assert shares.empty
    assert note == "3 complete trials: importance needs at least 10"
    (axes,) = importance_figure(shares, note).axes
    assert note in axes.get_title()
    assert not axes.patches


def test_importance_bars_show_the_shares() -> None:
    rng, study = np.random.default_rng(1), optuna.create_study()
    for _ in range(12):
        add(study, 2 ** rng.uniform(-9, -3), 10 ** rng.uniform(-2, 0), rng.uniform(), rng.uniform())
    shares, note = importance_data(study)
    (axes,) = importance_figure(shares, note).axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(shares.tolist())
    assert note.startswith("PED-ANOVA, best 5 of 12")


def test_slices_mark_the_best_the_pruned_and_the_failed(study: optuna.Study) -> None:
    figure = slice_figure(sweep_data(study))
    lr, _, mix = figure.axes
    assert [axes.get_xscale() for axes in figure.axes] == ["log", "log", "linear"]
    assert [axes.get_xlabel() for axes in figure.axes] == ["lr", "init_std", "mix"]
    marks = {line.get_marker(): line for line in lr.lines}
    assert marks["*"].get_xdata().tolist() == [2**-6]
    assert marks["*"].get_ydata().tolist() == [2]
    assert marks["x"].get_xdata().tolist() == [2**-2]
    assert marks["v"].get_xdata().tolist() == [2**-10]
    assert len(marks["o"].get_xdata()) == 3
    legend = [text.get_text() for text in mix.get_legend().get_texts()]
    assert legend == ["complete (3)", "pruned (1)", "failed (1)", "trial 1"]
    ticks = lr.xaxis.get_major_formatter()
    assert [ticks(x) for x in (2**-6, 0.5, 8)] == ["$2^{-6}$", "0.5", "8"]


def test_parallel_lines_are_one_per_trial_and_the_best_is_thick(study: optuna.Study) -> None:
    (axes,) = parallel_figure(sweep_data(study)).axes
    lines = [line for line in axes.lines if len(line.get_xdata()) == 4]
    assert len(lines) == 5 + 1
    thick = max(lines, key=lambda line: line.get_linewidth())
    assert thick.get_ydata() == pytest.approx([0.5, 0.5, 0.5, 0.0])


def test_all_figures_can_be_drawn(study: optuna.Study) -> None:
    figures = sweep_figures(study)
    assert list(figures) == ["parallel", "slices", "importance"]
    for figure in figures.values():
        figure.savefig(BytesIO(), format="png", dpi=40)


def test_nothing_but_failures_can_be_drawn() -> None:
    study = optuna.create_study()
    add(study, 0.1, 0.1, 0.1, None, TrialState.FAIL)
    assert sweep_data(study).best is None
    for figure in sweep_figures(study).values():
        figure.savefig(BytesIO(), format="png", dpi=40)


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(UserError, match="no trial has ended"):
        sweep_data(optuna.create_study())
    with pytest.raises(UserError, match="minimizes one loss"):
        sweep_data(optuna.create_study(direction="maximize"))
