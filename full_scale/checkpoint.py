"""Checkpoints: a folder of safetensors and JSON that is whole, or is not there.

`step-00000120/` holds `model.safetensors`, `optimizer.safetensors` and `state.json`, and
`manifest.json` with the SHA-256 of each, written last. The folder is filled under a temporary
name, synced and renamed. No file can hold code.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from mutransfer.errors import UserError
from mutransfer.files import read_json, sync, write_json
from mutransfer.optimizers import Matrix
from mutransfer.schema import parse

_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
_RECORD = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Identity(BaseModel):
    """What a checkpoint belongs to; all of it must be equal for a run to go on from it."""

    model_config = _RECORD
    bundle: str = Field(description="the bundle's SHA-256")
    recipe: str = Field(description="SHA-256 of what in the recipe decides the weights")
    data: str = Field(description="fingerprint of the corpus")


class State(BaseModel):
    """Where a run stands, beside its tensors.

    There is no state of a random generator: weights are drawn by name, batches by position, and
    nothing else is random.
    """

    model_config = _RECORD
    schema_version: Literal[1] = 1
    identity: Identity
    step: int = Field(ge=0, description="steps done, skipped ones included")
    tokens: int = Field(ge=0, description="tokens consumed")
    optimizer: Matrix = Field(description="of the hidden matrices")
    skipped: int = Field(0, ge=0, description="steps skipped so far: not finite")
    skipped_in_a_row: int = Field(0, ge=0, description="of these, the last ones in a row")
    update_rms: dict[str, float] = Field({}, description="by role, at the last logged step")


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """A checkpoint in memory; `optimizer` is as `Optimizers.state_tensors` returns it."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: State


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Writes `folder/step-<step>/`; a folder that is there already is replaced."""
    final = folder / f"step-{checkpoint.state.step:08d}"
    aside = folder / f".{final.name}.tmp"
    for old in folder.glob(".step-*.tmp"):
        shutil.rmtree(old)
    aside.mkdir(parents=True)
    save_file(_contiguous(checkpoint.model), aside / _FILES[0])
    save_file(_contiguous(checkpoint.optimizer), aside / _FILES[1])
    for name in _FILES[:2]:
        sync(aside / name)
    write_json(aside / _FILES[2], checkpoint.state.model_dump(mode="json"))
    write_json(aside / "manifest.json", {
        "schema_version": 1, "sha256": {name: _sha256(aside / name) for name in _FILES},
    })  # fmt: skip
    if final.exists():
        shutil.rmtree(final)
    os.replace(aside, final)
    sync(folder)
    return final


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; `None` where it is whole."""
    try:
        manifest = read_json(path / "manifest.json")
    except UserError as error:
        return error.what
    sums = manifest.get("sha256") if isinstance(manifest, dict) else None
    if not isinstance(sums, dict) or set(sums) != set(_FILES):
        return "manifest.json does not list the files"
    for name in _FILES:
        if not (path / name).is_file():
            return f"{name} is missing"
        if _sha256(path / name) != sums[name]:
            return f"{name} has another SHA-256 than the manifest says"
    return None


def found(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, whole or not, oldest first."""
    paths = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted(paths, key=lambda path: int(path.name.removeprefix("step-")))


def newest(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole, or `None` where there is none at all.

    Args:
        folder: Where the checkpoints lie.
        say: Is told of every one that is broken and so passed over.

    Raises:
        UserError: There are checkpoints, but not one of them is whole.
    """
    paths = found(folder)
    for path in reversed(paths):
        problem = verify(path)
        if problem is None:
            return path
        say(f"checkpoint {path.name} is broken and passed over: {problem}")
    if paths:
        raise UserError(
            "no checkpoint is whole",
            where=str(folder),
            got=f"{len(paths)} broken",
            cure="Put a good one there, or delete the folder to start anew.",
        )
    return None


def load(path: Path, identity: Identity, device: str = "cpu") -> Checkpoint:
    """Reads a verified checkpoint of this very run.

    Raises:
        UserError: It belongs to another bundle, recipe or corpus, or cannot be read.
    """
    where = str(path)
    state = parse(State, read_json(path / _FILES[2]), where)
    wanted, got = identity.model_dump(), state.identity.model_dump()
    if other := [name for name in wanted if wanted[name] != got[name]]:
        raise UserError(
            f"the checkpoint belongs to another {' and another '.join(other)}",
            where=where,
            got=", ".join(f"{name} {got[name][:12]}" for name in other),
            expected=", ".join(f"{name} {wanted[name][:12]}" for name in other),
            cure="Give the run another folder with --out.",
        )
    try:
        model, optimizer = (load_file(path / name, device=device) for name in _FILES[:2])
    except Exception as error:  # safetensors raises its own type for a bad header
        raise UserError(f"tensors cannot be read ({error})", where=where) from error
    return Checkpoint(model=model, optimizer=optimizer, state=state)


def prune(folder: Path, keep_last: int) -> None:
    """Deletes all but the newest `keep_last`, and never the newest that is whole."""
    paths = found(folder)
    kept, old = paths[-keep_last:], paths[:-keep_last]
    if old and not any(verify(path) is None for path in reversed(kept)):
        spared = next((path for path in reversed(old) if verify(path) is None), None)
        old = [path for path in old if path != spared]
    for path in old:
        shutil.rmtree(path)


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
