"""The real lm-evaluation-harness on an export, held against our decoder's own log-likelihoods."""

from __future__ import annotations

import json
import os
import re
import site
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from full_scale.hf_export import export_hf
from full_scale.tensors import Tensors
from full_scale.weights import Weights
from mutransfer.table import Multipliers
from proxies.data import ByteTokenizer
from proxies.decoder import Decoder, DecoderConfig

pytestmark = pytest.mark.slow
pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
CONFIG = DecoderConfig(d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, d_ff=48,
                       vocab_size=256, max_seq_len=256)  # fmt: skip
MULTIPLIERS = Multipliers(embedding=3.0, output=0.5, residual=0.4, attention=0.1)
TASK = """\
task: local_words
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prefix}}}}"
doc_to_choice: choices
doc_to_target: "{{{{gold}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
NAMES = """
import json, sys
from lm_eval.tasks import TaskManager
manager = TaskManager()
print(json.dumps([name for name in sys.argv[1:] if name in manager.all_tasks]))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has the harness: this one, the one that LM_EVAL_PYTHON names, or a new one.

    The new one sees this one's packages and adds to them, so that nothing here changes.
    """
    if find_spec("lm_eval") is not None:
        return Path(sys.executable)
    if given := os.environ.get("LM_EVAL_PYTHON"):
        return Path(given)
    venv = tmp_path_factory.mktemp("lm_eval") / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    (place,) = venv.glob("lib/python*/site-packages")
    (place / "outer.pth").write_text("\n".join(site.getsitepackages()))
    found = venv / "bin" / "python"
    pip = [found, "-m", "pip", "install", "--quiet", "lm-eval[hf]>=0.4"]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"lm-eval cannot be installed: {done.stderr[-300:]}")
    return found


def run(*command: str | Path, cwd: Path) -> str:
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
    env = {**os.environ, **offline, "HF_HOME": str(cwd / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def questions() -> list[dict[str, Any]]:
    """Lines of this repository's README: how each goes on, and how another one does.

    The harness counts spaces at the end of a context to the continuation, so there are none.
    """
    text = (ROOT / "README.md").read_text("utf-8")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    cut = [(line[:30].rstrip(), line[30:60].lstrip()) for line in lines if len(line) > 70]
    asked = []
    for number, (prefix, right) in enumerate(cut[:12]):
        gold, wrong = number % 2, cut[-1 - number][1]
        choices = [wrong, right] if gold else [right, wrong]
        asked.append({"prefix": prefix, "choices": [f" {c}" for c in choices], "gold": gold})
    return asked


@torch.no_grad()
def log_likelihood(model: Decoder, prefix: str, choice: str) -> float:
    encode = ByteTokenizer().encode
    tokens = torch.from_numpy(encode(prefix + choice).astype("int64"))[None]
    scores: Tensor = model(tokens[:, :-1]).log_softmax(-1)
    each = scores[0].gather(-1, tokens[0, 1:, None])
    return float(each[-len(encode(choice)) :].sum())


@pytest.mark.parametrize("architecture", ["granite", "llama"])
def test_the_harness_finds_our_decoder_s_log_likelihoods(
    python: Path, architecture: Any, tmp_path: Path
) -> None:
    draw = torch.Generator().manual_seed(0)
    values = {n: torch.randn(p.shape, generator=draw) * 0.3
              for n, p in Decoder(CONFIG).named_parameters()}  # fmt: skip
    tensors = Tensors(shapes={n: tuple(t.shape) for n, t in values.items()},
                      read=values.__getitem__)  # fmt: skip
    export_hf(
        Weights(config=CONFIG, multipliers=MULTIPLIERS, tensors=tensors, parametrization=None,
                bundle=None, tokenizer=ByteTokenizer(), state=None, path=tmp_path),
        tmp_path / "hf", architecture=architecture,
    )  # fmt: skip
    model = Decoder(CONFIG)
    model.load_state_dict(values)
    model.set_multipliers(MULTIPLIERS)

    asked = questions()
    file = tmp_path / "words.jsonl"
    file.write_text("\n".join(map(json.dumps, asked)), encoding="utf-8")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local_words.yaml").write_text(TASK.format(file=file))
    run(
        python, "-m", "lm_eval", "--model", "hf",
        "--model_args", f"pretrained={tmp_path / 'hf'},dtype=float32",
        "--tasks", "local_words", "--include_path", tmp_path / "tasks", "--device", "cpu",
        "--batch_size", "4", "--output_path", tmp_path / "out", "--log_samples", cwd=tmp_path,
    )  # fmt: skip

    (result,) = (tmp_path / "out").rglob("results_*.json")
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    right = 0
    lines = [json.loads(line) for line in samples.read_text("utf-8").splitlines()]
    assert len(lines) == len(asked)
    for line in lines:
        doc = line["doc"]
        ours = [log_likelihood(model, doc["prefix"], choice) for choice in doc["choices"]]
        theirs = [float(response[0][0]) for response in line["resps"]]
        assert theirs == pytest.approx(ours, rel=1e-4), doc
        right += ours.index(max(ours)) == doc["gold"]
    accuracy = json.loads(result.read_text())["results"]["local_words"]["acc,none"]
    assert accuracy == pytest.approx(right / len(asked))
    assert 0 < right < len(asked)


def test_the_harness_knows_the_thirteen_tasks(python: Path, tmp_path: Path) -> None:
    script = (ROOT / "docs" / "evaluation" / "thirteen_tasks.sh").read_text("utf-8")
    names = re.findall(r"^\s*evaluate ([a-z][\w-]*)\s+\d", script, flags=re.MULTILINE)
    assert len(names) == 13
    assert json.loads(run(python, "-c", NAMES, *names, cwd=tmp_path).splitlines()[-1]) == names
