"""What `verify` refuses, with the hash kept and recomputed, and what it leaves free."""

from __future__ import annotations

import copy
import json
import math
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from mutransfer.apply import Geometry, parametrize
from mutransfer.bundle import Bundle, digest
from mutransfer.bundle_evidence import Trial
from mutransfer.bundle_verify import differences
from mutransfer.errors import UserError
from mutransfer.roles import Role
from mutransfer.rules import BaseParams, get_parametrization
from mutransfer.table import Multipliers, Table

Document = dict[str, Any]
Place = tuple[str | int, ...]

# As the docstring of `bundle_verify` has it; trial 1 wins, and the drift rests on optima 0 and 1.
FREE_NUMBERS = (
    r"batch_tokens",
    r"horizon_tokens",
    r"(base|target)\.config\.max_seq_len",
    r"evidence\.study\.trials\.[023]\.params\.\w+",
    r"evidence\.coord_check\.lr",
    r"evidence\.coord_check\.slopes\.\d+\.(t|slope|low|high|expected)",
    r"evidence\.coord_check\.widths\.\d+",
    r"evidence\.coord_check\.replay\.(width|n_layers|seed|steps|tokens\.\d+\.\d+)",
    r"evidence\.coord_check\.replay\.sizes\.\d+\.(t|value)",
    r"evidence\.transfer_check\.(drift_low|drift_high|regret|regret_low|regret_high)",
    r"evidence\.transfer_check\.seeds\.\d+",
    r"evidence\.transfer_check\.optima\.\d+\.(width|low|high)",
    r"evidence\.transfer_check\.optima\.2\.log2_lr",
)
FREE_NAMES = (
    r"experiment\.(name|sha256)",
    r"data\.(fingerprint|tokenizer_fingerprint)",
    r"versions\.\w+",
    r"evidence\.(coord_check|transfer_check)\.result_sha256",
    r"evidence\.coord_check\.slopes\.\d+\.(optimizer|kind|name)",
    r"evidence\.coord_check\.replay\.sizes\.\d+\.(kind|name)",
)


def document_of(bundle: Bundle) -> Document:
    """A copy as plain JSON data."""
    return json.loads(json.dumps(bundle.model_dump(mode="json")))


