"""The examples do what they say: a bundle for a model of one's own, trained by a plain loop."""

from __future__ import annotations

import ast
import importlib.util
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
                            "result_sha256": "0" * 64, "slopes": [
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
