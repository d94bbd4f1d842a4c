"""Which recipes a bundle admits, and what the named rules convert."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest

from full_scale.admission import admit, admit_data
from full_scale.recipe import Recipe
from mutransfer.bundle import Bundle
from mutransfer.errors import UserError
from proxies.data import Corpus
from proxies.presets import get_preset
from proxies.tables import decoder_table

TARGET = get_preset("tiny-64").narrow(64, n_layers=2)
BASE = TARGET.narrow(32)


def test_the_recipe_it_was_made_for(bundle: Bundle, recipe: Recipe) -> None:
    admission = admit(bundle, recipe, accept_unverified=True)
    assert admission.table == bundle.table
    assert admission.params == bundle.base_hyperparameters
    assert admission.conversions == ()
    assert any("unverified" in note for note in admission.notes)


def test_missing_verdicts_are_refused(bundle: Bundle, recipe: Recipe) -> None:
    with pytest.raises(UserError, match="--accept-unverified"):
        admit(bundle, recipe)


def test_another_model_names_the_fields(bundle: Bundle, recipe_fields: dict[str, Any]) -> None:
    recipe_fields["model"] |= {"d_ff": 320, "rope_base": 5e5}
    with pytest.raises(UserError) as error:
        admit(bundle, Recipe.model_validate(recipe_fields), accept_unverified=True)
    assert error.value.got == "d_ff = 320, rope_base = 500000.0"
    assert error.value.expected == "d_ff = 160, rope_base = 10000.0"


def test_a_table_that_the_rules_do_not_reproduce(
    make_bundle: Callable[..., Bundle], bundle: Bundle, recipe: Recipe
) -> None:
    table = bundle.table.model_dump(mode="json")
    table["rows"][2]["optimizers"]["adamw"]["lr"] *= 1.001
    with pytest.raises(UserError, match=r"optimizers\.adamw\.lr"):
        admit(make_bundle(table=table), recipe, accept_unverified=True)


def test_a_parameter_without_a_row(
    make_bundle: Callable[..., Bundle], bundle: Bundle, recipe: Recipe
) -> None:
    table = bundle.table.model_dump(mode="json")
    del table["rows"][2]
    with pytest.raises(UserError, match="layers"):
        admit(make_bundle(table=table), recipe, accept_unverified=True)


@pytest.mark.parametrize("quantity", ["batch_tokens", "horizon_tokens"])
def test_another_batch_or_horizon_needs_a_rule(
    quantity: str, make_bundle: Callable[..., Bundle], recipe: Recipe
) -> None:
    tuned = getattr(recipe, quantity) + 1
    key = quantity.replace("_tokens", "_rule")
    with pytest.raises(UserError, match=f"name a rule in conversion.{key}") as error:
        admit(make_bundle(**{quantity: tuned}), recipe, accept_unverified=True)
    assert (error.value.got, error.value.expected) == (tuned - 1, tuned)


def test_sqrt_rule_scales_every_learning_rate(
    make_bundle: Callable[..., Bundle], recipe_fields: dict[str, Any]
) -> None:
    recipe_fields["conversion"] = {"batch_rule": "sqrt"}
    bundle = make_bundle(batch_tokens=16)  # the recipe has 64
    admission = admit(bundle, Recipe.model_validate(recipe_fields), accept_unverified=True)
    (conversion,) = admission.conversions
    assert dataclasses.astuple(conversion) == ("batch_tokens", "sqrt", 16, 64, 2.0)
    assert "tuned 16, used 64" in str(conversion)
    for old, new in zip(bundle.table.rows, admission.table.rows, strict=True):
        assert new.optimizers.adamw.lr == 2 * old.optimizers.adamw.lr
        assert new.init_std == old.init_std
        if old.optimizers.muon is not None and new.optimizers.muon is not None:
            assert new.optimizers.muon.lr == 2 * old.optimizers.muon.lr
            # the hand-over still keeps lr * wd
            assert new.optimizers.muon.lr_times_weight_decay == pytest.approx(
                new.optimizers.adamw.lr_times_weight_decay
            )


def test_constant_rules_leave_the_table(
    make_bundle: Callable[..., Bundle], recipe_fields: dict[str, Any]
) -> None:
    recipe_fields["conversion"] = {"batch_rule": "constant", "horizon_rule": "constant"}
    bundle = make_bundle(batch_tokens=16, horizon_tokens=100)
    admission = admit(bundle, Recipe.model_validate(recipe_fields), accept_unverified=True)
    assert [c.quantity for c in admission.conversions] == ["batch_tokens", "horizon_tokens"]
    assert math.prod(c.lr_factor for c in admission.conversions) == 1
    assert admission.table == bundle.table


def test_data(bundle: Bundle, corpus: Corpus) -> None:
    assert admit_data(bundle, corpus) == ()
    other = dataclasses.replace(corpus, fingerprint="f" * 64)
    (note,) = admit_data(bundle, other)
    assert "another corpus" in note
    for field, value in (("vocab_size", 257), ("tokenizer_fingerprint", "f" * 64)):
        with pytest.raises(UserError, match=r"another (vocabulary|tokenizer)"):
            admit_data(bundle, dataclasses.replace(corpus, **{field: value}))


def test_a_run_on_muon_is_noted_where_only_adamw_was_checked(
    make_bundle: Callable[..., Bundle], passed: dict[str, Any], recipe: Recipe
) -> None:
    def notes(optimizer: str) -> str:
        evidence = copy.deepcopy(passed["evidence"])
        evidence["coord_check"]["slopes"][0]["optimizer"] = optimizer
        return "".join(admit(make_bundle(**passed | {"evidence": evidence}), recipe).notes)

    assert "decays with Muon, under which coordinates were not checked" in notes("adamw")
    assert "Muon" not in notes("muon")


def test_another_depth_than_the_base_s_is_noted(
    make_bundle: Callable[..., Bundle], recipe: Recipe, passed: dict[str, Any]
) -> None:
    assert "layers" not in "".join(admit(make_bundle(**passed), recipe).notes)
    shallow = BASE.model_copy(update={"n_layers": 1})
    params = make_bundle().base_hyperparameters
    deeper = make_bundle(
        **passed,
        base={"config": shallow.model_dump(), "base_width": 32},
        table=decoder_table(TARGET, shallow, params),
    )
    assert "the target has 2 layers, the base 1" in "".join(admit(deeper, recipe).notes)


def test_a_bundle_of_other_rules_than_the_recipe_s_is_refused(
    bundle: Bundle, recipe: Recipe
) -> None:
    own = recipe.model_copy(update={"parametrization": bundle.parametrization.name})
    assert admit(bundle, own, accept_unverified=True).table == bundle.table
    other = recipe.model_copy(update={"parametrization": "xmodel"})
    with pytest.raises(UserError, match=r"another parametrization .*completep-tied.*xmodel"):
        admit(bundle, other, accept_unverified=True)