def leaves(value: Any, path: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every value that is neither object nor array, with its path."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in pairs:
            yield from leaves(item, (*path, key))
    else:
        yield path, value


def put(document: Document, path: Place, value: Any) -> Document:
    """A copy with one value replaced (the path may be dotted text)."""
    changed = copy.deepcopy(document)
    place: Any = changed
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    return changed


def at(path: str) -> Place:
    """A dotted path as a tuple; numbers are places, but for the seeds that losses go by."""
    parts = path.split(".")
    return tuple(
        int(part) if part.isdigit() and "losses" not in parts[:index] else part
        for index, part in enumerate(parts)
    )


def rehashed(document: Document) -> Document:
    """With the hash that its content has."""
    return {**document, "sha256": digest(document)}


def read(document: Document, folder: Path) -> Bundle:
    """The document as a bundle, by way of a file."""
    path = folder / "bundle.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return Bundle.load(path)


def refusal(document: Document, folder: Path, **options: Any) -> UserError:
    """Why the document is refused, its hash recomputed."""
    bundle = read(rehashed(document), folder)
    with pytest.raises(UserError) as error:
        bundle.verify(**options)
    assert "\n" not in str(error.value)
    return error.value


def accepted(
    document: Document, folder: Path, change: Callable[[Any], Any], kind: type | tuple[type, ...]
) -> set[str]:
    """Dotted paths of the leaves of a kind that may be changed if the hash is recomputed."""
    found = set()
    for path, value in leaves(document):
        if path == ("sha256",) or not isinstance(value, kind) or isinstance(value, bool):
            continue
        assert change(value) != value
        try:
            read(rehashed(put(document, path, change(value))), folder).verify()
        except UserError:
            continue
        found.add(".".join(map(str, path)))
    return found


def named(document: Document, patterns: tuple[str, ...]) -> set[str]:
    """Dotted paths of the non-null leaves that the patterns name."""
    paths = {".".join(map(str, path)) for path, value in leaves(document) if value is not None}
    found = {path for path in paths if any(re.fullmatch(p, path) for p in patterns)}
    for pattern in patterns:
        assert any(re.fullmatch(pattern, path) for path in found), pattern
    return found


def a_little(size: float) -> Callable[[Any], Any]:
    """Changes a number by a fraction, or a whole one by one."""

    def change(value: Any) -> Any:
        if isinstance(value, int):
            return value + 1
        return value * (1 + size) if value else size

    return change


def another_name(value: str) -> str:
    """Another text of the same form."""
    if re.fullmatch("[0-9a-f]{64}", value):
        return ("1" if value[0] == "0" else "0") + value[1:]
    return value + "x"


def test_a_sound_bundle_is_accepted_without_notes(
    make_sound: Callable[..., Bundle], tmp_path: Path
) -> None:
    for tied in (True, False):
        bundle = make_sound(tied=tied)
        assert bundle.verify() == ()
        assert bundle.verify(rebuild=lambda table=bundle.table: table) == ()
        assert read(document_of(bundle), tmp_path).verify(accept_unverified=True) == ()


def test_no_leaf_may_change_under_its_hash(sound: Bundle, tmp_path: Path) -> None:
    """The last bit of every float, one up for whole numbers, another letter in every text."""
    document = document_of(sound)
    tried = set()
    for path, value in leaves(document):
        if isinstance(value, bool):
            changed: Any = not value
        elif isinstance(value, float):
            changed = math.nextafter(value, math.inf)
        elif isinstance(value, int):
            changed = value + 1
        else:
            changed = another_name(value) if value is not None else 0.5
        with pytest.raises(UserError) as error:
            read(put(document, path, changed), tmp_path).verify()
        tried.add(type(value))
        if isinstance(value, float):
            assert error.value.where == "sha256"
            assert "does not have the hash that it claims" in error.value.what
    assert tried == {bool, float, int, str, type(None)}


@pytest.mark.parametrize(("tied", "size"), [(True, 1e-6), (True, 1e-3), (False, 1e-6)])
def test_the_documented_numbers_are_free_and_no_others(
    make_sound: Callable[..., Bundle], tmp_path: Path, tied: bool, size: float
) -> None:
    document = document_of(make_sound(tied=tied))
    found = accepted(document, tmp_path, a_little(size), (int, float))
    assert found == named(document, FREE_NUMBERS)


def test_the_documented_names_are_free_and_no_others(sound: Bundle, tmp_path: Path) -> None:
    document = document_of(sound)
    assert accepted(document, tmp_path, another_name, str) == named(document, FREE_NAMES)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("evidence.study.trials.2.state", "PRUNED"),
        ("evidence.study.trials.3.state", "FAIL"),
        ("evidence.study.trials.2.params.gamma", 1.0),
        ("evidence.coord_check.slopes.1.slope", 7.0),  # a line without an interval
        ("evidence.coord_check.slopes.1.verdict", "WARN"),  # with a verdict to match
        ("versions.torch", "2.9"),
    ],
)
def test_the_rest_of_what_is_documented_as_free(
    sound: Bundle, tmp_path: Path, path: str, value: object
) -> None:
    document = put(document_of(sound), at(path), value)
    if value == "WARN":
        document = put(document, at("evidence.coord_check.verdict"), value)
    trials = document["evidence"]["study"]["trials"]
    for rest in (trials, trials[:3], trials[:2]):
        changed = rehashed(put(document, at("evidence.study.trials"), rest))
        notes = read(changed, tmp_path).verify()
        assert notes == (("evidence.coord_check: WARN",) if value == "WARN" else ())


def test_a_real_bundle_leaves_no_more_free(real_bundle: Path, tmp_path: Path) -> None:
    """Less, where a number lies on the end of its interval."""
    document = json.loads(real_bundle.read_text(encoding="utf-8"))
    del document["evidence"]["coord_check"]["slopes"][5:]  # there are many
    del document["evidence"]["coord_check"]["replay"]["sizes"][5:]
    winner = document["provenance"]["lr"]["trials"][0]
    patterns = [
        pattern.replace("[023]", rf"(?!{winner}\b)\d+")
        for pattern in FREE_NUMBERS
        if not pattern.endswith("log2_lr")  # with two widths the drift rests on both
    ]
    if document["evidence"]["transfer_check"]["drift"] is None:  # on none, then
        patterns.append(r"evidence\.transfer_check\.optima\.\d\.log2_lr")
    found = set()
    for path, value in leaves(document):
        if isinstance(value, bool | str) or value is None:
            continue
        changed = rehashed(put(document, path, a_little(1e-6)(value)))
        try:
            read(changed, tmp_path).verify(accept_unverified=True)
        except UserError:
            continue
        found.add(".".join(map(str, path)))
    assert {p for p in found if not any(re.fullmatch(pattern, p) for pattern in patterns)} == set()
    assert {"batch_tokens", "horizon_tokens"} <= found


