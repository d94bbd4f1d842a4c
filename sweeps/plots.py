"""Pictures of a sweep: slices, parallel coordinates and importance, drawn from the study."""

from __future__ import annotations

import math

import optuna
import pandas as pd
from matplotlib.figure import Figure
from optuna.trial import TrialState

_KINDS = {
    "complete": {"color": "tab:blue", "marker": "o"},
    "pruned": {"color": "tab:gray", "marker": "x"},
    "failed": {"color": "tab:red", "marker": "v"},
}


def sweep_data(study: optuna.Study) -> pd.DataFrame:
    """One row per started trial: `number`, `kind`, `loss` and each searched hyperparameter.

    `kind` is complete, pruned or failed; `loss` is the held-out loss in nats, for a pruned
    trial the last one reported, for a failed one NaN.
    """
    rows = []
    for t in study.get_trials(deepcopy=False):
        if t.state in (TrialState.WAITING, TrialState.RUNNING) or not t.params:
            continue
        kind = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned"}.get(t.state, "failed")
        last = max(t.intermediate_values, default=None)
        loss = t.value if t.value is not None else math.nan
        if kind == "pruned" and last is not None:
            loss = t.intermediate_values[last]
        rows.append({"number": t.number, "kind": kind, "loss": loss, **t.params})
    return pd.DataFrame(rows)


def importance_data(study: optuna.Study, seed: int = 0) -> dict[str, float]:
    """Importance of each hyperparameter by PED-ANOVA (2304.10255), largest first; sums to 1.

    Empty where fewer than four trials are complete or all have one loss.
    """
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    values = {t.value for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))}
    if len(values) < 4:
        return {}
    import warnings

    with warnings.catch_warnings():
        # the evaluator is marked experimental and warns of trials outside its quantile
        warnings.simplefilter("ignore")
        found = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def sweep_figures(study: optuna.Study) -> dict[str, Figure]:
    """The pictures by file name, without a suffix."""
    data = sweep_data(study)
    figures = {
        "slices": slice_figure(data),
        "parallel_coordinates": parallel_figure(data),
    }
    if importance := importance_data(study):
        figures["importance"] = importance_figure(importance)
    return figures


def slice_figure(data: pd.DataFrame) -> Figure:
    """Loss against each hyperparameter on a log axis; the best trial is starred."""
    names = _names(data)
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * lines), layout="constrained")
    done = data[data.kind == "complete"]
    for i, name in enumerate(names):
        axes = figure.add_subplot(lines, columns, i + 1)
        axes.set_xscale("log", base=2)
        top = _top(data)
        for kind, style in _KINDS.items():
            part = data[data.kind == kind]
            y = part.loss.fillna(top).clip(upper=top)
            axes.scatter(part[name], y, s=18, label=kind, **style)  # type: ignore[arg-type]
        if len(done):
            best = done.loc[done.loss.idxmin()]
            axes.scatter(best[name], best.loss, s=150, marker="*", color="tab:orange", label="best")
        axes.set_xlabel(name)
        axes.set_ylabel("held-out loss (nats)")
        axes.grid(alpha=0.3)
        if i == 0:
            axes.legend(fontsize=8)
    figure.suptitle(f"{len(data)} trials: loss against each hyperparameter (worse ones at the top edge)")
    return figure


def parallel_figure(data: pd.DataFrame) -> Figure:
    """Complete trials as lines over the log-scaled hyperparameters, coloured by loss."""
    names = _names(data)
    done = data[data.kind == "complete"].sort_values("loss", ascending=False)
    figure = Figure(figsize=(2 + 1.9 * len(names), 4.5), layout="constrained")
    axes = figure.add_subplot()
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    norm = Normalize(done.loss.min(), done.loss.quantile(0.8)) if len(done) else Normalize(0, 1)
    colors = colormaps["viridis_r"]
    scaled = {}
    for name in names:
        low, high = data[name].min(), data[name].max()
        span = math.log(high / low) or 1.0
        scaled[name] = done[name].map(lambda v, low=low, span=span: math.log(v / low) / span)
        x = len(scaled) - 1
        axes.text(x, -0.06, f"{low:.3g}", ha="center", fontsize=8)
        axes.text(x, 1.03, f"{high:.3g}", ha="center", fontsize=8)
        axes.axvline(x, color="black", lw=0.6)
    for index, loss in done.loss.items():
        best = index == done.index[-1]
        axes.plot(
            range(len(names)),
            [scaled[name][index] for name in names],
            color="tab:orange" if best else colors(norm(loss)),
            lw=2.5 if best else 0.9,
            alpha=1 if best else 0.7,
            label="best" if best else None,
        )
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.tick_params(axis="x", pad=14)
    axes.set_yticks([])
    axes.set_ylim(-0.1, 1.1)
    axes.set_title("Complete trials; each axis is logarithmic")
    if len(done):
        axes.legend(loc="upper left", fontsize=8)
        figure.colorbar(ScalarMappable(norm, colors), ax=axes, label="held-out loss (nats)")
    return figure


def importance_figure(importance: dict[str, float]) -> Figure:
    """How much each hyperparameter tells good trials from the rest."""
    figure = Figure(figsize=(6.5, 0.5 + 0.45 * len(importance)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(list(importance)[::-1], list(importance.values())[::-1], color="tab:blue")
    axes.set_xlabel("importance (PED-ANOVA, share of 1)")
    return figure


def _names(data: pd.DataFrame) -> list[str]:
    return [name for name in data.columns if name not in ("number", "kind", "loss")]


def _top(data: pd.DataFrame) -> float:
    """The upper edge of the loss axis: good trials fill the picture, wild ones sit on it."""
    losses = data.loss.dropna()
    if losses.empty:
        return 1.0
    best, middle = losses.min(), losses.median()
    return float(max(middle + 1.5 * (middle - best), best + 1e-3))
