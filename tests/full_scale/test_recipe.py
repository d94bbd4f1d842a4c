"""Recipes: what they say, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from full_scale.recipe import Phase, Recipe, load_recipe
from mutransfer.errors import UserError
from mutransfer.schema import parse
from proxies.presets import get_preset


def test_smoke_has_the_phases_of_the_reference() -> None:
    recipe = load_recipe("smoke")
    assert recipe.model == get_preset("tiny-128")
    warmup, first, second, decay, long = recipe.phases
    assert warmup.factor(0) == pytest.approx(1 / warmup.steps)
    assert warmup.factor(warmup.steps - 1) == 1
    assert {first.factor(i) for i in range(first.steps)} == {1.0}
    assert second.batch_tokens == 2 * first.batch_tokens
    assert decay.factor(decay.steps - 1) == pytest.approx(1 / 16)
    # half-way, Megatron's exponential has 0.4142 of the way left
    assert decay.factor(decay.steps // 2 - 1) == pytest.approx(1 / 16 + 15 / 16 * 0.41421356)
    assert [phase.optimizer for phase in recipe.phases] == ["adamw"] * 3 + ["muon"] * 2
    assert long.seq_len == 2 * decay.seq_len
    assert recipe.jumps == ()
    assert recipe.batch_tokens == first.batch_tokens


def test_position_of_a_step(recipe: Recipe) -> None:
    assert recipe.steps == 16
    assert [recipe.at(step)[0].name for step in (0, 1, 2, 5, 6, 8, 9, 12, 13, 15)] == [
        "warmup", "warmup", "stable", "stable", "bigger", "bigger", "decay", "decay", "long",
        "long",
    ]  # fmt: skip
    assert recipe.at(8) == (recipe.phases[2], 2)
    assert recipe.tokens_before(0) == 0
    assert recipe.tokens_before(7) == 6 * 64 + 128
    assert recipe.tokens_before(16) == recipe.horizon_tokens == 6 * 64 + 3 * 128 + 4 * 64 + 3 * 128
    for step in (-1, 16):
        with pytest.raises(IndexError):
            recipe.at(step)


def test_batch_without_a_stable_phase_is_the_first(recipe_fields: dict[str, Any]) -> None:
    recipe_fields["phases"] = [recipe_fields["phases"][i] for i in (3, 4)]
    assert Recipe.model_validate(recipe_fields).batch_tokens == 64


def test_jumps_of_the_learning_rate_are_named(recipe_fields: dict[str, Any]) -> None:
    recipe_fields["phases"][4]["lr_start"] = 0.5
    (line,) = Recipe.model_validate(recipe_fields).jumps
    assert line == "the learning rate jumps from 0.25 to 0.5 of the peak as long starts"


def test_identity_is_what_decides_the_weights(recipe: Recipe) -> None:
    same = {"log_every": 7, "checkpoint_every": 9, "keep_last": 1, "evaluate_every": 4}
    assert recipe.model_copy(update=same).sha256 == recipe.sha256
    assert len(recipe.model_copy(update={"seed": 2**53 - 1}).sha256) == 64, "the largest seed"
    for other in ({"seed": 1}, {"clip_norm": None}, {"precision": "bf16"}, {"phases": ()}):
        assert recipe.model_copy(update=other).sha256 != recipe.sha256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clipnorm": 1.0}, "'clip_norm' perhaps"),
        ({"precision": "fp8"}, "'fp32' or 'bf16'"),
        ({"model": "tiny-33"}, "unknown preset"),
        ({"phases": []}, "phases"),
        ({"heldout_tokens": 63}, "takes 64"),
        ({"name": "a/b"}, "name"),
        ({"seed": 2**53}, "seed: Input should be less than or equal to 9007199254740991"),
        ({"data": {"tokenizer": "bpe", "vocab_size": 300}}, "but the model's is 256"),
        ({"conversion": {"batch_rule": "linear"}}, "'sqrt' or 'constant'"),
    ],
)
def test_bad_recipes_are_refused(
    change: dict[str, Any], message: str, recipe_fields: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=message) as error:
        parse(Recipe, {**recipe_fields, **change}, "r.toml")
    assert "r.toml" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("phase", "change", "message"),
    [
        (0, {"stepz": 3}, "'steps' perhaps"),
        (0, {"steps": 0}, "greater than or equal to 1"),
        (1, {"lr_end": 0.5}, "shape is constant"),
        (1, {"lr_end": 1.5}, "less than or equal to 1"),
        (2, {"micro_batch": 3}, "does not divide"),
        (2, {"name": "stable"}, "two phases are called 'stable'"),
        (4, {"optimizer": "adamw"}, "goes back from muon to adamw"),
        (4, {"seq_len": 4096}, "max_seq_len is 2048"),
        (3, {"momentum": "none"}, "'seed' or 'fresh'"),
    ],
)
def test_bad_phases_are_refused(
    phase: int, change: dict[str, Any], message: str, recipe_fields: dict[str, Any]
) -> None:
    recipe_fields["phases"][phase] |= change
    with pytest.raises(UserError, match=message):
        parse(Recipe, recipe_fields, "r.toml")


def test_boundaries_are_accepted(recipe_fields: dict[str, Any]) -> None:
    recipe_fields["heldout_tokens"] = 64
    recipe_fields["phases"][4]["seq_len"] = 2048
    assert Recipe.model_validate(recipe_fields).phases[4].seq_len == 2048
    assert Phase(name="one", steps=1, seq_len=2, batch_size=1).factor(0) == 1


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="smoke"):
        load_recipe("smok")
    with pytest.raises(UserError, match="no such recipe file"):
        load_recipe(tmp_path / "absent.toml")
    path = tmp_path / "bad.toml"
    path.write_text("name = ", encoding="utf-8")
    with pytest.raises(UserError, match="TOML"):
        load_recipe(path)