@pytest.mark.parametrize("name", BaseParams.model_fields)
def test_base_hyperparameters(sound: Bundle, tmp_path: Path, name: str) -> None:
    document = document_of(sound)
    value = document["base_hyperparameters"][name]
    error = refusal(
        put(
            document, ("base_hyperparameters", name), value * 1.01 if value < 0.5 else value * 0.99
        ),
        tmp_path,
    )
    if name == "lr":
        assert error.where == "base_hyperparameters.lr"
        assert error.expected == f"{2**-7} of trial 1"
    else:  # fixed by the experiment: the table follows from it
        assert str(error.where).startswith("table.")
        assert "the rules do not reproduce" in error.what


def columns(row: Document) -> Iterator[tuple[str, Any]]:
    """The numbers of a row by dotted name."""
    for path, value in leaves(row):
        if isinstance(value, int | float):
            yield ".".join(map(str, path)), value


def test_every_column_of_every_row(make_sound: Callable[..., Bundle], tmp_path: Path) -> None:
    document = document_of(make_sound(tied=False))
    seen = set()
    for index, row in enumerate(document["table"]["rows"]):
        for column, value in columns(row):
            changed = put(document, ("table", "rows", index, *at(column)), a_little(1e-9)(value))
            error = refusal(changed, tmp_path)
            assert error.where == f"table.rows.{row['pattern']}.{column}"
            assert (error.got, error.expected) == (repr(a_little(1e-9)(value)), repr(value))
            seen.add(column)
    assert len(document["table"]["rows"]) == 12
    assert seen == {
        "shape.0", "shape.1", "width_ratio", "depth_ratio", "init_std", "forward_multiplier",
        "optimizers.adamw.lr", "optimizers.adamw.eps", "optimizers.adamw.weight_decay",
        "optimizers.adamw.betas.0", "optimizers.adamw.betas.1",
        "optimizers.adamw.lr_times_weight_decay", "optimizers.muon.lr",
        "optimizers.muon.weight_decay", "optimizers.muon.momentum", "optimizers.muon.scale",
        "optimizers.muon.lr_times_weight_decay",
    }  # fmt: skip


@pytest.mark.parametrize("name", Multipliers.model_fields)
def test_multipliers(sound: Bundle, tmp_path: Path, name: str) -> None:
    document = document_of(sound)
    value = document["table"]["multipliers"][name]
    changed = put(document, ("table", "multipliers", name), value * 1.001)
    assert refusal(changed, tmp_path).where == f"table.multipliers.{name}"


def test_rows_missing_twice_renamed_or_of_another_role(sound: Bundle, tmp_path: Path) -> None:
    document = document_of(sound)
    rows = document["table"]["rows"]
    pattern = rows[2]["pattern"]
    for changed, what in (
        ([*rows[:2], *rows[3:]], "the rules do not reproduce this"),
        ([*rows, rows[2]], "two rows have one pattern"),
        ([*rows[:2], {**rows[2], "pattern": "layers.*.attention.qq.weight"}, *rows[3:]],
         "the rules do not reproduce this"),
        ([*rows[:2], {**rows[2], "role": "hidden_out"}, *rows[3:]],
         "the rules do not reproduce this"),
        ([], "the rules do not reproduce this"),
    ):  # fmt: skip
        error = refusal(put(document, ("table", "rows"), changed), tmp_path)
        assert error.what == what
    muon = refusal(put(document, at("table.rows.2.optimizers.muon"), None), tmp_path)
    assert str(muon.where).startswith(f"table.rows.{pattern}.optimizers.muon")


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        ("provenance.lr.trials", [2], "provenance.lr"),
        ("provenance.lr.trials", [1, 2], "provenance.lr"),
        ("provenance.lr.study", "another", "provenance.lr"),
        ("provenance.lr", {"source": "fixed"}, "provenance.lr"),
        ("provenance.beta1", {"source": "study", "study": "test", "trials": [1]},
         "base_hyperparameters.beta1"),
        ("provenance.gamma", {"source": "fixed"}, "provenance.gamma"),
        ("evidence.study.name", "another", "provenance.lr"),
        ("evidence.study.trials.1.params.lr", 2**-6, "base_hyperparameters.lr"),
        ("evidence.study.trials.1.params", {}, "base_hyperparameters.lr"),
        ("evidence.study.trials.1.params.beta1", 0.85, "provenance.beta1"),
        ("evidence.study.trials.1.params.gamma", 1.0, "evidence.study.trials.1.params.gamma"),
        ("evidence.study.trials.1.losses.1", 2.76, "evidence.study.trials.1.mean_loss"),
        ("evidence.study.trials.1.mean_loss", 2.6, "evidence.study.trials.1.mean_loss"),
        ("evidence.study.trials.1.mean_loss", None, "evidence.study.trials.1.mean_loss"),
        ("evidence.study.trials.2.losses.0", 2.69, "evidence.study.trials.2.mean_loss"),
        ("evidence.study.trials.1.standard_error", 0.07, "evidence.study.trials.1.standard_error"),
        ("evidence.study.trials.0.standard_error", 0.0, "evidence.study.trials.0.standard_error"),
        ("evidence.study.trials.3.mean_loss", 2.0, "evidence.study.trials.3.mean_loss"),
        ("evidence.study.trials.1.number", 2, "evidence.study.trials"),
        ("evidence.study.trials.1.state", "PRUNED", "provenance.lr"),
        ("evidence.study.trials.1.losses.7", 2.5, "evidence.study.trials.1.losses"),
        ("evidence.study.seeds", [0, 1], "evidence.study.trials.1.losses"),
        ("evidence.study.seeds", [0, 1, 2, 3], "evidence.study.trials"),
        ("evidence.study.trials.1.losses", {}, "evidence.study.trials.1.mean_loss"),
    ],
)  # fmt: skip
def test_provenance_and_trials(
    sound: Bundle, tmp_path: Path, path: str, value: object, where: str
) -> None:
    assert refusal(put(document_of(sound), at(path), value), tmp_path).where == where


