"""The preflight: a right target passes; one factor of two, wherever, does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from full_scale import preflight
from full_scale.preflight import run_preflight
from mutransfer.bundle import Bundle, digest
from mutransfer.cli import main
from mutransfer.coord_check import Trainable
from mutransfer.errors import UserError
from mutransfer.preflight import MARGINS, hold_target
from mutransfer.preflight_plot import preflight_data, preflight_figure
from mutransfer.preflight_result import CULPRITS, KINDS, PreflightResult
from mutransfer.progress import quiet
from mutransfer.rules import BaseParams
from mutransfer.table import Table
from proxies.decoder import DecoderConfig
from proxies.presets import get_preset
from proxies.tables import decoder_table
from sweeps.coord import run_coord_check
from sweeps.experiment import Experiment
from sweeps.export import run_export
from sweeps.pool import PoolConfig
from sweeps.sweep import run_sweep
from sweeps.transfer import run_transfer_check
from sweeps.workspace import Workspace

Damage = Callable[[Trainable], object]

MATRICES = [f"layers.*.{name}.weight" for name in (
    "attention.q", "attention.k", "attention.v", "attention.o", "mlp.gate", "mlp.up", "mlp.down",
)]  # fmt: skip
GAINS = ["layers.*.attention_norm.weight", "layers.*.mlp_norm.weight", "norm.weight"]
PATTERNS = ["embedding.weight", *MATRICES, *GAINS]


@pytest.fixture(scope="module")
def bundle(tiny_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Swept and checked at 32, for a target of 128 that the check has not seen."""
    torch.set_num_threads(1)
    record = tiny_experiment.model_dump()
    record["target"] |= {"d_model": 128, "n_heads": 8, "n_kv_heads": 4, "d_ff": 320, "n_layers": 2}
    record["params"] |= {"init_std": 0.1, "embedding_multiplier": 3.0, "output_multiplier": 2.0}
    record["coord_check"] |= {"widths": (32, 64, 96), "optimizers": ("adamw", "muon"),
                              "batch_size": 4, "seq_len": 32}  # fmt: skip
    record["contrast"] = ()
    workspace = Workspace(Experiment.model_validate(record), tmp_path_factory.mktemp("preflight"))
    inline = PoolConfig(workers=1, threads=1)
    run_sweep(workspace, inline, progress=quiet)
    run_coord_check(workspace, progress=quiet)
    run_transfer_check(workspace, inline, progress=quiet)
    return run_export(workspace)[0]


def run(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, damage: Damage = lambda target: None
) -> PreflightResult:
    """A quick preflight whose target was built with a slip."""
    build = preflight._trainable

    def damaged(config: DecoderConfig, *args: Any, **options: Any) -> Trainable:
        trainable = build(config, *args, **options)
        if config.d_model == 128:
            damage(trainable)
        return trainable

    with monkeypatch.context() as patch:
        patch.setattr(preflight, "_trainable", damaged)
        return run_preflight(bundle, seeds=2, steps=2)


def measured(result: PreflightResult) -> PreflightResult:
    """The same without the symbolic check."""
    return replace(result, symbolic=())


def named(trainable: Trainable, pattern: str) -> list[torch.nn.Parameter]:
    rows = trainable.table.resolve(trainable.model)
    return [p for n, p in trainable.model.named_parameters() if rows[n].pattern == pattern]


@torch.no_grad()
def scale_init(trainable: Trainable, pattern: str, factor: float) -> None:
    for parameter in named(trainable, pattern):
        parameter.mul_(factor)


def scale_lr(trainable: Trainable, pattern: str, factor: float) -> None:
    """In every group that has the parameters, split off from their company."""
    wanted = {id(p) for p in named(trainable, pattern)}
    for optimizer in (trainable.optimizer.aux, trainable.optimizer.matrix):  # type: ignore[attr-defined]
        for group in list(optimizer.param_groups):
            chosen = [p for p in group["params"] if id(p) in wanted]
            if chosen:
                group["params"] = [p for p in group["params"] if id(p) not in wanted]
                optimizer.param_groups.append(
                    {**group, "params": chosen, "lr": group["lr"] * factor, "param_names": []}
                )


