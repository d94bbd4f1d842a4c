"""What a finished run leaves behind: `run.json`, a few lines, and the picture of its loss."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from full_scale.metrics import Record
from full_scale.recipe import Recipe
from mutransfer.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMA_VERSION = 1

Points = list[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Curves:
    """What the picture shows; every point is (tokens, value).

    Attributes:
        train: Training loss in nats per token.
        heldout: Held-out loss in nats per token.
        lr_factor: Learning rate over its peak.
        phases: (name, first token, last token), in order.
        hand_over: Tokens at the hand-over to Muon, if there was one.
    """

    train: Points
    heldout: Points
    lr_factor: Points
    phases: list[tuple[str, int, int]]
    hand_over: int | None


def curves(recipe: Recipe, records: list[Record]) -> Curves:
    """The curves of a run from its record."""
    train = [record for record in records if record["kind"] == "train"]
    phases, start = [], 0
    for phase in recipe.phases:
        phases.append((phase.name, start, start + phase.tokens))
        start += phase.tokens
    spans = dict((name, first) for name, first, _ in phases)
    muon = next((phase for phase in recipe.phases if phase.optimizer == "muon"), None)
    handed = muon is not None and muon is not recipe.phases[0]
    return Curves(
        train=[(r["tokens"], r["loss"]) for r in train],
        heldout=[(r["tokens"], r["loss"]) for r in records if r["kind"] == "heldout"],
        lr_factor=[(r["tokens"], r["lr_factor"]) for r in train],
        phases=phases,
        hand_over=spans[muon.name] if muon is not None and handed else None,
    )


def summary(recipe: Recipe, records: list[Record], **facts: object) -> dict[str, Any]:
    """The content of `run.json`: results from the record, beside the `facts` of the launch.

    A finished run is a PASS, and a WARN where steps were skipped.
    """
    heldout = [record for record in records if record["kind"] == "heldout"]
    train = [record for record in records if record["kind"] == "train"]
    ends = {record["phase"]: record["loss"] for record in heldout}
    skipped = sum(record["kind"] == "skipped" for record in records)
    return {
        "schema_version": SCHEMA_VERSION,
        "verdict": "WARN" if skipped else "PASS",
        "recipe": recipe.name,
        "heldout_loss": heldout[-1]["loss"],
        "train_loss": train[-1]["loss"] if train else None,
        "steps": recipe.steps,
        "skipped_steps": skipped,
        "tokens": recipe.horizon_tokens,
        "phases": [
            {**phase.model_dump(mode="json"), "tokens": phase.tokens,
             "heldout_loss": ends.get(phase.name)}
            for phase in recipe.phases
        ],
        "hand_over": next((r for r in records if r["kind"] == "hand_over"), None),
        **facts,
    }  # fmt: skip


def draw(data: Curves, title: str) -> Figure:
    """Loss over tokens with the phases shaded, and the learning rate below it."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(9, 6), layout="constrained")
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    loss.plot(*_columns(data.train), color="tab:blue", lw=1.2, label="training")
    loss.plot(*_columns(data.heldout), "o-", color="tab:orange", lw=1, ms=5, label="held-out")
    rate.plot(*_columns(data.lr_factor), color="tab:gray", lw=1.5)
    for number, (name, first, last) in enumerate(data.phases):
        for axes in (loss, rate):
            axes.axvspan(first, last, color="black", alpha=0.07 if number % 2 else 0.02, lw=0)
        loss.annotate(
            name, ((first + last) / 2, 1), (0, -4), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha="center", va="top", rotation=90, fontsize=9,
        )  # fmt: skip
    if data.hand_over is not None:
        for axes in (loss, rate):
            axes.axvline(data.hand_over, color="tab:red", ls="--", lw=1,
                         label="AdamW → Muon" if axes is loss else None)  # fmt: skip
    loss.set_ylabel("loss (nats per token)")
    rate.set_ylabel("lr / peak")
    rate.set_ylim(0, 1.05)
    rate.set_xlim(0, data.phases[-1][2])
    rate.set_xlabel("tokens")
    rate.xaxis.set_major_formatter(EngFormatter(sep=""))
    loss.set_title(title)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG, whole or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def _columns(points: Points) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