def test_a_source_that_is_missing(sound: Bundle, tmp_path: Path) -> None:
    document = document_of(sound)
    del document["provenance"]["muon_factor"]
    assert refusal(document, tmp_path).where == "provenance.muon_factor"


def test_a_removed_trial(sound: Bundle, tmp_path: Path) -> None:
    document = document_of(sound)
    trials = document["evidence"]["study"]["trials"]
    for gone in (0, 1, 2):
        rest = [trial for trial in trials if trial["number"] != gone]
        error = refusal(put(document, at("evidence.study.trials"), rest), tmp_path)
        assert error.what == "trials are missing or out of order"
        assert error.got == [n for n in range(4) if n != gone]
    turned = refusal(put(document, at("evidence.study.trials"), trials[::-1]), tmp_path)
    assert turned.got == [3, 2, 1, 0]


def test_a_better_trial_that_was_not_chosen(sound: Bundle, tmp_path: Path) -> None:
    """Its losses and statistics agree, and so do hash and table."""
    document = document_of(sound)
    better = Trial.of(2, "COMPLETE", {"lr": 2**-6}, {0: 2.5, 1: 2.6, 2: 2.6})
    changed = put(document, at("evidence.study.trials.2"), better.model_dump(mode="json"))
    error = refusal(changed, tmp_path)
    assert (error.where, error.got) == ("provenance.lr", "'test' [1]")
    assert error.expected == "'test' [2]"
    lucky = Trial.of(2, "COMPLETE", {"lr": 2**-6}, {0: 1.0, 1: 1.0})  # not on every seed
    changed = put(document, at("evidence.study.trials.2"), lucky.model_dump(mode="json"))
    assert read(rehashed(changed), tmp_path).verify() == ()
    equal = Trial.of(2, "COMPLETE", {"lr": 2**-6}, {0: 2.625, 1: 2.75, 2: 2.5})
    changed = put(document, at("evidence.study.trials.2"), equal.model_dump(mode="json"))
    assert read(rehashed(changed), tmp_path).verify() == (), "the first of two equals wins"


def test_statistics_of_a_trial() -> None:
    losses = {0: 2.5, 1: 2.75, 7: 2.6}
    trial = Trial.of(3, "COMPLETE", {}, losses)
    assert trial.mean_loss == pytest.approx(statistics.fmean(losses.values()), rel=1e-15)
    assert trial.standard_error == pytest.approx(
        statistics.stdev(losses.values()) / math.sqrt(3), rel=1e-12
    )
    assert (Trial.of(0, "FAIL", {}, {}).mean_loss, Trial.of(0, "FAIL", {}, {}).standard_error) == (
        None, None,
    )  # fmt: skip
    assert (one := Trial.of(0, "COMPLETE", {}, {4: 2.0})).mean_loss == 2.0
    assert one.standard_error is None


