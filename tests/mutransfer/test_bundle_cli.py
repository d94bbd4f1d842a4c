"""`mutransfer bundle …`: what it prints, where, and how it ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from mutransfer.bundle import Bundle, digest
from mutransfer.cli import main

Document = dict[str, Any]
Capture = pytest.CaptureFixture[str]
Save = Callable[..., str]


@pytest.fixture
def save(sound: Bundle, tmp_path: Path) -> Save:
    """Writes the sound bundle; keywords, dots as `__`, replace values; the hash is recomputed."""

    def write(name: str = "bundle.json", *, rehash: bool = True, **changes: Any) -> str:
        document = json.loads(json.dumps(sound.model_dump(mode="json")))
        for path, value in changes.items():
            place: Any = document
            *above, last = path.split("__")
            for part in above:
                place = place[int(part) if isinstance(place, list) else part]
            place[last] = value
        if rehash:
            document["sha256"] = digest(document)
        (tmp_path / name).write_text(json.dumps(document), encoding="utf-8")
        return str(tmp_path / name)

    return write


def run(capsys: Capture, *words: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `mutransfer bundle …`."""
    capsys.readouterr()
    code = main(["bundle", *words])
    done = capsys.readouterr()
    return code, done.out, done.err


def refused(capsys: Capture, *words: str) -> str:
    """The one line that a refused command leaves on standard error."""
    code, _, error = run(capsys, *words)
    assert code == 2
    assert error.startswith("Error: ")
    assert error.count("\n") == 1
    assert error.endswith("\n")
    return error


def test_show_says_what_is_in_it(save: Save, capsys: Capture, sound: Bundle) -> None:
    code, out, error = run(capsys, "show", save())
    assert (code, error) == (0, "")
    for words in (
        f"Bundle {sound.sha256[:12]} of the experiment 'made by hand'",
        "d_model: 32 -> 96",
        "n_layers: 2 -> 4",
        "max_seq_len: 64 -> 128",
        "completep-tied (version 1), m = 1 at width 24",
        "512 tokens per step, 51,200 tokens in all",
        "trial 1 of 4 has the lowest held-out loss, 2.6250 ± 0.0722 nats over 3 seeds",
        "coordinate check: PASS, 2 slopes",
        "the best learning rate moves by 0.25 [0, 0.75] octaves",
        "costs 0.002 [-0.001, 0.01] nats",
        "width 64: best learning rate 2^-7.25",
        "Sound: hash, table, base hyperparameters and evidence agree",
    ):
        assert words in out
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line.split()}
    assert lines["lr"][1:5] == ["0.0078125", "test,", "trial", "1"]
    assert lines["beta2"][1:3] == ["0.93", "fixed"]
    assert lines["layers.*.mlp.down.weight"][1:] != []
    assert all(row.pattern in out for row in sound.table.rows)


def test_show_prints_verdicts_and_still_ends_with_0(save: Save, capsys: Capture) -> None:
    path = save(evidence__transfer_check__verdict="FAIL", evidence__coord_check=None)
    code, out, error = run(capsys, "show", path)
    assert (code, error) == (0, "")
    assert "note: evidence.transfer_check: FAIL\n" in out
    assert "note: evidence.coord_check: missing\n" in out
    code, out, _ = run(capsys, "show", save(evidence=None))
    assert code == 0
    assert "Evidence: none." in out


def test_show_never_calls_a_changed_bundle_sound(save: Save, capsys: Capture) -> None:
    path = save(rehash=False, batch_tokens=513)
    code, out, error = run(capsys, "show", path)
    assert code == 2
    assert "Sound" not in out
    assert error.count("\n") == 1
    assert error.startswith(f"Error: {path}: sha256: ")


def test_validate_ends_with_0_on_pass_and_warn(save: Save, capsys: Capture) -> None:
    path = save()
    assert run(capsys, "validate", path) == (0, f"{path}: valid\n", "")
    path = save(evidence__coord_check__verdict="WARN")
    assert run(capsys, "validate", path) == (
        0, f"note: evidence.coord_check: WARN\n{path}: valid\n", "",
    )  # fmt: skip


