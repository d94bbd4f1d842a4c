"""The notebooks run from the first cell to the last, one after the other, on a tiny experiment."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))

EXPERIMENT = """
[target]
d_model = 64
n_layers = 1
n_heads = 4
n_kv_heads = 2
head_dim = 16
d_ff = 160
vocab_size = 256

[proxy]
d_model = 32

[data]
train = ["{text}"]
heldout_fraction = 0.3

[train]
steps = 12
batch_size = 4
seq_len = 16
heldout_tokens = 256
rungs = 2

[search]
lr = {{ low = 0.002, high = 0.05 }}

[sweep]
trials = 3
startup = 2
confirm = 1
confirm_seeds = 2

[coord_check]
widths = [32, 64, 96]
seeds = 1
steps = 4
batch_size = 2
seq_len = 16

[transfer_check]
widths = [32, 64]
seeds = 2
octaves = 1
extend = 1
"""

RECIPE = """
name = "tiny"
heldout_tokens = 256

[model]
d_model = 64
n_layers = 1
n_heads = 4
n_kv_heads = 2
head_dim = 16
d_ff = 160
vocab_size = 256

[data]
train = ["{text}"]
heldout_fraction = 0.3

[conversion]
horizon_rule = "constant"

[[phases]]
name = "stable"
steps = 6
seq_len = 16
batch_size = 4

[[phases]]
name = "decay"
steps = 3
seq_len = 16
batch_size = 4
lr_end = 0.1
shape = "wsd_exponential"
optimizer = "muon"
"""


def test_all_three_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="needs the extra `notebooks`")
    nbclient = pytest.importorskip("nbclient", reason="needs the extra `notebooks`")
    assert len(NOTEBOOKS) == 3
    text = tmp_path / "text.txt"
    words = ["width", "depth", "loss", "learning", "rate", "proxy", "target", "muon", "adam"]
    draw = random.Random(0)
    text.write_text("\n".join(" ".join(draw.choices(words, k=8)) for _ in range(1200)))
    for name, content in (("EXPERIMENT", EXPERIMENT), ("RECIPE", RECIPE)):
        path = tmp_path / f"{name.lower()}.toml"
        path.write_text(content.format(text=text))
        monkeypatch.setenv(f"MUTRANSFER_{name}", str(path))
    monkeypatch.setenv("MUTRANSFER_OUT", str(tmp_path / "run"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    pictures = 0
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        assert notebook.metadata.kernelspec.name == "python3", sys.executable
        nbclient.NotebookClient(notebook, timeout=600, resources={
            "metadata": {"path": str(tmp_path)}
        }).execute()  # fmt: skip
        outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
        assert not [o for o in outputs if o.output_type == "error"]
        pictures += sum("image/png" in o.get("data", {}) for o in outputs)
        if path.name.startswith("3"):
            printed = "".join(o.get("text", "") for o in outputs)
            assert "sha256: the content does not have the hash that it claims" in printed
    assert pictures == 7
    assert (tmp_path / "run" / "train" / "run.json").is_file()