@pytest.mark.parametrize(
    ("changes", "name", "allowed"),
    [
        # coordinate check: the worst of its lines
        ({"coord_check.slopes.0.verdict": "WARN"}, "coord_check", "WARN"),
        ({"coord_check.symbolic_findings": 1}, "coord_check", "FAIL"),
        ({"coord_check.slopes.1.verdict": "FAIL"}, "coord_check", "FAIL"),
        ({"coord_check.slopes.0.verdict": "FAIL", "coord_check.verdict": "WARN"}, "coord_check",
         "FAIL"),
        # transfer check: the figures of its verdict
        ({"transfer_check.drift_high": 1.01}, "transfer_check", "WARN"),
        ({"transfer_check.drift_high": None}, "transfer_check", "WARN"),
        ({"transfer_check.regret_high": 0.021}, "transfer_check", "WARN"),
        ({"transfer_check.regret_high": None}, "transfer_check", "WARN"),
        ({"transfer_check.regret": None}, "transfer_check", "WARN"),
        ({"transfer_check.seeds": [0, 1]}, "transfer_check", "WARN"),
        ({"transfer_check.seeds": [0, 1, 1]}, "transfer_check", "WARN"),
        ({"transfer_check.optima.2.log2_lr": None, "transfer_check.drift": None}, "transfer_check",
         "WARN"),
        ({"transfer_check.optima": [], "transfer_check.drift": None}, "transfer_check", "WARN"),
        ({"transfer_check.optima.1.log2_lr": -7.6, "transfer_check.drift": 0.6}, "transfer_check",
         "WARN"),
        ({"transfer_check.regret_low": 0.051, "transfer_check.regret": 0.06,
          "transfer_check.regret_high": 0.07, "transfer_check.verdict": "WARN"}, "transfer_check",
         "FAIL"),
        ({"transfer_check.optima.1.log2_lr": -8.5, "transfer_check.optima.1.low": -9.0,
          "transfer_check.drift": 1.5, "transfer_check.drift_low": 1.01,
          "transfer_check.drift_high": 2.0, "transfer_check.verdict": "WARN"}, "transfer_check",
         "FAIL"),
    ],
)  # fmt: skip
def test_a_verdict_better_than_its_numbers(
    sound: Bundle, tmp_path: Path, changes: dict[str, Any], name: str, allowed: str
) -> None:
    document = document_of(sound)
    for path, value in changes.items():
        document = put(document, at(f"evidence.{path}"), value)
    claimed = document["evidence"][name]["verdict"]
    error = refusal(document, tmp_path, accept_unverified=True)
    assert error.where == f"evidence.{name}.verdict"
    assert (error.got, error.expected) == (claimed, allowed)
    honest = rehashed(put(document, ("evidence", name, "verdict"), allowed))
    notes = read(honest, tmp_path).verify(accept_unverified=True)
    assert [note.partition(",")[0] for note in notes] == [f"evidence.{name}: {allowed}"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("drift", 0.2),
        ("drift", None),
        ("optima.0.log2_lr", -7.1),
        ("optima.1.log2_lr", -7.2),
        ("optima.2.log2_lr", -6.7),  # now the farthest
        ("optima.1.log2_lr", None),
        ("optima", []),
    ],
)
def test_a_drift_that_does_not_follow_from_the_optima(
    sound: Bundle, tmp_path: Path, path: str, value: object
) -> None:
    document = put(document_of(sound), at(f"evidence.transfer_check.{path}"), value)
    error = refusal(document, tmp_path)
    assert error.where == "evidence.transfer_check.drift"
    assert error.what == "does not follow from the optima"
    assert error.got == repr(document["evidence"]["transfer_check"]["drift"])


