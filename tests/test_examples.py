"""The examples do what they say: a plain loop from a bundle, and checks of any model."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mutransfer.apply import Geometry, parametrize
from mutransfer.bundle import Bundle
from mutransfer.rules import DEFAULT, BaseParams, get_parametrization

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL: dict[str, Any] = {"width": 32, "context": 8, "n_layers": 2}
LARGE: dict[str, Any] = SMALL | {"width": 64}


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports an example by its name, as running it would."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


def own_bundle(own: ModuleType) -> Bundle:
    """A bundle for the large example model, tuned on the small one."""
    params = BaseParams(lr=2**-7, init_std=0.1, output_multiplier=2.0)
    table = parametrize(
        own.NextByte(**LARGE), own.NextByte(**SMALL), params,
        geometry=Geometry(n_layers=2, base_n_layers=2, base_width=32), role=own.role,
    )  # fmt: skip
    trial = {"number": 0, "state": "COMPLETE", "params": {"lr": params.lr},
             "losses": {"0": 2.0}, "mean_loss": 2.0, "standard_error": None}  # fmt: skip
    found = {"source": "study", "study": "own", "trials": [0]}
    optima = [{"width": w, "log2_lr": -7.0, "low": -7.2, "high": -6.8} for w in (32, 64)]
    return Bundle.create(
        experiment={"name": "own", "sha256": "0" * 64},
        base={"config": SMALL, "base_width": 32},
        target={"config": LARGE},
        parametrization={"name": DEFAULT, "version": get_parametrization(DEFAULT).version},
        base_hyperparameters=params,
        provenance={
            name: found if name == "lr" else {"source": "fixed"} for name in BaseParams.model_fields
        },
        table=table,
        evidence={
            "study": {"name": "own", "selection": "lowest_mean_loss", "seeds": [0],
                      "trials": [trial]},
            "coord_check": {"verdict": "PASS", "lr": params.lr, "symbolic_findings": 0,
                            "result_sha256": "0" * 64, "widths": [32, 64], "replay": None,
                            "slopes": [
                {"optimizer": "adamw", "kind": "loss", "name": "loss", "t": 0, "slope": 0.0,
                 "low": -0.01, "high": 0.01, "expected": 0.0, "verdict": "PASS"}]},
            "transfer_check": {
                "verdict": "PASS", "drift": 0.0, "drift_low": 0.0, "drift_high": 0.4,
                "regret": 0.0, "regret_low": 0.0, "regret_high": 0.01, "optima": optima,
                "seeds": [0, 1, 2], "result_sha256": "0" * 64},
        },
        batch_tokens=64,
        horizon_tokens=6400,
        data={"fingerprint": "own", "tokenizer_fingerprint": "bytes", "vocab_size": 256},
        versions={},
    )  # fmt: skip


def test_the_plain_loop_trains_a_model_of_ones_own(tmp_path: Path, example: Any) -> None:
    bundle = own_bundle(example("own_model"))
    bundle.save(tmp_path / "bundle.json")
    torch.manual_seed(0)
    losses = example("plain_torch_loop").train(str(tmp_path / "bundle.json"), steps=60)
    # logits at the start: std 0.1 * sqrt(64) * 2/m = 0.8 with m = 2, so ln 256 + 0.8^2 / 2
    assert losses[0] == pytest.approx(5.87, abs=0.4)
    assert losses[-1] < losses[0] - 1.5


def test_the_plain_loop_is_at_most_30_lines() -> None:
    source = (EXAMPLES / "plain_torch_loop.py").read_text(encoding="utf-8")
    lines = {node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)}
    assert len(lines) <= 30
    code = [line for line in source.splitlines() if line.strip() and not line.startswith('"""')]
    assert len(code) <= 30


CHECKS = ("check_own_model", "check_mlp", "check_llama", "check_qwen3")


def needs(name: str) -> None:
    if name in ("check_llama", "check_qwen3"):
        pytest.importorskip("transformers")


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_has_fewer_than_30_lines(name: str) -> None:
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    code = [line for line in source.splitlines() if line.strip() and not line.startswith('"""')]
    assert 10 < len(code) < 30


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_of_a_right_model_passes(name: str, tmp_path: Path) -> None:
    needs(name)
    picture = tmp_path / "picture.png"
    command = [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py"), str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    first, *_, last = done.stdout.splitlines()
    assert first.endswith(": PASS")
    assert last == f"picture: {picture}"
    assert picture.read_bytes().startswith(b"\x89PNG")
    if name in ("check_llama", "check_qwen3"):
        assert "attention logits at init" in done.stdout


OPTIMIZER = 'torch.optim.AdamW(param_groups(model, table, "adamw"))'
GAINS = "for layer in model.model.layers: layer.self_attn.q_norm.weight.data.mul_(width / 64)"
INITIALIZE = "    initialize(model, table, seed=seed)\n"


@pytest.mark.parametrize(
    ("name", "right", "wrong", "culprits"),
    [
        pytest.param(
            "check_own_model",
            OPTIMIZER,
            "torch.optim.AdamW(model.parameters(), lr=2**-6)",
            [
                "learning rate of mix.weight is 0.01562; the table says 0.007812",
                "first updates of mix, up.*, down.* scale as width^+0.00, right is width^-1.00: "
                "the learning rate is not divided by the width",
            ],
            marks=pytest.mark.slow,
        ),
        (
            "check_mlp",
            '"2.weight": "hidden"',
            '"2.weight": "embedding"',
            ["activations of 2 at init scale as width^+0."],
        ),
        pytest.param(
            "check_llama",
            "adopt(model, build(64),",
            "adopt(model, build(width),",
            [
                "first updates of model.layers.*.self_attn.{q_proj,k_proj,v_proj,o_proj}, "
                "model.layers.*.mlp.{gate_proj,up_proj,down_proj} scale as width^+0.00, right is "
                "width^-1.00: the learning rate is not divided by the width",
                "other-token logits at init scale as width^+0.",
            ],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "check_llama",
            INITIALIZE,
            "",
            ["init std of model.embed_tokens.weight is 0.0", "(and 7 more like it)"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "check_qwen3",
            INITIALIZE,
            f"{INITIALIZE}    {GAINS}\n",
            [
                "model.layers.*.self_attn.q_norm.weight starts at 2 on average; it should start "
                "at 1",
                "attention logits at init scale as width^+",
            ],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "check_qwen3",
            INITIALIZE,
            f"{INITIALIZE}    model.lm_head.output_multiplier.fill_(1.0)\n",
            ["other-token logits at init scale as width^+0.", "the output multiplier is not"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["rate", "role", "base", "init", "gain", "output"],
)
def test_a_check_with_one_broken_line_fails_and_names_it(
    name: str,
    right: str,
    wrong: str,
    culprits: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    needs(name)
    path, picture = EXAMPLES / f"{name}.py", tmp_path / "picture.png"
    source = path.read_text(encoding="utf-8")
    assert source.count(right) == 1
    monkeypatch.setattr(sys, "argv", [str(path), str(picture)])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "own_model", raising=False)
    broken = compile(source.replace(right, wrong), str(path), "exec")
    with pytest.raises(SystemExit) as stopped:
        exec(broken, {"__name__": "__main__", "__file__": str(path)})
    told = capsys.readouterr().out
    assert stopped.value.code == 1
    assert told.splitlines()[0].endswith(": FAIL")
    assert picture.is_file()
    for culprit in culprits:
        assert culprit in told
