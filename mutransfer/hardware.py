"""What devices can do at most: a table of datasheets, and a product timed on this processor."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from mutransfer.errors import UserError
from mutransfer.schema import read_toml

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Device:
    """One kind of accelerator.

    Attributes:
        name: What the command line calls it.
        match: Part of the name that the driver gives it.
        fp32, bf16: Peak of dense products, in TFLOP/s.
        memory_gb: Memory, in 1e9 bytes.
        source: Where the figures are from.
    """

    name: str
    match: str
    fp32: float
    bf16: float
    memory_gb: float
    source: str

    def flops(self, precision: Precision) -> float:
        """Peak of dense products, in FLOP/s."""
        return 1e12 * (self.bf16 if precision == "bf16" else self.fp32)


def devices() -> dict[str, Device]:
    """The devices that are known, by name."""
    table = read_toml(Path(__file__).with_name("hardware.toml"))
    return {name: Device(name=name, **fields) for name, fields in table.items()}


def get_device(name: str) -> Device:
    """The device called `name`.

    Raises:
        UserError: It is not in the table.
    """
    known = devices()
    if name not in known:
        raise UserError("unknown kind of GPU", where="--gpu", got=name,
                        expected=f"one of {', '.join(known)}")  # fmt: skip
    return known[name]


def peak_flops(device: str, precision: Precision) -> float | None:
    """FLOP/s at most of the device that torch calls `device`; `None` where nothing is known.

    A GPU's is its datasheet's; a processor's is timed: the fastest of a few products.
    """
    if device == "cpu":
        return timed_product(precision)
    full_name = torch.cuda.get_device_name(device)
    return next((d.flops(precision) for d in devices().values() if d.match in full_name), None)


def timed_product(precision: Precision, size: int = 768, repeats: int = 4) -> float:
    """FLOP/s of the fastest of a few products of square matrices on this processor."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(2, size, size, dtype=dtype)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)