def test_two_optima_of_one_width_cannot_hide_a_drift(sound: Bundle, tmp_path: Path) -> None:
    document = document_of(sound)
    far = {"width": 64, "log2_lr": -4.0, "low": -4.5, "high": -3.5}
    for optima in (
        [far, *document["evidence"]["transfer_check"]["optima"]],
        [*document["evidence"]["transfer_check"]["optima"], far],
    ):
        error = refusal(put(document, at("evidence.transfer_check.optima"), optima), tmp_path)
        assert error.where == "evidence.transfer_check.optima"


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        ("coord_check.slopes.0.low", 0.02, "coord_check.slopes.0.slope"),
        ("coord_check.slopes.0.high", 0.0, "coord_check.slopes.0.slope"),
        ("coord_check.slopes.0.slope", 0.07, "coord_check.slopes.0.slope"),
        ("transfer_check.drift_low", 0.3, "transfer_check.drift"),
        ("transfer_check.drift_high", 0.2, "transfer_check.drift"),
        ("transfer_check.regret", 0.011, "transfer_check.regret"),
        ("transfer_check.regret_low", 0.003, "transfer_check.regret"),
        ("transfer_check.regret_high", 0.001, "transfer_check.regret"),
        ("transfer_check.optima.2.log2_lr", -7.3, "transfer_check.optima.2.log2_lr"),
        ("transfer_check.optima.0.low", -6.9, "transfer_check.optima.0.log2_lr"),
        ("transfer_check.optima.1.high", -7.3, "transfer_check.optima.1.log2_lr"),
    ],
)
def test_what_lies_outside_its_interval(
    sound: Bundle, tmp_path: Path, path: str, value: float, where: str
) -> None:
    error = refusal(put(document_of(sound), at(f"evidence.{path}"), value), tmp_path)
    assert (error.what, error.where) == ("lies outside its interval", f"evidence.{where}")


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        ("base.config.rope_base", 20000.0, "base.config.rope_base"),
        ("base.config.norm_eps", 1e-6, "base.config.norm_eps"),
        ("base.config.tied", False, "base.config.tied"),
        ("base.config.head_dim", 32, "base.config.head_dim"),
        ("base.config.vocab_size", 257, "base.config.vocab_size"),
        ("base.config.n_heads", 4, "base.config.n_heads"),
        ("base.config.n_kv_heads", 3, "base.config.n_kv_heads"),
        ("base.config.d_ff", 65, "base.config.d_ff"),
        ("base.config.d_model", 64, "base.config.d_ff"),
        ("base.config.d_model", 0, "base.config.d_model"),
        ("base.config.d_model", 32.0, "base.config.d_model"),
        ("base.config.dropout", 0.1, "base.config.dropout"),
        ("target.config.dropout", None, "base.config.dropout"),
        ("target.config.rope_base", 20000.0, "base.config.rope_base"),
        ("target.config.vocab_size", 257, "base.config.vocab_size"),
        ("target.config.d_model", 128, "base.config.d_ff"),
        ("target.config.n_layers", "4", "target.config.n_layers"),
        ("target.config.n_layers", True, "target.config.n_layers"),
        ("data.vocab_size", 257, "data.vocab_size"),
        ("parametrization.version", 2, "parametrization.version"),
        ("table.version", 2, "table.version"),
        ("table.parametrization", "mup", "table.parametrization"),
    ],
)
def test_configs(sound: Bundle, tmp_path: Path, path: str, value: object, where: str) -> None:
    assert refusal(put(document_of(sound), at(path), value), tmp_path).where == where


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("base.base_width", 32),
        ("base.config.n_layers", 4),
        ("target.config.n_layers", 2),
        ("parametrization.name", "completep"),
    ],
)
def test_what_the_table_follows_from(
    sound: Bundle, tmp_path: Path, path: str, value: object
) -> None:
    error = refusal(put(document_of(sound), at(path), value), tmp_path)
    assert error.what == "the rules do not reproduce this"


def test_an_unknown_parametrization(sound: Bundle, tmp_path: Path) -> None:
    error = refusal(put(document_of(sound), at("parametrization.name"), "mup2"), tmp_path)
    assert (error.where, error.got) == ("parametrization.name", "mup2")
    assert "completep-tied" in str(error.expected)


def test_numbers_beyond_every_range_are_refused_in_one_line(sound: Bundle, tmp_path: Path) -> None:
    """The rules make zeros and infinities of them, which no table may hold."""
    document = document_of(sound)
    for path in ("base_hyperparameters.eps", "base_hyperparameters.output_multiplier"):
        error = refusal(put(document, at(path), 5e-324), tmp_path)
        assert error.where is not None


# --- evidence missing, failed, or in doubt


def test_stripped_of_its_evidence(sound: Bundle, tmp_path: Path) -> None:
    document = put(document_of(sound), ("evidence",), None)
    error = refusal(document, tmp_path)
    assert (error.where, error.got) == ("evidence.coord_check", "missing")
    assert error.expected == "PASS or WARN"
    assert "--accept-unverified" in str(error.cure)
    assert read(rehashed(document), tmp_path).verify(accept_unverified=True) == (
        "evidence.coord_check: missing, accepted unverified",
        "evidence.transfer_check: missing, accepted unverified",
    )


