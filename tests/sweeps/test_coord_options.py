"""Coordinate checks other than the default one: over depth, late, in other precisions."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from mutransfer.apply import initialize
from mutransfer.cli import main
from mutransfer.coord_measure import Recorder, causal_logits
from mutransfer.errors import UserError
from mutransfer.optimizers import Optimizers
from proxies.data import Batches
from proxies.decoder import Decoder
from proxies.run import TrainConfig, clip, train_steps
from proxies.tables import decoder_table
from sweeps.coord import CoordFactory, run_coord_check
from sweeps.coord_options import DEFAULT, CoordOptions, build, loss_in
from sweeps.experiment import CoordCheckConfig, Experiment
from sweeps.workspace import Workspace

OWN = "completep-tied adamw"


@pytest.fixture
def alone(experiment: Experiment, tmp_path: Path) -> Workspace:
    """The tiny experiment's without its contrast."""
    return Workspace(experiment.model_copy(update={"contrast": ()}), tmp_path / "run")


def files(workspace: Workspace) -> set[str]:
    return {path.name for path in (workspace.root / "coord-check").iterdir()}


def saved(workspace: Workspace, name: str) -> Any:
    return json.loads((workspace.root / "coord-check" / name).read_text())


@pytest.mark.parametrize(
    ("options", "suffix", "title"),
    [
        (DEFAULT, "", ""),
        (CoordOptions(axis="depth"), "_depth", " (depth)"),
        (CoordOptions(late=0), "_late", " (late)"),
        (CoordOptions(late=7, precision="bf16"), "_late_bf16", " (late, bf16)"),
        (CoordOptions(axis="depth", late=7, precision="fp8"), "_depth_late_fp8",
         " (depth, late, fp8)"),
    ],
)  # fmt: skip
def test_only_the_default_has_the_plain_name(
    options: CoordOptions, suffix: str, title: str
) -> None:
    assert (options.suffix, options.title) == (suffix, title)


def test_a_check_leaves_the_default_one_alone(alone: Workspace) -> None:
    run_coord_check(alone)
    before = (alone.root / "coord-check" / "coord_check.json").read_bytes()
    depths = alone.experiment.coord_check.model_copy(update={"depths": (1, 2, 4)})
    e = alone.experiment.model_copy(update={"coord_check": depths})
    deep = Workspace(e, alone.root)
    results = run_coord_check(deep, CoordOptions(axis="depth", late=2, precision="bf16"))
    stem = "coord_check_depth_late_bf16"
    plain = {f"coord_check.{kind}" for kind in ("csv", "json", "png")}
    assert files(alone) == plain | {f"{stem}.{kind}" for kind in ("csv", "json", "png")}
    assert (alone.root / "coord-check" / "coord_check.json").read_bytes() == before
    record, result = saved(alone, f"{stem}.json"), results[OWN]
    assert record["options"] == {"axis": "depth", "late": 2, "precision": "bf16"}
    assert record["verdict"] == result.verdict
    assert record["experiment_sha256"] == e.sha256
    assert (result.axis, result.widths, result.trained) == ("depth", (1, 2, 4), 2)
    assert saved(alone, "coord_check.json")["options"] == {
        "axis": "width", "late": 0, "precision": "fp32"
    }  # fmt: skip
    frame = pd.read_csv(alone.root / "coord-check" / f"{stem}.csv")
    assert sorted(frame["trained"].unique()) == [0, 2]
    assert set(frame["width"]) == {1, 2, 4}


def test_a_late_check_says_what_drifted(alone: Workspace) -> None:
    early = run_coord_check(alone)[OWN]
    late = run_coord_check(alone, CoordOptions(late=0))[OWN]
    start = alone.experiment.train.schedule.decay_start(12)
    assert late.trained == start - alone.experiment.coord_check.steps == 6
    slopes = {(q.kind, q.name): q.slope for q in early.quantities}
    assert {(d.kind, d.name): d.early for d in late.drifts}.items() <= slopes.items()
    assert {d.kind for d in late.drifts} >= {"weight", "update", "delta_logits", "activation"}
    assert "drift of slopes" in late.summary()