@pytest.mark.parametrize("name", ["coord_check", "transfer_check"])
def test_validate_ends_with_1_on_a_failed_verdict(save: Save, capsys: Capture, name: str) -> None:
    path = save(**{f"evidence__{name}__verdict": "FAIL"})
    code, out, error = run(capsys, "validate", path)
    assert (code, error) == (1, "")
    assert out == f"{path}: the file is sound, but its verdict is FAIL: {name}\n"
    code, out, _ = run(capsys, "validate", path, "--accept-unverified")
    assert code == 0
    assert f"note: evidence.{name}: FAIL, accepted unverified" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rehash": False, "batch_tokens": 513}, ["sha256: ", "; got ", "; expected "]),
        ({"base_hyperparameters__lr": 0.01},
         ["base_hyperparameters.lr: ", "got 0.01", "expected 0.0078125 of trial 1"]),
        ({"table__rows__1__init_std": 0.5}, ["table.rows.", ".init_std: ", "got 0.5"]),
        ({"evidence": None}, ["evidence.coord_check: ", "got missing", "--accept-unverified"]),
        ({"evidence__coord_check": None}, ["evidence.coord_check: ", "got missing"]),
        ({"schema_version": 3}, ["schema_version: ", "got 3", "expected 2"]),
        ({"batch": 1}, ["unknown field 'batch'", "expected 'batch_tokens' perhaps"]),
        ({"evidence__study__trials__1__los": 1}, ["unknown field 'evidence.study.trials.1.los'",
                                                  "expected 'losses' perhaps"]),
        ({"data__vocab_size": "256"}, ["data.vocab_size: ", "got '256'", "expected 256"]),
    ],
)  # fmt: skip
def test_validate_ends_with_2_and_one_line_on_everything_else(
    save: Save, capsys: Capture, options: Document, words: list[str]
) -> None:
    path = save(**options)
    error = refused(capsys, "validate", path)
    for word in [path, *words]:
        assert word in error


@pytest.mark.parametrize("command", ["show", "validate"])
def test_files_that_are_no_bundles(tmp_path: Path, capsys: Capture, command: str) -> None:
    path = tmp_path / "x.json"
    assert f"{path}: no such file" in refused(capsys, command, str(path))
    for text, words in (("{", "not a readable JSON file"), ("[]", "expected a JSON object"),
                        ('{"a": NaN}', "NaN is not JSON")):  # fmt: skip
        path.write_text(text, encoding="utf-8")
        assert words in refused(capsys, command, str(path))


def test_diff(save: Save, capsys: Capture) -> None:
    left = save("left.json")
    assert run(capsys, "diff", left, left) == (0, "", "")
    right = save("right.json", batch_tokens=1024, evidence__coord_check=None, versions__torch="2.9")
    code, out, error = run(capsys, "diff", left, right)
    assert (code, error) == (1, "")
    lines = out.splitlines()
    assert "batch_tokens: 512 -> 1024" in lines
    assert "versions.torch: (absent) -> 2.9" in lines
    assert [line.partition(":")[0] for line in lines] == [
        "evidence.coord_check", "batch_tokens", "versions.torch", "sha256",
    ]  # fmt: skip
    assert "nothing.json: no such file" in refused(
        capsys, "diff", left, str(Path(left).with_name("nothing.json"))
    )


def test_words_that_are_no_command(capsys: Capture) -> None:
    assert "validat" in refused(capsys, "validat", "x.json")
    assert run(capsys)[0] == 2


