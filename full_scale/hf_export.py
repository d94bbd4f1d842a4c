"""A checkpoint as a folder that stock `transformers` loads, with no code of ours."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from full_scale.hf_card import model_card
from full_scale.hf_names import Architecture, hf_name, llama_multipliers, to_hf
from full_scale.hf_tokenizer import write_tokenizer
from full_scale.refold import refold
from full_scale.tensors import SHARD_BYTES, write_tensors
from full_scale.weights import Weights
from mutransfer.errors import UserError
from mutransfer.files import atomic_folder, write_json, write_text
from mutransfer.progress import Report, quiet

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def export_hf(
    weights: Weights,
    out: Path,
    *,
    architecture: Architecture = "granite",
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    progress: Report = quiet,
) -> Path:
    """Writes a Hugging Face model folder, whole or not at all.

    Granite has fields for all of μP's multipliers, so its weights are the checkpoint's. Llama
    has none; they are folded into the weights (`full_scale.refold`), in float64, rounded once.

    Args:
        weights: What to export.
        out: The folder; it must not exist.
        architecture: Whose class loads it.
        dtype: Of the stored weights, a key of `DTYPES`.
        shard_bytes: Size of a file of weights; memory holds one at a time.
        progress: Is told of every file.

    Raises:
        UserError: `out` exists, the architecture cannot hold the model, or a weight leaves the
            range of `dtype`.
    """
    if dtype not in DTYPES:
        raise UserError("unknown type of weights", where="dtype", got=dtype,
                        expected=", ".join(DTYPES))  # fmt: skip
    config = weights.config
    folded = architecture == "llama"
    multipliers = llama_multipliers(config) if folded else weights.multipliers
    content = to_hf(config, multipliers, architecture) | {"dtype": dtype}
    if weights.tokenizer is not None:
        ids = dict.fromkeys(("bos_token_id", "eos_token_id"), weights.tokenizer.separator)
        content |= ids
    content["mutransfer"] = {
        "multipliers": multipliers.model_dump(),
        "parametrization": weights.parametrization,
        "bundle": weights.bundle.sha256 if weights.bundle else None,
    }
    tensors = refold(weights.tensors, weights.multipliers, multipliers, tied=config.tied)
    theirs = {hf_name(name): name for name in tensors.shapes}
    with atomic_folder(out) as folder:
        write_tensors(
            folder,
            {name: tensors.shapes[ours] for name, ours in theirs.items()},
            lambda name: tensors.read(theirs[name]),
            DTYPES[dtype],
            shard_bytes=shard_bytes,
            progress=progress,
        )
        write_json(folder / "config.json", content)
        if weights.tokenizer is not None:
            write_tokenizer(folder, weights.tokenizer, config.max_seq_len)
        write_text(folder / "README.md", model_card(weights, architecture, dtype))
    size = math.prod((config.n_parameters, DTYPES[dtype].itemsize)) / 2**20
    progress(f"{out}: {architecture}, {dtype}, {size:,.1f} MiB of weights")
    return out