@pytest.mark.parametrize(
    ("late", "steps", "message"),
    [
        (7, 4, "expected at most 6, as the decay starts after step 10 of 12"),
        (0, 10, "expected a decay that starts after more than 10 steps, not 10"),
    ],
)
def test_a_late_check_that_runs_into_the_decay_is_refused(
    late: int, steps: int, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        CoordOptions(late=late).late_steps(TrainConfig(steps=12), steps)
    assert caught.value.where == "--late"
    assert "\n" not in str(caught.value)


def test_the_latest_step_is_before_the_decay() -> None:
    train = TrainConfig(steps=100)
    assert CoordOptions().late_steps(train, 8) == 0
    assert CoordOptions(late=0).late_steps(train, 8) == 72
    assert CoordOptions(late=72).late_steps(train, 8) == 72
    with pytest.raises(UserError, match="73 steps and 8 measured ones"):
        CoordOptions(late=73).late_steps(train, 8)


def test_models_are_trained_as_proxies_are(alone: Workspace) -> None:
    """Bit for bit those of the runner's own loop; then at its learning rate, and clipped."""
    check = alone.experiment.coord_check.model_copy(update={"seeds": 2})
    alone = Workspace(alone.experiment.model_copy(update={"coord_check": check}), alone.root)
    e, steps = alone.experiment, 5
    params = e.params.model_copy(update={"lr": 0.05})
    options = CoordOptions(late=steps)
    found = CoordFactory(alone, params, e.parametrization, "adamw", options, steps)(64, 1)
    config = e.model_at(64)
    table = decoder_table(config, e.base, params, base_width=e.base_width)
    model = Decoder(config)
    initialize(model, table, seed=1)
    optimizers = Optimizers(model, table)
    batches = Batches(alone.corpus.train, seq_len=16, batch_size=4, seed=1)
    run = train_steps(
        e.train, model, optimizers, lambda step: model.loss(torch.from_numpy(batches.at(step)))
    )
    assert list(islice(run, steps)) == [1, 2, 3, 4, 5]
    trained = dict(found.model.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, trained[name]), name
    assert found.trained == steps
    assert all(group["lr"] == group["peak_lr"] for group in found.groups)  # warmup is one step

    (100 * found.loss()).backward()
    found.optimizer.step()
    norm = torch.stack([p.grad.norm() for p in trained.values() if p.grad is not None]).norm()
    assert float(norm) == pytest.approx(1.0, rel=1e-4)


def test_the_learning_rate_is_the_schedule_s(alone: Workspace) -> None:
    e = alone.experiment
    slow = Workspace(
        e.model_copy(update={"train": e.train.model_copy(update={"warmup": 0.5})}), alone.root
    )
    options = CoordOptions(late=2)
    found = CoordFactory(slow, e.params, e.parametrization, "muon", options, 2)(32, 0)
    assert [group["lr"] / group["peak_lr"] for group in found.groups] == pytest.approx(
        [0.5] * len(found.groups)
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_precision_is_of_the_passes_and_not_of_the_weights(precision: Any) -> None:
    config = Experiment(name="x").target.narrow(32)
    model = build(config, precision)
    table = decoder_table(config, config, Experiment(name="x").params)
    initialize(model, table, seed=0)
    seen: dict[str, torch.dtype] = {}
    for name in ("layers.0.attention.q", "layers.0.attention.attend", "norm"):
        model.get_submodule(name).register_forward_hook(
            lambda _m, _i, output, name=name: seen.update({name: output.dtype})
        )
    tokens = torch.arange(18).reshape(2, 9)
    loss = loss_in(model, precision)(tokens)
    loss.backward()
    bf16 = torch.bfloat16 if precision == "bf16" else torch.float32
    assert (seen["layers.0.attention.q"], seen["layers.0.attention.attend"]) == (bf16, bf16)
    assert loss.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    exact = Decoder(config)
    initialize(exact, table, seed=0)
    error = abs(float(loss.detach() - exact.loss(tokens).detach()))
    assert error == 0 if precision == "fp32" else 0 < error < 0.1


def test_a_model_under_autocast_is_measured_in_fp32() -> None:
    config = Experiment(name="x").target.narrow(32, n_layers=1)
    model = build(config, "bf16")
    table = decoder_table(config, config, Experiment(name="x").params)
    initialize(model, table, seed=0)
    kept: list[torch.Tensor] = []
    model.get_submodule("layers.0.attention.attend").register_forward_hook(
        lambda _m, inputs, _o: kept.extend(inputs[:2])
    )
    with Recorder(model, table).watch() as values:
        loss_in(model, "bf16")(torch.arange(18).reshape(2, 9))
    q, k = (each.detach() for each in kept)
    exact = causal_logits(q.double(), k.double()).std(correction=0)
    assert values["attention_logits", "layers.*.attention.attend"] == pytest.approx(
        float(exact), rel=1e-5
    )


def test_fp8_starts_with_scales_and_untouched_weights(alone: Workspace) -> None:
    e = alone.experiment
    found = CoordFactory(
        alone, e.params, e.parametrization, "adamw", CoordOptions(precision="fp8")
    )(32, 0)
    q: Any = found.model.get_submodule("layers.0.attention.q")
    assert bool((q.scale != 1).all()), "the first measured pass casts with real scales"
    assert all(p.grad is None for p in found.model.parameters())
    plain = CoordFactory(alone, e.params, e.parametrization, "adamw")(32, 0)
    for name, parameter in plain.model.named_parameters():
        assert torch.equal(parameter, dict(found.model.named_parameters())[name]), name


def test_no_clip_leaves_gradients_alone() -> None:
    model = torch.nn.Linear(2, 2)
    model(torch.full((1, 2), 100.0)).sum().backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    clip(model, None)
    assert all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters(), strict=True)
               if p.grad is not None)  # fmt: skip
    clip(model, 1.0)
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    assert float(norm) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("depths", [(2, 4), (2, 4, 4), (0, 2, 4), (2, 4, 5000)])
def test_depths_are_at_least_three_different_ones(depths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="depths"):
        CoordCheckConfig(depths=depths)
    assert CoordCheckConfig().depths == (2, 4, 8, 16)


