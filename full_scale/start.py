"""Weights from elsewhere as a starting point: a folder with `start.json` and safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from full_scale.refold import refold
from mutransfer.errors import UserError
from mutransfer.table import Multipliers, Table
from proxies.decoder import Decoder, DecoderConfig


class Start(BaseModel):
    """`start.json`: what imported weights are and what they compute with."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    schema_version: Literal[1] = 1
    source: str = Field(description="the format that they came in: granite, llama or megatron")
    sources: dict[str, str] = Field(description="SHA-256 by file name")
    config: DecoderConfig
    multipliers: Multipliers = Field(description="effective: attention is the whole softmax scale")
    parametrization: str | None = Field(
        description="name of the rules that trained them, where the source says so"
    )
    bundle: str | None = Field(description="SHA-256 of the bundle, where the source says so")


@torch.no_grad()
def start_from(model: Decoder, table: Table, folder: Path) -> None:
    """Fills a decoder with imported weights, under the multipliers of its own table.

    The function is that of the source. Where the table's multipliers are others than the
    source's, the weights make up for it (`full_scale.refold`); what the rules say of learning
    rates then refers to weights of another size than `init_std` gives, which is for the user to
    judge.

    Args:
        model: The decoder; its shape must be the source's.
        table: Its parametrization.
        folder: What `mutransfer import-hf` or `import-megatron` wrote.

    Raises:
        UserError: The folder is none of an import, or its model another.
    """
    from full_scale.weights import read_weights

    weights = read_weights(folder)
    ours, theirs = model.config.model_dump(), weights.config.model_dump()
    fields = [n for n in ours if ours[n] != theirs[n] and n != "max_seq_len"]
    if fields:
        raise UserError(
            "the imported model is another", where=str(folder),
            got=", ".join(f"{name} = {theirs[name]}" for name in fields),
            expected=", ".join(f"{name} = {ours[name]}" for name in fields),
        )  # fmt: skip
    table.resolve(model)
    tensors = refold(
        weights.tensors, weights.multipliers, table.multipliers, tied=model.config.tied
    )
    model.set_multipliers(table.multipliers)
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors.read(name))
