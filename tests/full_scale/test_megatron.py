"""megatron-core's own classes against a bundle's table and against our decoder, on the CPU."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from full_scale.megatron_files import export_megatron
from full_scale.megatron_names import from_megatron
from full_scale.tensors import Tensors
from full_scale.weights import Weights
from mutransfer.bundle import Bundle
from mutransfer.megatron import arguments
from mutransfer.rules import BaseParams, get_parametrization
from mutransfer.table import Multipliers
from proxies.decoder import Decoder, DecoderConfig
from proxies.tables import decoder_table

pytestmark = pytest.mark.slow

TARGET = DecoderConfig(d_model=128, n_layers=2, n_heads=8, n_kv_heads=2, head_dim=16, d_ff=320,
                       vocab_size=256, max_seq_len=64)  # fmt: skip
PARAMS = BaseParams(lr=0.02, embedding_lr_ratio=4.0, init_std=0.1, weight_decay=0.1, eps=1e-7,
                    embedding_multiplier=3.0, output_multiplier=0.7,
                    attention_multiplier=1.2)  # fmt: skip
TOKENS = torch.arange(48).view(2, 24) * 37 % 256
PROBE = Path(__file__).with_name("megatron_probe.py")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python 3.12 with megatron-core: MEGATRON_PYTHON names one, or "new" makes one here.

    megatron-core has μP from 0.19 on, and that needs Python 3.12. A new environment gets the
    torch that pip finds for it, 5 GB with CUDA, which nobody wants unasked.
    """
    given = os.environ.get("MEGATRON_PYTHON")
    if given is None:
        pytest.skip("needs megatron-core: MEGATRON_PYTHON=new takes 5 GB, or name a Python with it")
    if given != "new":
        return Path(given)
    known = [shutil.which("python3.12"), *Path.home().glob(".pyenv/versions/3.12*/bin/python")]
    outer = next((found for found in known if found), None)
    if outer is None:
        pytest.skip("megatron-core with μP needs Python 3.12, and there is none here")
    venv = tmp_path_factory.mktemp("megatron") / "venv"
    subprocess.run([outer, "-m", "venv", venv], check=True)
    pip = [venv / "bin" / "python", "-m", "pip", "install", "--quiet"]
    wanted = ["megatron-core>=0.19", "torch", "numpy", "safetensors"]
    done = subprocess.run([*pip, *wanted], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"megatron-core cannot be installed: {done.stderr[-300:]}")
    return venv / "bin" / "python"


def bundle(target: DecoderConfig) -> Bundle:
    base = target.narrow(64)
    return Bundle.create(
        experiment={"name": "test", "sha256": "0" * 64},
        base={"config": base.model_dump(), "base_width": 64},
        target={"config": target.model_dump()},
        parametrization={"name": "megatron", "version": get_parametrization("megatron").version},
        base_hyperparameters=PARAMS,
        provenance={name: {"source": "fixed"} for name in BaseParams.model_fields},
        table=decoder_table(target, base, PARAMS, "megatron"),
        evidence=None,
        batch_tokens=64, horizon_tokens=640,
        data={"fingerprint": "a" * 64, "tokenizer_fingerprint": "b" * 64, "vocab_size": 256},
        versions={},
    )  # fmt: skip


def ask(python: Path, **question: Any) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        question["port"] = free.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([python, PROBE], input=json.dumps(question), capture_output=True,
                          text=True, env=env)  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    answer: dict[str, Any] = json.loads(line.removeprefix("ANSWER"))
    return answer


def weights(config: DecoderConfig, multipliers: Multipliers, tmp_path: Path) -> Weights:
    draw = torch.Generator().manual_seed(0)
    values = {n: torch.randn(p.shape, generator=draw) * 0.1 + (p.dim() == 1)
              for n, p in Decoder(config).named_parameters()}  # fmt: skip
    tensors = Tensors(shapes={n: tuple(t.shape) for n, t in values.items()},
                      read=values.__getitem__)  # fmt: skip
    return Weights(config=config, multipliers=multipliers, tensors=tensors, parametrization=None,
                   bundle=None, tokenizer=None, state=None, path=tmp_path)  # fmt: skip


@torch.no_grad()
def our_logits(given: Weights) -> torch.Tensor:
    model = Decoder(given.config)
    model.load_state_dict({n: given.tensors.read(n) for n in given.tensors.shapes})
    model.set_multipliers(given.multipliers)
    logits: torch.Tensor = model(TOKENS)
    return logits


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_upstream_s_classes_do_what_the_bundle_says(
    python: Path, tied: bool, tmp_path: Path
) -> None:
    target = TARGET.model_copy(update={"tied": tied})
    made = bundle(target)
    given = weights(target, made.table.multipliers, tmp_path)
    export_megatron(given, tmp_path / "out", layers="local", keep_multipliers=True)
    answer = ask(python, arguments=arguments(made), vocab_size=256, tokens=TOKENS.tolist(),
                 folder=str(tmp_path / "out"))  # fmt: skip

    own = made.table.multipliers
    for name in ("embedding", "output", "attention"):
        assert answer["multipliers"][name] == pytest.approx(getattr(own, name), rel=1e-12), name

    # what a fused tensor holds of ours: the rows of all its parts
    shapes = {name: tuple(shape) for name, shape in answer["shapes"].items()}
    source = from_megatron(Tensors(shapes=shapes, read=torch.empty), target)
    held: dict[str, list[str]] = {name: [] for name in shapes}
    for ours in source.shapes:
        for theirs in shapes:
            single = Tensors(shapes={theirs: shapes[theirs]}, read=torch.empty)
            if ours in from_megatron(single, target).shapes:
                held[theirs].append(ours)
    assert sorted(name for names in held.values() for name in names) == sorted(given.tensors.shapes)
    for theirs, names in held.items():
        for row in (made.table.row(name) for name in names):
            adamw = row.optimizers.adamw
            found = answer["groups"][theirs]
            assert found["lr"] == pytest.approx(adamw.lr, rel=1e-12), theirs
            assert found["eps"] == pytest.approx(adamw.eps, rel=1e-12), theirs
            assert found["weight_decay"] == pytest.approx(adamw.weight_decay, rel=1e-12), theirs
            spread = 5 / (2 * torch.Size(shapes[theirs]).numel()) ** 0.5  # 5 standard errors
            assert answer["std"][theirs] == pytest.approx(row.init_std, rel=spread), theirs

    assert (answer["missing"], answer["unexpected"]) == ([], [])
    logits = torch.tensor(answer["logits"])
    torch.testing.assert_close(logits, our_logits(given), rtol=1e-4, atol=1e-5)


def test_folded_weights_compute_the_same_in_plain_megatron(python: Path, tmp_path: Path) -> None:
    multipliers = Multipliers(embedding=12.0, output=0.37, residual=0.23, attention=0.091)
    given = weights(TARGET, multipliers, tmp_path)
    export_megatron(given, tmp_path / "out", layers="local")
    words = arguments(bundle(TARGET))
    cut = words[: words.index("--use-mup")]
    fields = json.loads((tmp_path / "out" / "megatron.json").read_text())["transformer_config"]
    answer = ask(python, arguments=cut, vocab_size=256, tokens=TOKENS.tolist(), fields=fields,
                 folder=str(tmp_path / "out"))  # fmt: skip
    assert answer["multipliers"]["embedding"] == 1.0
    logits = torch.tensor(answer["logits"])
    torch.testing.assert_close(logits, our_logits(given), rtol=1e-4, atol=1e-5)
