"""The bundle as a file: what survives a round trip, what the hash covers, what load refuses."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mutransfer import param_groups
from mutransfer.bundle import Bundle, digest, migrate
from mutransfer.errors import UserError
from proxies.decoder import Decoder, DecoderConfig

Document = dict[str, Any]
Refuse = Callable[[str | Document], UserError]


@pytest.fixture
def document(sound: Bundle) -> Document:
    """The bundle as plain data, to be changed."""
    return json.loads(json.dumps(sound.model_dump(mode="json")))


@pytest.fixture
def refuse(tmp_path: Path) -> Refuse:
    """Writes a text, or a document with its hash set right, which `Bundle.load` must refuse."""

    def load(content: str | Document) -> UserError:
        path = tmp_path / "refused.json"
        if not isinstance(content, str):
            content = json.dumps({**content, "sha256": digest(content)})
        path.write_text(content, encoding="utf-8")
        with pytest.raises(UserError) as error:
            Bundle.load(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
        return error.value

    return load


def inner(document: Document, path: str) -> Any:
    """The object at a dotted path."""
    place: Any = document
    for part in path.split(".") if path else ():
        place = place[int(part) if part.isdigit() else part]
    return place


def test_a_round_trip_changes_nothing(sound: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "bundle.json"
    sound.save(path)
    loaded = Bundle.load(path)
    assert loaded == sound
    assert loaded.digest() == sound.digest() == sound.sha256
    again = tmp_path / "again.json"
    loaded.save(again)
    assert again.read_bytes() == path.read_bytes()


def test_floats_survive_exactly(make_sound: Callable[..., Bundle], tmp_path: Path) -> None:
    values = {
        "third": 1 / 3,
        "next": math.nextafter(0.1, 1),
        "small": 5e-324,
        "large": 1.7976931348623157e308,
        "minus": -0.1 - 0.2,
        "whole": 3.0,
    }
    base, target = ({"config": values, **more} for more in ({"base_width": 1}, {}))
    bundle = make_sound(base=base, target=target)
    bundle.save(tmp_path / "bundle.json")
    loaded = Bundle.load(tmp_path / "bundle.json").target.config
    assert {name: value.hex() for name, value in loaded.items() if isinstance(value, float)} == {
        name: value.hex() for name, value in values.items()
    }


def test_create_fills_in_schema_version_and_hash(
    sound: Bundle, make_sound: Callable[..., Bundle]
) -> None:
    assert sound.schema_version == 2
    rest = {k: v for k, v in sound.model_dump().items() if k not in ("schema_version", "sha256")}
    assert Bundle.create(**rest) == sound
    assert make_sound(batch_tokens=513).sha256 != sound.sha256


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"batch_tokens": 0}, ["batch_tokens", "greater than or equal to 1"]),
        ({"batchtokens": 1}, ["unknown field 'batchtokens'", "'batch_tokens' perhaps"]),
        ({"data": None}, ["data"]),
        ({"base_hyperparameters": {"lr": math.nan}}, ["base_hyperparameters.lr", "finite"]),
        ({"target": {"config": {"theta": math.inf}}}, ["bundle: target.config.theta: ", "inf"]),
    ],
)
def test_create_refuses_what_is_no_bundle(
    make_sound: Callable[..., Bundle], fields: Document, words: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        make_sound(**fields)
    for word in words:
        assert word in str(error.value)


def test_digest_is_sha256_over_rfc_8785_without_the_hash() -> None:
    # RFC 8785: sorted keys, no spaces, numbers as ECMAScript writes them, text as UTF-8
    written = '{"a":[1e-7,"é"],"b":1,"c":{"x":0.000001,"y":null}}'
    expected = hashlib.sha256(written.encode()).hexdigest()
    document = {"c": {"y": None, "x": 1e-6}, "b": 1.0, "a": [1e-7, "é"]}
    assert digest(document) == expected
    assert digest({**document, "sha256": "0" * 64}) == expected
    assert digest({**document, "sha255": "0" * 64}) != expected


def test_the_hash_does_not_depend_on_the_order_of_keys(document: Document, tmp_path: Path) -> None:
    def turned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: turned(value[key]) for key in reversed(value)}
        return [turned(item) for item in value] if isinstance(value, list) else value

    path = tmp_path / "turned.json"
    path.write_text(json.dumps(turned(document), indent=7), encoding="utf-8")
    loaded = Bundle.load(path)
    assert loaded.sha256 == loaded.digest()
    assert loaded.verify() == ()


def test_what_has_no_hash_is_refused() -> None:
    for value in (math.nan, math.inf, 2**53 + 1, "\ud800"):
        with pytest.raises(UserError, match="cannot be hashed"):
            digest({"a": value})
    assert digest({"a": 2**53 - 1}) != digest({"a": 2**53 - 2})


def test_apply_initializes_and_gives_groups(sound: Bundle) -> None:
    model = Decoder(DecoderConfig.model_validate(sound.target.config))
    table = sound.apply(model, seed=3)
    assert table is sound.table
    for name, parameter in model.named_parameters():
        row = table.row(name)
        if row.role in ("gain", "final_gain"):
            assert bool((parameter == 1).all())
        else:
            assert parameter.std().item() == pytest.approx(row.init_std, rel=0.05)
    for name in ("embedding", "output", "residual", "attention"):
        value = model.get_buffer(f"{name}_multiplier").item()
        assert value == pytest.approx(getattr(table.multipliers, name), rel=1e-6)

    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    sound.apply(model, seed=4)
    assert not torch.equal(model.embedding.weight, first["embedding.weight"])
    sound.apply(model, seed=3)
    assert all(torch.equal(p, first[name]) for name, p in model.named_parameters())

    groups = param_groups(model, table, "adamw")
    peaks = {name: group["peak_lr"] for group in groups for name, _ in group["params"]}
    assert peaks == {name: table.row(name).optimizers.adamw.lr for name in first}
    optimizer = torch.optim.AdamW(groups)
    tokens = torch.randint(256, (4, 17), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(4):
        loss = model.loss(tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_apply_refuses_another_model_and_missing_evidence(
    make_sound: Callable[..., Bundle], sound: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    config = DecoderConfig.model_validate(sound.target.config)
    other = Decoder(config.model_copy(update={"d_ff": 64}))
    before = other.embedding.weight.detach().clone()
    with pytest.raises(UserError, match="shape differs"):
        sound.apply(other)
    bare, model = make_sound(evidence=None), Decoder(config)
    with pytest.raises(UserError, match="--accept-unverified"):
        bare.apply(model)
    assert torch.equal(other.embedding.weight, before)
    with caplog.at_level(logging.WARNING):
        bare.apply(model, accept_unverified=True)
    assert [record.getMessage() for record in caplog.records] == [
        "evidence.coord_check: missing, accepted unverified",
        "evidence.transfer_check: missing, accepted unverified",
    ]


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UserError, match="no such file"):
            Bundle.load(path)


@pytest.mark.parametrize("text", ["", "{", "bundle", "{'a': 1}", '{"a": 1,}', '{"a": 1} {"b": 2}'])
def test_what_is_not_json_is_refused(refuse: Refuse, text: str) -> None:
    assert refuse(text).what.startswith("not a readable JSON file")


@pytest.mark.parametrize("text", ["[]", "1", "null", '"bundle"'])
def test_what_is_not_an_object_is_refused(refuse: Refuse, text: str) -> None:
    assert refuse(text).expected == "a JSON object"


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("place", ["base_hyperparameters.lr", "versions.x", "base.config.d_model"])
def test_numbers_that_json_lacks_are_refused(
    document: Document, refuse: Refuse, place: str, literal: str
) -> None:
    path, _, key = place.rpartition(".")
    inner(document, path)[key] = "HERE"
    text = json.dumps(document).replace('"HERE"', literal)
    assert literal in refuse(text).what


def test_duplicate_keys_are_refused(document: Document, refuse: Refuse) -> None:
    lr = f'"lr": {json.dumps(document["base_hyperparameters"]["lr"])}'
    text = json.dumps(document)
    assert lr in text
    assert "duplicate key 'lr'" in refuse(text.replace(lr, f"{lr}, {lr}", 1)).what


@pytest.mark.parametrize(
    ("path", "name", "nearest"),
    [
        ("", "batch_token", "batch_tokens"),
        ("experiment", "nam", "name"),
        ("base", "basewidth", "base_width"),
        ("target", "configs", "config"),
        ("parametrization", "versions", "version"),
        ("base_hyperparameters", "embedding_lr", "embedding_lr_ratio"),
        ("provenance.lr", "trial", "trials"),
        ("provenance.beta1", "study", "source"),
        ("table", "row", "rows"),
        ("table.multipliers", "outputs", "output"),
        ("table.rows.3", "init", "init_std"),
        ("table.rows.2.optimizers", "moun", "muon"),
        ("table.rows.2.optimizers.adamw", "epsilon", "eps"),
        ("table.rows.2.optimizers.muon", "weightdecay", "weight_decay"),
        ("evidence", "coord", "coord_check"),
        ("evidence.study", "trial", "trials"),
        ("evidence.study.trials.1", "meanloss", "mean_loss"),
        ("evidence.coord_check", "slope", "slopes"),
        ("evidence.coord_check.slopes.0", "expect", "expected"),
        ("evidence.transfer_check", "drifts", "drift"),
        ("evidence.transfer_check.optima.2", "log2lr", "log2_lr"),
        ("data", "vocabsize", "vocab_size"),
    ],
)
def test_an_unknown_field_is_refused_in_any_depth(
    document: Document, refuse: Refuse, path: str, name: str, nearest: str
) -> None:
    inner(document, path)[name] = 1
    error = refuse(document)
    where = f"{path}.{name}" if path else name
    assert error.what == f"unknown field {where!r}"
    known, _, others = str(error.expected).partition(" perhaps; known here: ")
    assert known == repr(nearest)
    assert nearest in others.split(", ")
    assert name not in others.split(", ")


def paths_of_objects(value: Any, path: str = "") -> list[str]:
    """Dotted paths of all fields, without those of free-form mappings."""
    found: list[str] = []
    if isinstance(value, dict):
        if path.endswith(("config", "params", "losses", "versions")):
            return []
        for key, item in value.items():
            name = f"{path}.{key}" if path else key
            found += [name, *paths_of_objects(item, name)]
    elif isinstance(value, list):
        for index, item in enumerate(value[:3]):
            found += paths_of_objects(item, f"{path}.{index}")
    return found


def test_a_missing_field_is_refused_in_any_depth(document: Document, refuse: Refuse) -> None:
    """Even one with a default: what is hashed is what is written."""
    paths = paths_of_objects(document)
    assert len(paths) > 100
    for path in paths:
        changed = json.loads(json.dumps(document))
        above, _, key = path.rpartition(".")
        del inner(changed, above)[key]
        text = json.dumps(changed)
        if path.startswith("provenance.") and path.count(".") == 1:
            continue  # a mapping by name; `verify` asks for every name
        error = refuse(text)
        assert path.removesuffix(".source") in str(error), str(error)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("batch_tokens", "512"),
        ("batch_tokens", 512.5),
        ("batch_tokens", True),
        ("batch_tokens", None),
        ("batch_tokens", 0),
        ("horizon_tokens", []),
        ("sha256", "E" * 64),
        ("experiment.sha256", "e" * 63),
        ("base.config", []),
        ("base.config.d_model", [32]),
        ("target", "tiny"),
        ("parametrization.version", "1"),
        ("base_hyperparameters.lr", "0.0078125"),
        ("base_hyperparameters.lr", -0.1),
        ("base_hyperparameters.lr", False),
        ("provenance.lr.source", "guess"),
        ("provenance.lr.trials", []),
        ("provenance.lr.trials.0", "1"),
        ("table.rows", {}),
        ("table.rows.0.role", "matrix"),
        ("table.rows.0.shape.0", 256.5),
        ("table.rows.2.optimizers.adamw.betas", [0.9]),
        ("table.rows.2.optimizers.adamw.lr", None),
        ("evidence", []),
        ("evidence.study.selection", "lowest_loss"),
        ("evidence.study.trials", []),
        ("evidence.study.trials.1.state", "complete"),
        ("evidence.study.trials.1.losses.0", "2.5"),
        ("evidence.study.trials.1.losses.0", None),
        ("evidence.coord_check.verdict", "OK"),
        ("evidence.coord_check.slopes", []),
        ("evidence.transfer_check.drift", "0.25"),
        ("evidence.transfer_check.seeds.0", 0.5),
        ("data.vocab_size", 1),
        ("versions.python", 3.11),
    ],
)
def test_a_wrong_type_or_range_is_refused(
    document: Document, refuse: Refuse, path: str, value: object
) -> None:
    above, _, key = path.rpartition(".")
    place = inner(document, above)
    place[int(key) if key.isdigit() and isinstance(place, list) else key] = value
    assert path.removesuffix(".source") in str(refuse(json.dumps(document)))


@pytest.mark.parametrize("version", [0, 3, 2.0, "2", True, None, [2]])
def test_another_schema_version_is_refused(
    document: Document, refuse: Refuse, version: object
) -> None:
    document["schema_version"] = version
    error = refuse(json.dumps(document))
    assert error.what == "unknown schema version"
    assert (error.got, error.expected) == (repr(version), 2)
    del document["schema_version"]
    assert refuse(json.dumps(document)).got == "None"


def of_version_1(document: Document) -> Document:
    """The same bundle as the first schema version had it, with its hash."""
    old: Document = json.loads(json.dumps(document)) | {"schema_version": 1}
    check = old["evidence"]["coord_check"]
    del check["widths"], check["replay"]
    return old | {"sha256": digest(old)}


def test_an_older_bundle_is_named_converted_and_sound(document: Document, refuse: Refuse) -> None:
    old = of_version_1(document)
    error = refuse(json.dumps(old))
    assert error.got == "1"
    assert "mutransfer bundle migrate" in str(error.cure)
    before = copy.deepcopy(old)
    new = migrate(old, "old.json")
    assert old == before, "the document is not touched"
    assert new.schema_version == 2
    assert new.verify() == Bundle.model_validate(document).verify()
    assert new.evidence is not None
    assert new.evidence.coord_check is not None
    assert new.evidence.coord_check.replay is None
    assert new.table.model_dump(mode="json") == document["table"]


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"schema_version": 2}, "schema_version"),
        ({"schema_version": True}, "schema_version"),
        ({"batch_tokens": 7}, "sha256"),
        ({"sha256": "0" * 64}, "sha256"),
    ],
)
def test_what_is_no_older_bundle_is_not_converted(
    document: Document, change: Document, where: str
) -> None:
    with pytest.raises(UserError) as error:
        migrate(of_version_1(document) | change, "old.json")
    assert error.value.where == f"old.json: {where}"


@pytest.mark.parametrize(
    "evidence", [7, [], {"coord_check": []}, {"coord_check": {}}, {"coord_check": {"slopes": [1]}}]
)
def test_a_malformed_older_bundle_is_one_line(document: Document, evidence: object) -> None:
    old = of_version_1(document) | {"evidence": evidence}
    with pytest.raises(UserError, match="old.json"):
        migrate(old | {"sha256": digest(old)}, "old.json")
