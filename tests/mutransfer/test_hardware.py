"""The table of devices, and what is timed."""

from __future__ import annotations

import pytest
import torch

from mutransfer.errors import UserError
from mutransfer.hardware import devices, get_device, peak_flops, timed_product


def test_every_device_has_figures_and_a_source() -> None:
    known = devices()
    assert {"h100", "h200", "a100"} <= known.keys()
    for device in known.values():
        assert 1e13 < device.flops("fp32") < device.flops("bf16") < 1e16
        assert 10 < device.memory_gb < 1000
        assert device.source
    assert get_device("h100").flops("bf16") == pytest.approx(989.4e12)


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(UserError, match=r"--gpu: unknown kind of GPU; got h10; .*h100"):
        get_device("h10")


def test_the_processor_is_timed() -> None:
    assert timed_product("fp32", size=64) > 0
    assert (peak_flops("cpu", "fp32") or 0) > 0


@pytest.mark.parametrize(
    ("name", "expected"), [("NVIDIA H100 80GB HBM3", 989.4e12), ("Unheard Of", None)]
)
def test_a_gpu_is_known_by_its_name(
    name: str, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops("cuda:0", "bf16") == (expected and pytest.approx(expected))