def test_the_command_line_says_which_check_it_was(
    experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = experiment.data.train[0]
    path = tmp_path / "e.toml"
    path.write_text(
        f'name = "e"\ncontrast = []\n[target]\npreset = "tiny-128"\nn_layers = 1\n'
        f'[data]\ntrain = ["{text}"]\nheldout_fraction = 0.3\n'
        "[train]\nsteps = 12\nbatch_size = 4\nseq_len = 16\nheldout_tokens = 256\n"
        "[coord_check]\nwidths = [32, 64, 96]\ndepths = [1, 2, 3]\nseeds = 1\nsteps = 2\n"
        "batch_size = 2\nseq_len = 16\n"
    )
    words = ["coord-check", str(path), "--out", str(tmp_path / "run")]
    assert main([*words, "--late", "9"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Error: --late: the late check must end before")
    code = main([*words, "--axis", "depth", "--precision", "bf16"])
    out = capsys.readouterr().out
    verdict = saved(Workspace(experiment, tmp_path / "run"), "coord_check_depth_bf16.json")[
        "verdict"
    ]
    assert f"coordinate check (depth, bf16): {verdict}   -> " in out
    assert out.rstrip().endswith("coord_check_depth_bf16.png")
    assert "  not judged: " in out
    assert code == (verdict == "FAIL")
