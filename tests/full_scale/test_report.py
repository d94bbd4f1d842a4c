"""The picture and summary of a run, from its record."""

from __future__ import annotations

from full_scale import report
from full_scale.metrics import Record
from full_scale.recipe import Recipe

RECORDS: list[Record] = [
    {"kind": "train", "step": 1, "tokens": 64, "loss": 5.0, "lr_factor": 0.5, "phase": "warmup"},
    {"kind": "skipped", "step": 2, "tokens": 128},
    {"kind": "heldout", "step": 2, "tokens": 128, "loss": 4.5, "phase": "warmup"},
    {"kind": "hand_over", "step": 10, "tokens": 832},
    {"kind": "train", "step": 10, "tokens": 832, "loss": 3.0, "lr_factor": 1.0, "phase": "decay"},
    {"kind": "heldout", "step": 16, "tokens": 1408, "loss": 2.5, "phase": "long"},
]


def test_curves(recipe: Recipe) -> None:
    data = report.curves(recipe, RECORDS)
    assert data.train == [(64, 5.0), (832, 3.0)]
    assert data.heldout == [(128, 4.5), (1408, 2.5)]
    assert data.lr_factor == [(64, 0.5), (832, 1.0)]
    assert data.phases == [
        ("warmup", 0, 128),
        ("stable", 128, 384),
        ("bigger", 384, 768),
        ("decay", 768, 1024),
        ("long", 1024, 1408),
    ]
    assert data.hand_over == 768


def test_no_hand_over_without_muon_or_with_nothing_else(recipe: Recipe) -> None:
    for phases in (recipe.phases[:3], recipe.phases[3:]):
        other = recipe.model_copy(update={"phases": phases})
        assert report.curves(other, RECORDS).hand_over is None


def test_summary(recipe: Recipe) -> None:
    content = report.summary(recipe, RECORDS, device="cpu")
    assert content["heldout_loss"] == 2.5
    assert content["train_loss"] == 3.0
    assert content["skipped_steps"] == 1
    assert content["device"] == "cpu"
    assert content["hand_over"] == RECORDS[3]
    losses = {phase["name"]: phase["heldout_loss"] for phase in content["phases"]}
    assert losses == {
        "warmup": 4.5, "stable": None, "bigger": None, "decay": None, "long": 2.5,
    }  # fmt: skip


def test_drawing_shows_the_curves(recipe: Recipe) -> None:
    figure = report.draw(report.curves(recipe, RECORDS), "title")
    loss, rate = figure.axes
    assert [list(line.get_xdata()) for line in loss.lines[:2]] == [[64, 832], [128, 1408]]
    assert list(rate.lines[0].get_ydata()) == [0.5, 1.0]
    assert loss.get_ylabel() == "loss (nats per token)"
    assert [text.get_text() for text in loss.texts] == [phase.name for phase in recipe.phases]
