"""A member of a population on the disk: one safetensors file, from which it goes on alone.

The tensors are the member's; the run, its evaluations and its time are JSON in the header.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mutransfer.files import atomic_path
from proxies.population import MemberState
from proxies.run import RunSpec


class _Header(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    spec: RunSpec
    evaluations: tuple[tuple[int, float], ...]
    seconds: float


def save_member(path: Path, state: MemberState) -> None:
    """Writes a member, whole or not at all."""
    header = _Header(spec=state.spec, evaluations=state.evaluations, seconds=state.seconds)
    tensors = {name: tensor.contiguous().cpu() for name, tensor in state.tensors.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"member": header.model_dump_json()})


def load_member(path: Path, spec: RunSpec) -> MemberState | None:
    """The state of this very run, or `None` where the file holds none that is whole."""
    try:
        with safe_open(path, framework="pt") as file:
            header = _Header.model_validate_json((file.metadata() or {}).get("member", ""))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError):
        return None
    if header.spec != spec:
        return None
    return MemberState(
        spec=spec, evaluations=header.evaluations, seconds=header.seconds, tensors=tensors
    )
