"""Folders of Megatron-named safetensors, with `megatron.json` saying what they compute with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from full_scale.hf_export import DTYPES
from full_scale.hf_import import sha256
from full_scale.hf_names import llama_multipliers
from full_scale.megatron_names import Layers, from_megatron, to_megatron
from full_scale.refold import refold
from full_scale.start import Start
from full_scale.tensors import Tensors, open_tensors, write_tensors
from full_scale.weights import Weights, checked
from mutransfer.errors import UserError
from mutransfer.files import atomic_folder, read_json, write_json
from mutransfer.progress import Report, quiet
from mutransfer.schema import parse
from mutransfer.table import Multipliers
from proxies.decoder import DecoderConfig


class MegatronFile(BaseModel):
    """`megatron.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    schema_version: Literal[1] = 1
    config: DecoderConfig
    multipliers: Multipliers = Field(description="effective: attention is the whole softmax scale")
    transformer_config: dict[str, Any] = Field(
        description="fields of megatron-core's TransformerConfig that hold the multipliers"
    )
    parametrization: str | None
    bundle: str | None


def export_megatron(
    weights: Weights,
    out: Path,
    *,
    layers: Layers = "transformer_engine",
    keep_multipliers: bool = False,
    dtype: str = "float32",
    progress: Report = quiet,
) -> Path:
    """Writes safetensors under Megatron's names and `megatron.json`, whole or not at all.

    Args:
        weights: What to export.
        out: The folder; it must not exist.
        layers: Where the norms live: in transformer-engine's fused layers, or of their own.
        keep_multipliers: Leave the multipliers to `--use-mup`'s fields instead of folding them
            into the weights; there is none for the residual multiplier.
        dtype: Of the stored weights.
        progress: Is told of every file.

    Raises:
        UserError: `out` exists, or Megatron has no field for a multiplier that is to be kept.
    """
    old, config = weights.multipliers, weights.config
    new = old if keep_multipliers else llama_multipliers(config)
    if new.residual != 1.0:
        raise UserError("Megatron has no residual multiplier", where="multipliers.residual",
                        got=new.residual, expected=1.0,
                        cure="Fold the multipliers into the weights.")  # fmt: skip
    tensors = refold(weights.tensors, old, new, tied=config.tied)
    theirs = to_megatron(tensors, config, layers)
    record = MegatronFile(
        config=config,
        multipliers=new,
        transformer_config=_fields(config, new),
        parametrization=weights.parametrization,
        bundle=weights.bundle.sha256 if weights.bundle else None,
    )
    with atomic_folder(out) as folder:
        write_tensors(folder, theirs.shapes, theirs.read, DTYPES[dtype], progress=progress)
        write_json(folder / "megatron.json", record.model_dump(mode="json"))
    return out


def import_megatron(source: Path, out: Path, *, progress: Report = quiet) -> Start:
    """Takes Megatron-named safetensors as a starting point (`full_scale.start`).

    Args:
        source: A folder with `megatron.json` and safetensors, of either kind of layers.
        out: The folder to write; it must not exist.
        progress: Is told of every file.

    Raises:
        UserError: Names or shapes are not those of the model in `megatron.json`, or `out` exists.
    """
    path = source / "megatron.json"
    record = parse(MegatronFile, read_json(path), str(path))
    if record.transformer_config != _fields(record.config, record.multipliers):
        raise UserError("the fields for Megatron are not those of the multipliers",
                        where=f"{path}: transformer_config")  # fmt: skip
    found = open_tensors(source)
    own = from_megatron(found, record.config)
    tensors = checked(Tensors(shapes=own.shapes, read=own.read), record.config, str(source))
    start = Start(
        source="megatron",
        sources={file.name: sha256(file) for file in [path, *sorted(source.glob("*.safetensors"))]},
        config=record.config,
        multipliers=record.multipliers,
        parametrization=record.parametrization,
        bundle=record.bundle,
    )
    dtype = tensors.read("norm.weight").dtype
    with atomic_folder(out) as folder:
        write_tensors(folder, tensors.shapes, tensors.read, dtype, progress=progress)
        write_json(folder / "start.json", start.model_dump(mode="json"))
    return start


def _fields(config: DecoderConfig, multipliers: Multipliers) -> dict[str, Any]:
    """The multipliers as TransformerConfig has them; at m = 1 upstream scales nothing itself."""
    if multipliers == llama_multipliers(config):
        return {"softmax_scale": multipliers.attention}
    return {
        "use_mup": True,
        "mup_base_hidden_size": config.d_model,
        "softmax_scale": multipliers.attention,
        "mup_embedding_mult": multipliers.embedding,
        "mup_output_mult": multipliers.output,
    }
