"""`mutransfer train`: every refusal is one line that says what, where, got and expected."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import full_scale.train as entry
from full_scale.trainer import Trainer
from mutransfer.bundle import Bundle, digest
from mutransfer.cli import main
from sweeps.experiment import Experiment

Document = dict[str, Any]
Files = Callable[..., tuple[Path, Path]]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def document(make_bundle: Callable[..., Bundle], passed: dict[str, Any]) -> Document:
    """A bundle that the recipe was written for, with evidence that passes."""
    return json.loads(json.dumps(make_bundle(**passed).model_dump(mode="json")))


@pytest.fixture
def command(files: Files, tmp_path: Path) -> Callable[..., list[str]]:
    """Writes a bundle (data or text) and the recipe, changed by keywords; returns the command."""

    def write(bundle: Document | str, **recipe: Any) -> list[str]:
        path, recipe_path = files(**recipe)
        text = bundle if isinstance(bundle, str) else json.dumps(bundle)
        path.write_text(text, encoding="utf-8")
        folders = ["--out", str(tmp_path / "run"), "--data-folder", str(tmp_path / "data")]
        return ["train", "--bundle", str(path), "--recipe", str(recipe_path), *folders]

    return write


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> Callable[..., str]:
    """Runs a command that must be refused before there is a trainer; returns the one line."""

    def no_trainer(**options: object) -> Trainer:
        raise AssertionError("a trainer was made")

    def run(words: list[str]) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(entry, "Trainer", no_trainer)
            capsys.readouterr()
            code = main(words)
        out, error = capsys.readouterr()
        assert (code, out) == (2, ""), error
        assert error.startswith("Error: ")
        assert error.count("\n") == 1
        assert error.endswith("\n")
        left = {path.name for path in (tmp_path / "run").glob("*")}
        assert left <= {".lock"}, "something was written into the run folder"
        return error

    return run


def put(document: Document, path: str, value: Any) -> Document:
    """The same with one value replaced and the hash as it was."""
    changed = json.loads(json.dumps(document))
    place: Any = changed
    *above, last = path.split(".")
    for part in above:
        place = place[int(part) if isinstance(place, list) else part]
    place[int(last) if isinstance(place, list) else last] = value
    return changed


def rehashed(document: Document) -> Document:
    return {**document, "sha256": digest(document)}


def test_what_is_right_trains(
    document: Document, command: Callable[..., list[str]], tmp_path: Path, capsys: Capture
) -> None:
    """Without this, a command that refuses everything would pass the tests below."""
    assert main(command(document)) == 0
    out, error = capsys.readouterr()
    assert error == ""
    assert "note: evidence" not in out
    assert (tmp_path / "run" / "run.json").is_file()


def test_a_real_bundle_trains(
    real_bundle: Path, tiny_experiment: Experiment, command: Callable[..., list[str]],
    tmp_path: Path, capsys: Capture,
) -> None:  # fmt: skip
    e = tiny_experiment
    data = {**e.data.model_dump(exclude_none=True), "train": list(e.data.train), "heldout": []}
    phase = {"name": "one", "steps": 12, "seq_len": 16, "batch_size": 4}
    words = command(
        real_bundle.read_text(encoding="utf-8"),
        model=e.target.model_dump(), data=data, phases=[phase],
    )  # fmt: skip
    assert main([*words, "--accept-unverified"]) == 0
    assert "note: evidence.transfer_check: " in capsys.readouterr().out
    run = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    bundle = Bundle.load(real_bundle)
    assert run["base_hyperparameters"] == bundle.base_hyperparameters.model_dump()
    assert not any("another corpus" in note for note in run["notes"]), "the very text it was on"


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("base_hyperparameters.lr", 0.0078126,
         ["base_hyperparameters.lr: ", "trials do not yield", "got 0.0078126",
          "expected 0.0078125 of trial 1"]),
        ("base_hyperparameters.init_std", 0.2,
         ["table.rows.", ".init_std: ", "got 0.1", "expected 0.2"]),
        ("table.rows.2.optimizers.adamw.lr", 0.00390626,
         ["table.rows.layers.*.attention.q.weight.optimizers.adamw.lr: ",
          "got 0.00390626", "expected 0.00390625"]),
        ("table.rows.2.optimizers.muon.scale", 1.7, ["optimizers.muon.scale: ", "got 1.7"]),
        ("table.multipliers.output", 0.6, ["table.multipliers.output: ", "got 0.6",
                                           "expected 0.5"]),
        ("evidence.study.trials.1.losses.0", 2.4,
         ["evidence.study.trials.1.mean_loss: ", "got 2.625", "expected 2.59"]),
        ("evidence.study.trials.1.params.lr", 0.0088125,
         ["base_hyperparameters.lr: ", "got 0.0078125", "expected 0.0088125 of trial 1"]),
        ("evidence.study.trials.2.number", 3, ["evidence.study.trials: ", "got [0, 1, 3, 3]"]),
        ("evidence.transfer_check.drift", 0.15,
         ["evidence.transfer_check.drift: ", "got 0.15", "expected 0.25"]),
        ("evidence.transfer_check.drift_high", 1.75,
         ["evidence.transfer_check.verdict: ", "got PASS", "expected WARN"]),
        ("base.base_width", 33, ["table.", "the rules do not reproduce this"]),
        ("base.config.d_ff", 81, ["base.config.d_ff: ", "got 81", "target's 160"]),
        ("provenance.lr.trials.0", 0, ["provenance.lr: ", "got 'test' [0]", "expected 'test' [1]"]),
        ("batch_tokens", 65, ["batch_tokens", "recipe 'tiny'", "got 64", "expected 65",
                              "conversion.batch_rule"]),
        ("horizon_tokens", 1409, ["horizon_tokens", "recipe 'tiny'", "got 1408", "expected 1409",
                                  "conversion.horizon_rule"]),
        ("data.vocab_size", 255, ["data.vocab_size: ", "got 255", "expected 256"]),
        ("data.tokenizer_fingerprint", "0" * 64,
         ["data.tokenizer: ", "another tokenizer", "got ", "expected 000000"]),
    ],
)  # fmt: skip
def test_one_changed_value(
    document: Document,
    command: Callable[..., list[str]],
    refused: Callable[..., str],
    path: str,
    value: object,
    words: list[str],
) -> None:
    changed = put(document, path, value)
    kept = refused(command(changed))
    for word in ("sha256: the content does not have the hash that it claims",
                 f"got {document['sha256']}", f"expected {digest(changed)}"):  # fmt: skip
        assert word in kept
    recomputed = refused(command(rehashed(changed)))
    for word in words:
        assert word in recomputed, recomputed
    # accepting a bundle without a passed check accepts nothing of this
    assert refused([*command(rehashed(changed)), "--accept-unverified"]) == recomputed


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("evidence", None, ["evidence.coord_check: ", "got missing"]),
        ("evidence.coord_check", None, ["evidence.coord_check: ", "got missing"]),
        ("evidence.transfer_check", None, ["evidence.transfer_check: ", "got missing"]),
        ("evidence.coord_check.verdict", "FAIL", ["evidence.coord_check: ", "got FAIL"]),
        ("evidence.transfer_check.verdict", "FAIL", ["evidence.transfer_check: ", "got FAIL"]),
    ],
)
def test_missing_or_failed_verdicts_need_the_flag(
    document: Document,
    command: Callable[..., list[str]],
    refused: Callable[..., str],
    path: str,
    value: object,
    words: list[str],
) -> None:
    changed = put(document, path, value)
    assert "sha256: " in refused(command(changed))
    error = refused(command(rehashed(changed)))
    for word in (*words, "expected PASS or WARN", "--accept-unverified"):
        assert word in error


def test_the_flag_is_recorded(
    document: Document, command: Callable[..., list[str]], tmp_path: Path, capsys: Capture
) -> None:
    changed = put(document, "evidence.coord_check", None)
    changed = rehashed(put(changed, "evidence.transfer_check.verdict", "FAIL"))
    assert main([*command(changed), "--accept-unverified"]) == 0
    printed = capsys.readouterr().out
    run = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    for note in ("evidence.coord_check: missing, accepted unverified",
                 "evidence.transfer_check: FAIL, accepted unverified"):  # fmt: skip
        assert f"note: {note}\n" in printed
        assert note in run["notes"]


def test_a_verdict_in_doubt_is_accepted_printed_and_recorded(
    document: Document, command: Callable[..., list[str]], tmp_path: Path, capsys: Capture
) -> None:
    assert main(command(rehashed(put(document, "evidence.coord_check.verdict", "WARN")))) == 0
    assert "note: evidence.coord_check: WARN\n" in capsys.readouterr().out
    run = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert "evidence.coord_check: WARN" in run["notes"]


@pytest.mark.parametrize(
    ("model", "got", "expected"),
    [
        ({"d_ff": 320}, "d_ff = 320", "d_ff = 160"),
        ({"rope_base": 5e5}, "rope_base = 500000.0", "rope_base = 10000.0"),
        ({"tied": False}, "tied = False", "tied = True"),
        ({"n_layers": 3, "max_seq_len": 512}, "n_layers = 3, max_seq_len = 512",
         "n_layers = 2, max_seq_len = 2048"),
    ],
)  # fmt: skip
def test_a_recipe_of_another_model(
    document: Document,
    recipe_fields: dict[str, Any],
    command: Callable[..., list[str]],
    refused: Callable[..., str],
    model: Document,
    got: str,
    expected: str,
) -> None:
    error = refused(command(document, model=recipe_fields["model"] | model))
    assert "recipe 'tiny': the recipe's model is not the bundle's target" in error
    assert f"; got {got}; expected {expected}. " in error


def test_another_vocabulary(
    document: Document,
    text: Path,
    recipe_fields: dict[str, Any],
    command: Callable[..., list[str]],
    refused: Callable[..., str],
) -> None:
    data = {"train": [str(text)], "tokenizer": "bpe", "vocab_size": 300}
    error = refused(
        command(document, model=recipe_fields["model"] | {"vocab_size": 300}, data=data)
    )
    assert "got vocab_size = 300; expected vocab_size = 256" in error
    error = refused(command(document, data=data))  # not even the recipe's own model's
    assert "data.vocab_size is 300, but the model's is 256" in error


def test_another_batch_or_horizon_needs_a_rule(
    document: Document,
    command: Callable[..., list[str]],
    refused: Callable[..., str],
    capsys: Capture,
) -> None:
    phase = {"name": "one", "seq_len": 16, "batch_size": 8, "steps": 10}
    other = {"phases": [phase]}
    what = "is not what the bundle was tuned for; got"
    cure = "Make them equal, or name a rule in conversion"
    for rules, words in (
        ({}, f"batch_tokens {what} 128; expected 64. {cure}.batch_rule."),
        ({"horizon_rule": "constant"}, f"batch_tokens {what} 128; expected 64."),
        (
            {"batch_rule": "sqrt"},
            f"horizon_tokens {what} 1280; expected 1408. {cure}.horizon_rule.",
        ),
    ):
        error = refused(command(document, **other, conversion=rules))
        assert f"recipe 'tiny': {words}" in error
    rules = {"batch_rule": "sqrt", "horizon_rule": "constant"}
    assert main(command(document, **other, conversion=rules)) == 0
    printed = capsys.readouterr().out
    assert "batch_tokens: tuned 64, used 128; rule 'sqrt' multiplies" in printed
    assert "by 1.41421\n" in printed
    assert "horizon_tokens: tuned 1,408, used 1,280; rule 'constant'" in printed


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("batch_token", "batch_tokens"),
        ("base_hyperparameters.lrs", "lr"),
        ("table.rows.0.init", "init_std"),
        ("evidence.transfer_check.optima.0.log_lr", "log2_lr"),
    ],
)
def test_an_unknown_field_of_the_bundle(
    document: Document,
    command: Callable[..., list[str]],
    refused: Callable[..., str],
    path: str,
    nearest: str,
) -> None:
    words = command(rehashed(put(document, path, 1)))
    error = refused(words)
    assert f"{words[2]}: unknown field '{path}'; expected '{nearest}' perhaps" in error


def test_an_unknown_field_or_a_learning_rate_in_the_recipe(
    document: Document, command: Callable[..., list[str]], refused: Callable[..., str]
) -> None:
    words = command(document, clip_norms=1.0)
    assert f"{words[4]}: unknown field 'clip_norms'; expected 'clip_norm' perhaps" in refused(words)
    phase = {"name": "one", "steps": 22, "seq_len": 16, "batch_size": 4, "lr": 0.1}
    error = refused(command(document, phases=[phase]))
    assert "unknown field 'phases.0.lr'" in error


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "1e400"])
@pytest.mark.parametrize(
    "path", ["base_hyperparameters.lr", "table.rows.0.init_std", "evidence.transfer_check.drift"]
)
def test_nan(
    document: Document,
    command: Callable[..., list[str]],
    refused: Callable[..., str],
    path: str,
    literal: str,
) -> None:
    text = json.dumps(put(document, path, "HERE")).replace('"HERE"', literal)
    words = command(text)
    error = refused(words)
    assert f"{words[2]}: not a readable JSON file ({literal} is " in error


def test_nan_in_the_recipe(
    document: Document, command: Callable[..., list[str]], refused: Callable[..., str]
) -> None:
    error = refused(command(document, clip_norm=float("nan")))
    assert "recipe.toml: clip_norm: " in error
    assert "got nan" in error


def test_another_schema_version_and_a_missing_file(
    document: Document, command: Callable[..., list[str]], refused: Callable[..., str]
) -> None:
    words = command(put(document, "schema_version", 3))
    assert f"{words[2]}: schema_version: unknown schema version; got 3; expected 2" in refused(
        words
    )
    Path(words[2]).unlink()
    assert f"{words[2]}: no such file" in refused(words)


@pytest.mark.parametrize(
    ("path", "value"), [("base.config.max_seq_len", "many"), ("base.config.max_seq_len", 0)]
)
def test_a_base_that_is_no_decoder(
    document: Document,
    command: Callable[..., list[str]],
    refused: Callable[..., str],
    path: str,
    value: object,
) -> None:
    error = refused(command(rehashed(put(document, path, value))))
    assert "base.config: max_seq_len: " in error
    assert f"got {value!r}" in error


def test_a_parameter_matched_by_no_pattern_or_by_two(
    document: Document, command: Callable[..., list[str]], refused: Callable[..., str]
) -> None:
    rows = document["table"]["rows"]
    error = refused(command(rehashed(put(document, "table.rows", rows[1:]))))
    assert "table.rows.embedding.weight: the rules do not reproduce this" in error
    assert "got '(absent)'" in error.replace('"', "")
    twice = [*rows, {**rows[2], "pattern": "layers.0.attention.q.weight"}]
    error = refused(command(rehashed(put(document, "table.rows", twice))))
    assert "table.rows.layers.0.attention.q.weight: the rules do not reproduce this" in error
