"""The template: every field is there, with its default where it is commented out."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from functools import reduce
from typing import Any

import pytest
from pydantic import BaseModel

from full_scale.recipe import load_recipe
from sweeps.experiment import SHIPPED, Experiment, load_experiment

PATH = SHIPPED.parent / "template.toml"
WHOLE = {("target",), ("search",)}  # written as one: a preset's name, a table of one's own choice


def assignments(text: str) -> Iterator[tuple[tuple[str, ...], bool, str]]:
    """Path, whether it is commented out, and text of every assignment."""
    section: tuple[str, ...] = ()
    for line in text.splitlines():
        if header := re.match(r"\[(\w+)\]", line):
            section = (header[1],)
        elif field := re.match(r"(# )?((\w+) = .*)", line):
            yield (*section, field[3]), field[1] is not None, field[2]


def leaves(schema: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all fields that hold a value of their own."""
    for name, field in schema.model_fields.items():
        path, kind = (*prefix, name), field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel) and path not in WHOLE:
            yield from leaves(kind, path)
        else:
            yield path


def default(path: tuple[str, ...]) -> Any:
    """What the template's experiment does where the field is left out."""
    e = load_experiment(str(PATH))
    stands_for = {
        ("proxy", "n_layers"): e.target.n_layers,
        ("proxy", "base_width"): e.base_width,
        ("coord_check", "lr"): e.params.lr,
        ("transfer_check", "contrast_seeds"): e.transfer_check.seeds,
    }
    value = reduce(lambda record, name: record[name], path, Experiment(name="x").canonical)
    return stands_for[path] if value is None else value


COMMENTED = [(path, text) for path, off, text in assignments(PATH.read_text()) if off]


def test_every_field_of_an_experiment_is_in_the_template() -> None:
    paths = [path for path, _, _ in assignments(PATH.read_text())]
    assert len(paths) == len(set(paths)), "a field is there twice"
    assert {path for path in paths if path[0] != "search"} == set(leaves(Experiment)) - {
        ("search",)
    }
    assert [path[1] for path in paths if path[0] == "search"] == list(Experiment(name="x").search)


@pytest.mark.parametrize(("path", "text"), COMMENTED, ids=[".".join(p) for p, _ in COMMENTED])
def test_a_commented_field_shows_its_default(path: tuple[str, ...], text: str) -> None:
    assert "#" in text, "unit and meaning follow"
    assert tomllib.loads(text) == {path[-1]: default(path)}


def test_with_all_of_them_uncommented_it_is_an_experiment_still(tmp_path: Any) -> None:
    full = tmp_path / "full.toml"
    full.write_text(re.sub(r"(?m)^# (?=\w+ = )", "", PATH.read_text()))
    e = load_experiment(str(full))
    assert e.proxy.base_width == 32, "uncommented"
    assert e.data == load_experiment(str(PATH)).data


def test_its_bundle_is_for_the_recipe_smoke() -> None:
    """What the README's steps end with."""
    e, recipe = load_experiment(str(PATH)), load_recipe("smoke")
    assert e.target == recipe.model
    assert (e.data.tokenizer, e.data.vocab_size) == (recipe.data.tokenizer, recipe.data.vocab_size)
    assert recipe.conversion.batch_rule == "sqrt", "its batch is another"
    assert recipe.conversion.horizon_rule == "constant", "and so is its horizon"
