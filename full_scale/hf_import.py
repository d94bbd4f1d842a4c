"""A Granite or Llama folder of safetensors as a starting point."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from torch import Tensor

from full_scale.hf_export import DTYPES
from full_scale.hf_names import from_hf, hf_name, own_record
from full_scale.start import Start
from full_scale.tensors import Tensors, open_tensors, write_tensors
from full_scale.weights import checked
from mutransfer.errors import UserError
from mutransfer.files import atomic_folder, read_json, write_json
from mutransfer.progress import Report, quiet
from mutransfer.schema import parse
from proxies.decoder import meta_decoder


def import_hf(source: Path, out: Path, *, progress: Report = quiet) -> Start:
    """Writes `start.json`, the weights under our names, bit for bit, and the tokenizer.

    Args:
        source: A folder with `config.json` and safetensors.
        out: The folder to write; it must not exist.
        progress: Is told of every file.

    Raises:
        UserError: The model is not one that our decoder computes, has no safetensors, or `out`
            exists.
    """
    path = source / "config.json"
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError("not a configuration", where=str(path), expected="a JSON object")
    config, multipliers = from_hf(content, str(path))
    found = open_tensors(source)
    if hf_name("embedding.weight") not in found.shapes:
        raise UserError("no embedding among the tensors", where=str(source),
                        expected=hf_name("embedding.weight"))  # fmt: skip
    ours = {hf_name(name): name for name, _ in meta_decoder(config).named_parameters()}
    shapes = {ours.get(name, name): shape for name, shape in found.shapes.items()}
    if config.tied:  # some writers store the head again
        shapes.pop("lm_head.weight", None)
    shapes = {n: s for n, s in shapes.items() if not n.endswith("rotary_emb.inv_freq")}
    theirs = {name: other for other, name in ours.items()}
    dtype = found.read(theirs["embedding.weight"]).dtype

    def read(name: str) -> Tensor:
        tensor = found.read(theirs[name])
        if tensor.dtype != dtype or dtype not in DTYPES.values():
            raise UserError("weights are not all of one known type", where=f"{source}: {name}",
                            got=tensor.dtype, expected=dtype)  # fmt: skip
        return tensor

    tensors = checked(Tensors(shapes=shapes, read=read), config, str(source))
    own = own_record(content)
    record = {
        "source": content["model_type"],
        "sources": {file.name: sha256(file) for file in _files(source)},
        "config": config,
        "multipliers": multipliers,
        "parametrization": own.get("parametrization"),
        "bundle": own.get("bundle"),
    }
    start = parse(Start, record, f"{path}: mutransfer")
    with atomic_folder(out) as folder:
        write_tensors(folder, tensors.shapes, tensors.read, dtype, progress=progress)
        write_json(folder / "start.json", start.model_dump(mode="json"))
        if (source / "tokenizer.json").is_file():
            shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    return start


def _files(source: Path) -> list[Path]:
    return [source / "config.json", *sorted(source.glob("*.safetensors"))]


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