def test_schema_fits_a_real_bundle(real_bundle: Path, sound: Bundle, capsys: Capture) -> None:
    code, out, error = run(capsys, "schema")
    assert (code, error) == (0, "")
    schema = json.loads(out)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    document = json.loads(real_bundle.read_text(encoding="utf-8"))
    validator.validate(document)
    validator.validate(json.loads(json.dumps(sound.model_dump(mode="json"))))

    def refuses(change: Callable[[Document], object]) -> bool:
        changed = json.loads(json.dumps(document))
        change(changed)
        return not validator.is_valid(changed)

    assert refuses(lambda d: d.update(extra=1))
    assert refuses(lambda d: d.pop("data"))
    assert refuses(lambda d: d.update(schema_version=3))
    assert refuses(lambda d: d.update(sha256="x"))
    assert refuses(lambda d: d["base_hyperparameters"].update(lr="0.1"))
    assert refuses(lambda d: d["base_hyperparameters"].update(lr=-0.1))
    assert refuses(lambda d: d["table"]["rows"][0].update(role="matrix"))
    assert refuses(lambda d: d["table"]["rows"][2]["optimizers"]["adamw"].update(x=1))
    assert refuses(lambda d: d["provenance"]["lr"].update(source="guess"))
    assert refuses(lambda d: d["evidence"]["study"]["trials"][0].update(state="DONE"))
    assert refuses(lambda d: d["evidence"]["coord_check"]["slopes"][0].pop("slope"))
    assert not refuses(lambda d: None)


def test_a_real_bundle_is_shown_and_valid(real_bundle: Path, capsys: Capture) -> None:
    assert run(capsys, "validate", str(real_bundle), "--accept-unverified")[0] == 0
    code, out, _ = run(capsys, "show", str(real_bundle))
    assert code == 0
    assert "d_model: 32 -> 64" in out
    assert run(capsys, "diff", str(real_bundle), str(real_bundle))[0] == 0


EVIL = "\x1b[2J\x1b]0;pwned\x07\r\x9b31m\u202eevil\x00\nSound: all is well"


def harmless(text: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in text)


@pytest.mark.parametrize(
    "path",
    [
        "experiment__name",
        "versions__python",
        "data__fingerprint",
        "evidence__coord_check__slopes__0__name",
        "evidence__coord_check__slopes__0__kind",
    ],
)
def test_what_a_file_could_slip_a_terminal_is_not_printed(
    save: Save, capsys: Capture, path: str
) -> None:
    changes = {path: EVIL}
    if "slopes" in path:  # the name is shown beside a bad verdict
        changes |= {"evidence__coord_check__slopes__0__verdict": "WARN",
                    "evidence__coord_check__verdict": "WARN"}  # fmt: skip
    file = save("evil.json", **changes)
    code, out, error = run(capsys, "show", file)
    assert (code, error) == (0, "")
    assert harmless(out)
    assert "evil" in out or path == "data__fingerprint"
    assert not any(line.startswith("Sound: all is well") for line in out.splitlines())
    code, out, error = run(capsys, "diff", save("clean.json"), file)
    assert (code, error) == (1, "")
    assert harmless(out)
    assert "evil" in out
    assert not any(line.startswith("Sound: all is well") for line in out.splitlines())


@pytest.mark.parametrize(
    "changes",
    [
        {f"base_hyperparameters__{EVIL}": 1},
        {f"base__config__{EVIL}": [1]},
        {f"provenance__{EVIL}": {"source": "fixed"}},
        {"parametrization__name": EVIL},
        {"table__rows__0__pattern": EVIL},
        {"data__vocab_size": EVIL},
    ],
)
def test_refusals_do_not_print_it_either(save: Save, capsys: Capture, changes: Document) -> None:
    error = refused(capsys, "validate", save(**changes))
    assert harmless(error)
    assert "evil" in error


def test_migrate_writes_a_valid_bundle_and_overwrites_nothing(
    sound: Bundle, tmp_path: Path, capsys: Capture
) -> None:
    old = json.loads(json.dumps(sound.model_dump(mode="json"))) | {"schema_version": 1}
    check = old["evidence"]["coord_check"]
    del check["widths"], check["replay"]
    old["sha256"] = digest(old)
    (tmp_path / "old.json").write_text(json.dumps(old))
    paths = str(tmp_path / "old.json"), str(tmp_path / "new.json")
    assert run(capsys, "migrate", *paths)[0] == 0
    assert run(capsys, "validate", paths[1])[0] == 0
    assert "file exists" in refused(capsys, "migrate", *paths)
    newer = str(tmp_path / "newer.json")
    assert "not a bundle of an older schema version" in refused(capsys, "migrate", paths[1], newer)
    assert not (tmp_path / "newer.json").exists()
