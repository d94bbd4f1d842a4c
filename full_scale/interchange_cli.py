"""The commands `mutransfer export-hf`, `import-hf` and the same for Megatron: models out and in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mutransfer.progress import Display

Architecture = Literal["granite", "llama"]
Layers = Literal["transformer_engine", "local"]
Dtype = Literal["float64", "float32", "bfloat16", "float16"]

Checkpoint = Annotated[
    Path,
    typer.Argument(help="A run folder (its newest whole checkpoint), a checkpoint, or an import."),
]
Out = Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")]
BundleFile = Annotated[
    Path | None, typer.Option("--bundle", help="The bundle [default: bundle.json of the run].")
]
TokenizerFile = Annotated[
    Path | None,
    typer.Option("--tokenizer", help="A tokenizer.json [default: that of the run]."),
]


def export_hf(
    ckpt: Checkpoint,
    out: Out,
    architecture: Annotated[
        Architecture,
        typer.Option(help="granite keeps the multipliers; llama has them folded into the weights."),
    ] = "granite",
    dtype: Annotated[Dtype, typer.Option(help="Of the stored weights.")] = "float32",
    bundle: BundleFile = None,
    tokenizer: TokenizerFile = None,
) -> None:
    """Write a checkpoint as a folder that stock transformers loads, with no remote code."""
    from full_scale.hf_export import export_hf as export
    from full_scale.weights import read_weights

    with Display() as display:
        weights = read_weights(ckpt, bundle=bundle, tokenizer=tokenizer, say=display)
        export(weights, out, architecture=architecture, dtype=dtype, progress=display)


def import_hf(
    src: Annotated[Path, typer.Argument(help="A Granite or Llama folder of safetensors.")],
    out: Out,
) -> None:
    """Take a Hugging Face model as a starting point: start.json and safetensors."""
    from full_scale.hf_import import import_hf as take

    with Display() as display:
        start = take(src, out, progress=display)
        rules = start.parametrization or "unknown; its multipliers are known"
        display(f"{out}: {start.source}, {start.config.n_parameters:,} parameters; rules: {rules}")


def export_megatron(
    ckpt: Checkpoint,
    out: Out,
    layers: Annotated[
        Layers, typer.Option(help="Megatron's --transformer-impl: where the norms live.")
    ] = "transformer_engine",
    keep_multipliers: Annotated[
        bool,
        typer.Option("--keep-multipliers", help="For --use-mup; else folded into the weights."),
    ] = False,
    dtype: Annotated[Dtype, typer.Option(help="Of the stored weights.")] = "float32",
    bundle: BundleFile = None,
    tokenizer: TokenizerFile = None,
) -> None:
    """Write a checkpoint under Megatron's names: safetensors and megatron.json."""
    from full_scale.megatron_files import export_megatron as export
    from full_scale.weights import read_weights

    with Display() as display:
        weights = read_weights(ckpt, bundle=bundle, tokenizer=tokenizer, say=display)
        export(weights, out, layers=layers, keep_multipliers=keep_multipliers, dtype=dtype,
               progress=display)  # fmt: skip
        display(f"{out}: {layers} names, {dtype}")


def import_megatron(
    src: Annotated[Path, typer.Argument(help="A folder of Megatron-named safetensors.")],
    out: Out,
) -> None:
    """Take Megatron-named weights as a starting point: start.json and safetensors."""
    from full_scale.megatron_files import import_megatron as take

    with Display() as display:
        start = take(src, out, progress=display)
        display(f"{out}: {start.config.n_parameters:,} parameters")