@pytest.mark.parametrize("name", ["coord_check", "transfer_check"])
def test_verdicts_that_are_missing_failed_or_in_doubt(
    sound: Bundle, tmp_path: Path, name: str
) -> None:
    document = document_of(sound)
    failed = put(document, ("evidence", name, "verdict"), "FAIL")
    for changed, got in ((put(document, ("evidence", name), None), "missing"), (failed, "FAIL")):
        error = refusal(changed, tmp_path)
        assert (error.where, error.got) == (f"evidence.{name}", got)
        assert read(rehashed(changed), tmp_path).verify(accept_unverified=True) == (
            f"evidence.{name}: {got}, accepted unverified",
        )
    doubtful = rehashed(put(document, ("evidence", name, "verdict"), "WARN"))
    assert read(doubtful, tmp_path).verify() == (f"evidence.{name}: WARN",)


def test_accepting_unverified_accepts_nothing_else(sound: Bundle, tmp_path: Path) -> None:
    bare = put(document_of(sound), ("evidence",), None)
    for path, value in (
        ("base_hyperparameters.lr", 0.01),
        ("table.rows.1.optimizers.adamw.lr", 0.01),
        ("data.vocab_size", 257),
    ):
        refusal(put(bare, at(path), value), tmp_path, accept_unverified=True)
    with pytest.raises(UserError, match="hash"):
        read(bare, tmp_path).verify(accept_unverified=True)


# --- a model of one's own


class Residual(nn.Module):
    """Embedding, residual MLPs, head: no decoder."""

    def __init__(self, width: int, n_layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, width)
        self.up = nn.ModuleList(nn.Linear(width, 2 * width, bias=False) for _ in range(n_layers))
        self.down = nn.ModuleList(nn.Linear(2 * width, width, bias=False) for _ in range(n_layers))
        self.head = nn.Linear(width, 50, bias=False)

    def set_multipliers(self, multipliers: Multipliers) -> None:
        self.multipliers = multipliers

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + self.multipliers.residual * down(F.silu(up(x)))
        logits: Tensor = self.head(x * self.multipliers.output)
        return logits


def own_role(name: str, shape: tuple[int, ...]) -> Role:
    kinds: dict[str, Role] = {"embedding": "embedding", "head": "head", "down": "hidden_out"}
    return kinds.get(name.partition(".")[0], "hidden")


def own_table(params: BaseParams, width: int = 48, base: int = 16) -> Table:
    geometry = Geometry(n_layers=2, base_n_layers=2)
    return parametrize(
        Residual(width, 2), Residual(base, 2), params, geometry=geometry, role=own_role
    )


@pytest.fixture
def own(make_sound: Callable[..., Bundle], sound: Bundle) -> Bundle:
    """A bundle for it: its config has none of the decoder's fields but the depth."""
    return make_sound(
        target={"config": {"width": 48, "n_layers": 2, "kind": "residual"}},
        base={"config": {"width": 16, "n_layers": 2, "kind": "residual"}, "base_width": 16},
        table=own_table(sound.base_hyperparameters),
        data={"fingerprint": "a" * 64, "tokenizer_fingerprint": "b" * 64, "vocab_size": 50},
    )


def test_a_model_of_ones_own(own: Bundle) -> None:
    assert own.verify() == ()
    model = Residual(48, 2)
    table = own.apply(model, rebuild=lambda: own_table(own.base_hyperparameters))
    assert table.row("up.1.weight").width_ratio == 3.0
    assert model.multipliers == table.multipliers
    assert model.up[1].weight.std().item() == pytest.approx(
        table.row("up.1.weight").init_std, rel=0.05
    )


def test_only_sizes_are_the_own_models_word(own: Bundle, tmp_path: Path) -> None:
    """Its vocabulary and widths in the config, and shapes, which no rule of these reads."""
    document = document_of(own)
    found = accepted(document, tmp_path, a_little(1e-6), (int, float))
    common = tuple(p for p in FREE_NUMBERS if "max_seq_len" not in p)
    extra = found - named(document, common)
    assert named(document, common) <= found
    rows = [row["pattern"] for row in document["table"]["rows"]]
    shapes = {path for path in extra if path.startswith("table.")}
    assert extra - shapes == {"base.config.width", "target.config.width", "data.vocab_size"}
    # the larger side sets Muon's scale, and an end's d_model its width ratio
    assert shapes == {
        f"table.rows.{rows.index(pattern)}.shape.{side}"
        for pattern, side in (
            ("embedding.weight", 0), ("up.*.weight", 1), ("down.*.weight", 0), ("head.weight", 0),
        )
    }  # fmt: skip
    for path in shapes:
        changed = read(rehashed(put(document, at(path), 51)), tmp_path)
        with pytest.raises(UserError, match="the model's own table differs"):
            changed.verify(rebuild=lambda: own_table(own.base_hyperparameters))


