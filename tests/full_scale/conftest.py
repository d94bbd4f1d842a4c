"""A tiny target, a bundle for it, a text and recipes, for every test of the trainer."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from full_scale.recipe import Recipe
from mutransfer.bundle import Bundle
from mutransfer.rules import DEFAULT, BaseParams, get_parametrization
from proxies.data import Corpus, DataConfig, prepare
from proxies.decoder import DecoderConfig
from proxies.presets import get_preset
from proxies.tables import decoder_table

TARGET = get_preset("tiny-64").narrow(64, n_layers=2)
BASE = TARGET.narrow(32)
BATCH, SEQ_LEN = 4, 16

PHASES: list[dict[str, Any]] = [
    {"name": "warmup", "steps": 2, "lr_start": 0.0, "shape": "linear"},
    {"name": "stable", "steps": 4},
    {"name": "bigger", "steps": 3, "batch_size": 2 * BATCH, "micro_batch": BATCH},
    {"name": "decay", "steps": 4, "lr_end": 0.25, "shape": "wsd_exponential",
     "optimizer": "muon"},
    {"name": "long", "steps": 3, "seq_len": 2 * SEQ_LEN, "lr_start": 0.25, "lr_end": 0.125,
     "shape": "linear", "optimizer": "muon"},
]  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 kB of words in a random order with a little structure."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 6))) for _ in range(50)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(rng.choices(words, k=9000)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def corpus(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The text as bytes."""
    return prepare(DataConfig(train=(str(text),)), tmp_path_factory.mktemp("data"))


@pytest.fixture
def recipe_fields(text: Path) -> dict[str, Any]:
    """A recipe of all phases as plain data, for tests to change."""
    return {
        "name": "tiny",
        "model": TARGET.model_dump(),
        "data": {"train": [str(text)]},
        "clip_norm": 1.0,
        "log_every": 2,
        "checkpoint_every": 5,
        "heldout_tokens": 512,
        "phases": [{"seq_len": SEQ_LEN, "batch_size": BATCH, **phase} for phase in PHASES],
    }


@pytest.fixture
def recipe(recipe_fields: dict[str, Any]) -> Recipe:
    """The same, read."""
    return Recipe.model_validate(recipe_fields)


@pytest.fixture
def make_bundle(corpus: Corpus, recipe: Recipe) -> Callable[..., Bundle]:
    """Makes a bundle for the tiny target, without evidence; keywords replace fields."""

    def make(target: DecoderConfig = TARGET, **fields: Any) -> Bundle:
        params = BaseParams(init_std=0.1, weight_decay=0.1)
        own = {
            "experiment": {"name": "test", "sha256": "0" * 64},
            "base": {"config": BASE.model_dump(), "base_width": 32},
            "target": {"config": target.model_dump()},
            "parametrization": {"name": DEFAULT, "version": get_parametrization(DEFAULT).version},
            "base_hyperparameters": params,
            "provenance": {name: {"source": "fixed"} for name in BaseParams.model_fields},
            "table": decoder_table(target, BASE, params),
            "evidence": None,
            "batch_tokens": recipe.batch_tokens,
            "horizon_tokens": recipe.horizon_tokens,
            "data": {
                "fingerprint": corpus.fingerprint,
                "tokenizer_fingerprint": corpus.tokenizer_fingerprint,
                "vocab_size": corpus.vocab_size,
            },
            "versions": {},
        }
        return Bundle.create(**{**own, **fields})

    return make


@pytest.fixture
def bundle(make_bundle: Callable[..., Bundle]) -> Bundle:
    """The bundle that the recipe was written for."""
    return make_bundle()


def _toml(value: object) -> str:
    """A value as inline TOML; `None` has no form there and is left out."""
    if isinstance(value, dict):
        pairs = [f"{key} = {_toml(item)}" for key, item in value.items() if item is not None]
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return str(value).lower() if isinstance(value, bool) else repr(value)


@pytest.fixture
def files(
    tmp_path: Path, bundle: Bundle, recipe_fields: dict[str, Any]
) -> Callable[..., tuple[Path, Path]]:
    """Writes bundle and recipe; keywords change the recipe. Returns their paths."""

    def write(**change: Any) -> tuple[Path, Path]:
        lines = [f"{key} = {_toml(item)}" for key, item in {**recipe_fields, **change}.items()]
        (tmp_path / "recipe.toml").write_text("\n".join(lines), encoding="utf-8")
        bundle.save(tmp_path / "bundle.json")
        return tmp_path / "bundle.json", tmp_path / "recipe.toml"

    return write
