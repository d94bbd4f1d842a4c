"""The memory of a population, measured on two small ones, is that of a larger one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mutransfer.errors import UserError
from proxies.data import Corpus, DataConfig, prepare
from proxies.footprint import Footprint, _peak, free_memory, measure_footprint, require_fit
from proxies.presets import get_preset
from proxies.run import RunSpec, TrainConfig

MODEL = get_preset("tiny-32")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text("some words again and again " * 400, encoding="utf-8")
    return prepare(DataConfig(train=(str(folder / "text.txt"),)), folder / "data")


@pytest.mark.parametrize("train", [{}, {"handover": True, "decay": 0.5, "warmup": 0.0}])
def test_it_is_linear_in_members(corpus: Corpus, train: dict[str, object]) -> None:
    spec = RunSpec(
        model=MODEL, base=MODEL, base_width=32, data=corpus.fingerprint,
        train=TrainConfig.model_validate(
            {"steps": 4, "batch_size": 4, "seq_len": 32, "heldout_tokens": 256, **train}
        ),
    )  # fmt: skip
    footprint = measure_footprint(corpus, spec)
    assert _peak(corpus, [spec] * 7, "cpu") == pytest.approx(footprint.of(7), rel=0.05)
    # weights, gradients and two moments at least; logits, their gradient and their softmax
    assert footprint.per_member > 4 * 4 * MODEL.n_parameters + 3 * 4 * 4 * 32 * 256
    wide = spec.model_copy(update={"train": spec.train.model_copy(update={"batch_size": 8})})
    assert measure_footprint(corpus, wide).per_member > 1.3 * footprint.per_member


def test_what_fits() -> None:
    footprint = Footprint(fixed=1000, per_member=50)
    assert footprint.of(4) == 1200
    assert (footprint.fitting(2000), footprint.fitting(1166), footprint.fitting(5)) == (16, 0, 0)
    require_fit(footprint, 16, 2000)
    with pytest.raises(UserError, match=r"^--members: a population of .*expected at most 16, at"):
        require_fit(footprint, 17, 2000)
    with pytest.raises(UserError, match=r"got 1, .*expected at most 0.*smaller proxy"):
        require_fit(footprint, 1, 5)


def test_a_machine_has_some_memory_left() -> None:
    assert free_memory() > torch.ones(10).nbytes
    assert Path("/proc/meminfo").exists()