def test_a_width_ratio_is_the_tables_word_until_the_model_is_asked(
    make_sound: Callable[..., Bundle], own: Bundle
) -> None:
    """A whole table made for a wrong ratio inside the blocks."""
    other = own_table(own.base_hyperparameters, base=24)
    by_pattern = {row.pattern: row for row in other.rows}
    mixed = tuple(
        by_pattern[row.pattern] if row.role.startswith("hidden") else row for row in own.table.rows
    )
    fields = {name: getattr(own, name) for name in ("target", "base", "data")}
    table = own.table.model_copy(update={"rows": mixed})
    forged = make_sound(**fields, table=table)
    assert forged.verify() == ()
    with pytest.raises(UserError, match="the model's own table differs"):
        forged.verify(rebuild=lambda: own_table(own.base_hyperparameters))


@pytest.mark.parametrize(
    ("path", "value", "what"),
    [
        ("table.rows.0.width_ratio", 2.0, "not the width over the base width"),
        ("table.rows.1.width_ratio", 2.0, "the rules do not reproduce this"),
        ("table.rows.1.width_ratio", 1e-320, "a number is out of every range"),
        ("table.rows.1.shape", [], "not a shape"),
        ("table.rows.1.shape", [0, 48], "not a shape"),
        ("table.rows.1.shape", [48], "a matrix role needs two dimensions"),
        ("table.rows.1.role", "hidden_out", "the rules do not reproduce this"),
        ("table.rows", [], "no row has the role embedding or head"),
        ("base.config.kind", "other", "base and target differ in more than size"),
        ("target.config.n_layers", 4, "the rules do not reproduce this"),
        ("base.config.n_layers", 0, "not a size"),
        ("target.config.head_dim", 4, "base and target differ in more than size"),
        ("base.base_width", 24, "not the width over the base width"),
    ],
)
def test_what_an_own_model_is_refused_for(
    own: Bundle, tmp_path: Path, path: str, value: object, what: str
) -> None:
    assert refusal(put(document_of(own), at(path), value), tmp_path).what.startswith(what)


def test_an_own_model_without_depth_has_depth_one(
    make_sound: Callable[..., Bundle], own: Bundle, tmp_path: Path
) -> None:
    fields = {
        "target": {"config": {"width": 48, "vocab_size": 50}},
        "base": {"config": {"width": 16, "vocab_size": 50}, "base_width": 16},
        "data": own.data,
    }
    params = own.base_hyperparameters
    p = get_parametrization(own.parametrization.name)
    table = parametrize(Residual(48, 1), Residual(16, 1), params, p, role=own_role)
    bundle = make_sound(**fields, table=table)
    assert bundle.verify() == ()
    error = refusal(put(document_of(bundle), at("data.vocab_size"), 51), tmp_path)
    assert (error.where, error.expected) == ("data.vocab_size", 50)


def test_differences() -> None:
    left = {"a": [1, 2.0], "b": {"c": True}, "d": None, "e": [1]}
    assert list(differences(left, copy.deepcopy(left))) == []
    assert list(differences(left, {**left, "a": [1.0, 2]})) == [], "equal numbers"
    right = {"a": [1, 2.0000001], "b": {"c": 1, "x": "y"}, "e": [1, 2]}
    assert list(differences(left, right)) == [
        ("a.1", 2.0, 2.0000001),
        ("b.c", True, 1),
        ("b.x", "(absent)", "y"),
        ("d", None, "(absent)"),
        ("e", [1], [1, 2]),
    ]
    assert list(differences({"a": 2.0}, {"a": 2.0000001}, rounding=1e-6)) == []


def test_a_coordinate_check_below_the_bundle_s_learning_rate_is_noted(
    sound: Bundle, tmp_path: Path
) -> None:
    for lr, noted in ((2**-7, False), (2**-6, False), (2**-7 * 0.99, True)):
        document = put(document_of(sound), at("evidence.coord_check.lr"), lr)
        notes = read(rehashed(document), tmp_path).verify()
        assert any("only larger steps show" in note for note in notes) == noted