def test_a_right_target_passes_in_both_precisions(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    for precision in ("bf16", "fp32"):
        result = run_preflight(bundle, precision=precision, seeds=2, steps=4)  # type: ignore[arg-type]
        assert result.verdict == "PASS", result.summary()
        assert result.widths == (32, 64)
        assert {held.stage for held in result.held} == {"replay", "target"}
        replayed = [held for held in result.held if held.stage == "replay"]
        assert {held.kind for held in replayed} >= {"weight", "update", "logits", "delta_logits"}
        assert all(held.found == pytest.approx(held.expected, rel=1e-3) for held in replayed)
    assert run(bundle, monkeypatch).culprits == ()


@pytest.mark.parametrize("factor", [2.0, 0.5])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_one_learning_rate(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, pattern: str, factor: float
) -> None:
    result = run(bundle, monkeypatch, lambda target: scale_lr(target, pattern, factor))
    assert any(pattern in finding.name for finding in result.symbolic)
    self_told = measured(result)
    assert self_told.verdict == "FAIL"
    name = pattern.removesuffix(".weight")
    assert self_told.culprits[0].startswith(f"first updates of {name}, step 1, at width 128: ")
    assert self_told.culprits[0].endswith("its learning rate is off")


@pytest.mark.parametrize("factor", [2.0, 0.5])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_one_init(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, pattern: str, factor: float
) -> None:
    result = measured(run(bundle, monkeypatch, lambda t: scale_init(t, pattern, factor)))
    assert result.verdict == "FAIL"
    name = pattern.removesuffix(".weight")
    assert result.culprits[0].startswith(f"initial weights of {name}, step 0, at width 128: ")
    assert result.culprits[0].endswith("its init std is off")


@pytest.mark.parametrize("factor", [2.0, 0.5])
@pytest.mark.parametrize("name", ["embedding", "output", "residual", "attention"])
def test_one_multiplier(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, name: str, factor: float
) -> None:
    def damage(target: Trainable) -> None:
        target.model.get_buffer(f"{name}_multiplier").mul_(factor)

    result = measured(run(bundle, monkeypatch, damage))
    assert result.verdict == "FAIL"
    assert f"the {name} multiplier is off" in result.culprits[0]


def test_a_multiplier_dropped_after_the_first_step(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(target: Trainable) -> None:
        step, output = target.optimizer.step, target.model.get_buffer("output_multiplier")

        def dropping() -> None:
            step()
            output.fill_(8 * float(output))

        monkeypatch.setattr(target.optimizer, "step", dropping)

    result = measured(run(bundle, monkeypatch, damage))
    assert result.verdict == "FAIL"
    assert result.culprits[0].startswith("changes in the logits")


def test_a_run_that_breaks_fails(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    @torch.no_grad()
    def damage(target: Trainable) -> None:
        named(target, "norm.weight")[0].fill_(torch.nan)

    result = measured(run(bundle, monkeypatch, damage))
    assert result.verdict == "FAIL"
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["verdict"] == "FAIL"
    assert preflight_data(result)["ratio"].between(1 / 8, 8).all()


def forge(bundle: Bundle, params: BaseParams, base_width: int | None = None) -> Bundle:
    """A whole forgery: hyperparameters, their trial, table and hash agree with each other."""
    document = bundle.model_dump(mode="json")
    base = bundle.base.base_width if base_width is None else base_width
    document["base"]["base_width"] = base
    document["base_hyperparameters"] = params.model_dump(mode="json")
    table: Table = decoder_table(
        DecoderConfig.model_validate(bundle.target.config),
        DecoderConfig.model_validate(bundle.base.config),
        params, bundle.parametrization.name, base_width=base,
    )  # fmt: skip
    document["table"] = table.model_dump(mode="json")
    for trial in document["evidence"]["study"]["trials"]:
        for name in trial["params"]:
            if trial["number"] == document["provenance"]["lr"]["trials"][0]:
                trial["params"][name] = getattr(params, name)
    document["evidence"]["coord_check"]["lr"] = params.lr
    return Bundle.model_validate_json(json.dumps(document | {"sha256": digest(document)}))


@pytest.mark.parametrize(
    "name",
    ["lr", "embedding_lr_ratio", "init_std", "embedding_multiplier", "output_multiplier",
     "residual_multiplier", "attention_multiplier", "muon_factor", "eps"],
)  # fmt: skip
def test_a_hyperparameter_forged_throughout(bundle: Bundle, name: str) -> None:
    """Nothing in the bundle contradicts it but what the check measured."""
    params = bundle.base_hyperparameters
    for factor in (2.0, 0.5):
        changed = params.model_copy(update={name: getattr(params, name) * factor})
        forged = forge(bundle, changed)
        forged.verify(accept_unverified=True)
        result = run_preflight(forged, seeds=1, steps=2)
        assert result.verdict == "FAIL"
        assert "(replay)" in result.culprits[0]


@pytest.mark.parametrize("layers", [1, 4])
def test_a_base_depth_forged(bundle: Bundle, layers: int) -> None:
    """It enters the residual multiplier alone; the replayed model has the recorded depth."""
    document = bundle.model_dump(mode="json")
    document["base"]["config"]["n_layers"] = layers
    forged = forge(Bundle.model_validate_json(json.dumps(document)), bundle.base_hyperparameters)
    with pytest.raises(UserError, match="n_layers"):
        run_preflight(forged)
    recorded = changed(forged, "replay.n_layers", layers)
    result = run_preflight(recorded, seeds=1, steps=2)
    assert any(h.kind == "branch" and h.verdict == "FAIL" for h in result.held)


def test_a_base_width_typed_wrong(bundle: Bundle, tmp_path: Path, capsys: Any) -> None:
    forged = forge(bundle, bundle.base_hyperparameters, base_width=64)
    forged.verify(accept_unverified=True)
    forged.save(tmp_path / "bundle.json")
    words = ["preflight", "--bundle", str(tmp_path / "bundle.json"), "--accept-unverified",
             "--seeds", "1", "--steps", "2", "--out", str(tmp_path / "out")]  # fmt: skip
    assert main(words) == 1
    out = capsys.readouterr().out
    assert "preflight under adamw, bf16: FAIL" in out
    hidden = "layers.*.attention.{q,k,v,o}, layers.*.mlp.{gate,up,down}"
    assert f"initial weights of {hidden}, step 0, at width 32 (replay): 1.41" in out
    written = json.loads((tmp_path / "out" / "preflight.json").read_text())
    assert written["verdict"] == "FAIL"
    assert written["bundle_sha256"] == forged.sha256
    assert (tmp_path / "out" / "preflight.png").stat().st_size > 20_000


def test_a_changed_table_is_refused_before_anything_is_built(
    bundle: Bundle, tmp_path: Path, capsys: Any
) -> None:
    document = bundle.model_dump(mode="json")
    row = next(r for r in document["table"]["rows"] if r["pattern"] == MATRICES[0])
    row["optimizers"]["adamw"]["lr"] *= 2
    row["optimizers"]["adamw"]["lr_times_weight_decay"] *= 2
    (tmp_path / "b.json").write_text(json.dumps(document | {"sha256": digest(document)}))
    assert main(["preflight", "--bundle", str(tmp_path / "b.json")]) == 2
    assert f"table.rows.{MATRICES[0]}.optimizers.adamw.lr" in capsys.readouterr().err


def changed(bundle: Bundle, path: str, value: object) -> Bundle:
    """The bundle with one field of its coordinate check changed."""
    document = bundle.model_dump(mode="json")
    *above, key = ["evidence", "coord_check", *path.split(".")]
    inner: Any = document
    for part in above:
        inner = inner[int(part) if part.isdigit() else part]
    inner[int(key) if key.isdigit() else key] = value
    return Bundle.model_validate_json(json.dumps(document))


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        ("replay", None, "evidence.coord_check.replay"),
        ("widths", [64, 128, 256], "evidence.coord_check.widths"),
        ("widths", [32], "evidence.coord_check.widths"),
        ("widths", [16, 64, 96], "evidence.coord_check.replay.width"),
        ("replay.width", 2**44, "evidence.coord_check.replay.width"),
        ("replay.n_layers", 2**30, "evidence.coord_check.replay.n_layers"),
        ("replay.tokens", [[1, 2, 3], [1, 2]], "evidence.coord_check.replay.tokens"),
        ("replay.tokens", [[]], "evidence.coord_check.replay.tokens"),
        ("replay.tokens", [[1]], "evidence.coord_check.replay.tokens"),
        ("replay.tokens", [[1, -1, 2]], "evidence.coord_check.replay.tokens"),
        ("replay.tokens", [[1, 256, 2]], "evidence.coord_check.replay.tokens"),
        ("replay.tokens", [[1] * 4096], "evidence.coord_check.replay.tokens"),
        ("replay.steps", 3, "evidence.coord_check.replay: "),
    ],
)
def test_what_is_no_check_of_this_target_is_one_line(
    bundle: Bundle, path: str, value: object, where: str
) -> None:
    with pytest.raises(UserError) as error:
        run_preflight(changed(bundle, path, value))
    assert str(error.value.where).startswith(where)
    assert error.value.got is not None
    assert error.value.expected is not None or error.value.cure is not None


@pytest.mark.parametrize("left", [0, 1, -1])
def test_values_left_out_of_the_record_are_missed(bundle: Bundle, left: int) -> None:
    """Or else a forger would leave out what contradicts him."""
    check = bundle.model_dump(mode="json")["evidence"]["coord_check"]
    sizes = check["replay"]["sizes"]
    kept = sizes[: left or 1] if left >= 0 else sizes[:-1]
    if left == 0:
        kept = [size for size in sizes if size["optimizer"] == "adamw"]
    with pytest.raises(UserError, match="not of this model"):
        run_preflight(changed(bundle, "replay.sizes", kept))


def test_a_recorded_zero_does_not_excuse(bundle: Bundle) -> None:
    sizes = bundle.model_dump(mode="json")["evidence"]["coord_check"]["replay"]["sizes"]
    zeros = [size | {"value": 0.0} for size in sizes]
    result = run_preflight(changed(bundle, "replay.sizes", zeros), seeds=1, steps=2)
    replayed = [held for held in result.held if held.stage == "replay"]
    assert {held.verdict for held in replayed} == {"FAIL"}
    assert result.culprits
    assert preflight_data(result)["ratio"].between(1 / 8, 8).all()


def test_learning_rates_that_bf16_rounds_away_are_refused(bundle: Bundle) -> None:
    low = forge(bundle, bundle.base_hyperparameters.model_copy(update={"lr": 2**-12}))
    with pytest.raises(UserError, match="updates would be lost in bf16's rounding"):
        run_preflight(low)
    result = run_preflight(low, precision="fp32", seeds=1, steps=2)
    assert [held for held in result.held if held.stage == "target" and held.verdict == "FAIL"] == []


def test_a_target_that_does_not_fit_is_refused(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(preflight._BYTES, "bf16", 2**40)
    with pytest.raises(UserError, match="not enough memory for the target"):
        run_preflight(bundle)


def test_a_stream_that_is_no_number_at_every_width_fails(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = preflight._trainable

    @torch.no_grad()
    def broken(config: DecoderConfig, *args: Any, **options: Any) -> Trainable:
        trainable = build(config, *args, **options)
        if config.n_layers and options.get("precision") == "bf16":
            named(trainable, "norm.weight")[0].fill_(torch.nan)
        return trainable

    monkeypatch.setattr(preflight, "_trainable", broken)
    result = measured(run_preflight(bundle, seeds=1, steps=2))
    off = {held.kind for held in result.held if held.stage == "target" and held.verdict == "FAIL"}
    assert {"logits", "delta_logits", "update"} <= off


@pytest.mark.parametrize("untied", [True, False])
@pytest.mark.parametrize("name", ["completep-tied", "mup", "minicpm"])
def test_right_models_of_other_kinds_are_not_accused(untied: bool, name: str) -> None:
    """Untied ones, and tied ones whose stream is not the embedding's any more."""
    params = BaseParams(lr=2**-7, init_std=0.3, embedding_multiplier=3.0, output_multiplier=2.0)
    target = get_preset("tiny-256").model_copy(update={"tied": not untied})
    base = target.narrow(32)
    tokens = torch.randint(256, (1, 65), generator=torch.Generator().manual_seed(0))

    def factory(width: int, seed: int) -> Trainable:
        config = target.narrow(width)
        return preflight._trainable(config, decoder_table(config, base, params, name), seed, tokens)

    held, symbolic, _ = hold_target(factory, (32, 64), 256, seeds=3, steps=4)
    assert [(h.kind, h.name, h.found / h.expected) for h in held if h.verdict == "FAIL"] == []
    assert symbolic == ()
    assert {h.kind for h in held} >= {"weight", "update", "entry", "branch", "logits"}


def test_the_picture_shows_every_judged_value(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(bundle, monkeypatch, lambda t: scale_init(t, "embedding.weight", 2.0))
    data = preflight_data(result)
    assert len(data) == len(result.held)
    assert set(data["stage"]) == {"replay", "target"}
    off = data[(data["kind"] == "weight") & (data["name"] == "embedding.weight")]
    assert off[off["stage"] == "target"]["ratio"].item() == pytest.approx(2.0, rel=0.05)
    assert off[off["stage"] == "target"]["verdict"].item() == "FAIL"
    figure = preflight_figure(result)
    assert len(figure.axes) == 2
    assert "FAIL" in figure.get_suptitle()


def test_every_kind_has_a_margin_and_a_row() -> None:
    assert MARGINS.keys() | {"eps_share"} == set(KINDS)
    assert set(CULPRITS) <= set(KINDS)
