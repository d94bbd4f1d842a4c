"""The notebooks run from top to bottom, on a tiny experiment."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

EXPERIMENT = """
target = {{ preset = "tiny-64", n_layers = 1 }}
[data]
train = ["{text}"]
heldout_fraction = 0.3
[train]
steps = 12
batch_size = 4
seq_len = 16
heldout_tokens = 256
[search]
lr = {{ low = 0.002, high = 0.05 }}
[sweep]
trials = 3
startup = 2
confirm = 1
[coord_check]
widths = [32, 64, 96]
seeds = 1
steps = 4
[transfer_check]
widths = [32, 64]
octaves = 1
extend = 1
"""

RECIPE = """
name = "notebook"
model = {{ d_model = 64, n_layers = 1, n_heads = 4, n_kv_heads = 2, head_dim = 16, d_ff = 160, \
vocab_size = 256, max_seq_len = 2048 }}
heldout_tokens = 256
[data]
train = ["{text}"]
heldout_fraction = 0.3
[conversion]
batch_rule = "constant"
horizon_rule = "constant"
[[phases]]
name = "stable"
steps = 4
seq_len = 16
batch_size = 4
[[phases]]
name = "decay"
steps = 4
seq_len = 16
batch_size = 4
lr_end = 0.0625
shape = "wsd_exponential"
optimizer = "muon"
"""


@pytest.mark.slow
# the kernel's client uses zmq sockets and an event loop that warn on their own account
@pytest.mark.filterwarnings("ignore")
def test_the_notebooks_run_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nbformat
    from nbclient import NotebookClient

    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {i} of {i % 7} and {i % 11}" for i in range(4000)))
    (tmp_path / "tiny.toml").write_text(EXPERIMENT.format(text=text))
    (tmp_path / "recipe.toml").write_text(RECIPE.format(text=text))
    monkeypatch.setenv("MUTRANSFER_EXPERIMENT", str(tmp_path / "tiny.toml"))
    monkeypatch.setenv("MUTRANSFER_RECIPE", str(tmp_path / "recipe.toml"))
    monkeypatch.setenv("MUTRANSFER_OUT", str(tmp_path / "run"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    assert len(NOTEBOOKS) == 3
    for path in NOTEBOOKS:
        book = nbformat.read(path, as_version=4)
        NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
        pictures = sum("image/png" in json.dumps(cell.get("outputs", [])) for cell in book.cells)
        assert pictures >= 1, f"{path.name} shows no picture"
