"""What a run trains on: mixtures in recipes, sources of every kind, and the trainer on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from full_scale import checkpoint
from full_scale.checkpoint import Identity
from full_scale.feed import Feed, open_sources
from full_scale.recipe import Recipe
from full_scale.train import train
from full_scale.trainer import Trainer
from mutransfer.bundle import Bundle
from mutransfer.errors import UserError
from mutransfer.files import read_json
from proxies.data import DataConfig, prepare, write_megatron

IDENTITY = Identity(bundle="b" * 64, recipe="r" * 64, data="d" * 64)

Fields = dict[str, Any]


@pytest.fixture
def mixed(recipe_fields: Fields, text: Path, tmp_path: Path) -> Fields:
    """A recipe over a Megatron file, JSONL, Parquet, a corpus and its own text."""
    import pyarrow
    import pyarrow.parquet

    rng = np.random.default_rng(0)
    lengths = np.maximum(1, rng.lognormal(3, 1, 120)).astype(int)
    write_megatron(tmp_path / "books", (rng.integers(1, 250, n) for n in lengths), vocab_size=256)
    words = ["".join(map(chr, rng.integers(97, 123, 60))) for _ in range(60)]
    lines = [json.dumps({"id": 1, "text": f"code {word}"}) for word in words]
    (tmp_path / "code.jsonl").write_text("\n".join(lines), encoding="utf-8")
    table = pyarrow.table({"text": [f"wiki {word}" for word in words]})
    pyarrow.parquet.write_table(table, tmp_path / "wiki.parquet")
    held = [json.dumps({"text": f"held out {word[:12]}"}) for word in words]
    (tmp_path / "held.jsonl").write_text("\n".join(held), encoding="utf-8")
    (tmp_path / "old.txt").write_text("an older corpus " * 100, encoding="utf-8")
    old = prepare(DataConfig(train=(str(tmp_path / "old.txt"),)), tmp_path / "old")
    recipe_fields["data"] = {"train": [str(text)], "heldout": [str(tmp_path / "held.jsonl")]}
    recipe_fields["sources"] = {
        "books": {"megatron": str(tmp_path / "books")},
        "code": {"text": [str(tmp_path / "code.jsonl")]},
        "wiki": {"text": [str(tmp_path / "wiki.parquet")]},
        "old": {"corpus": str(old.folder)},
    }
    recipe_fields["mixture"] = {"books": 0.3, "code": 0.2, "wiki": 0.2, "data": 0.3}
    for phase in recipe_fields["phases"][3:]:
        phase["mixture"] = {"old": 0.6, "books": 0.1, "wiki": 0.2995}
    recipe_fields["mask_documents"] = True
    return recipe_fields


def opened(fields: Fields, folder: Path) -> Feed:
    recipe = Recipe.model_validate(fields)
    corpus = prepare(recipe.data, folder)
    return Feed(recipe, corpus, open_sources(recipe, corpus, folder))


def test_sources_of_every_kind(mixed: Fields, tmp_path: Path) -> None:
    feed = opened(mixed, tmp_path / "data")
    assert set(feed.sources) == {"books", "code", "wiki", "old", "data"}
    code = feed.sources["code"]
    decoded = bytes(code.tokens.astype(np.uint8)).split(b"\0")
    assert decoded[0].startswith(b"code ")
    assert len(decoded) == 61
    assert len(code.starts) == 60
    assert bytes(feed.sources["wiki"].tokens[:5].astype(np.uint8)) == b"wiki "
    assert len(feed.sources["books"].starts) == 120


def test_batches_follow_the_mixture_of_each_phase(mixed: Fields, tmp_path: Path) -> None:
    feed = opened(mixed, tmp_path / "data")
    recipe = feed.recipe
    for step in range(recipe.steps):
        phase, _ = recipe.at(step)
        batch = feed.at(step)
        assert batch.tokens.shape == (phase.batch_size, phase.seq_len + 1)
        assert batch.documents is not None
        before, after = feed.consumed(step), feed.consumed(step + 1)
        taken = {name: after[name] - before.get(name, 0) for name in after}
        assert sum(taken.values()) == phase.batch_tokens
        named = recipe.mixture_of(phase) or {}
        assert {name for name, tokens in taken.items() if tokens} <= set(named)
    assert sum(feed.consumed(recipe.steps).values()) == recipe.horizon_tokens
    record = feed.record()
    assert record is not None
    decay = record["phases"]["decay"]
    assert decay["given"] == {"old": 0.6, "books": 0.1, "wiki": 0.2995}
    assert sum(decay["normalized"].values()) == pytest.approx(1, abs=1e-15)
    assert decay["normalized"]["old"] == pytest.approx(0.6 / 0.9995)


@pytest.mark.parametrize("mixture", [True, False])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_take_their_parts_of_the_batch(
    mixed: Fields, tmp_path: Path, ranks: int, mixture: bool
) -> None:
    if not mixture:
        mixed["mixture"], mixed["sources"] = None, {}
        for phase in mixed["phases"]:
            phase.pop("mixture", None)
    feed = opened(mixed, tmp_path / "data")
    for step in (0, 5, 6, 9, 15):
        whole = feed.at(step)
        parts = [feed.at(step, rank=rank, ranks=ranks) for rank in range(ranks)]
        assert np.array_equal(np.concatenate([p.tokens for p in parts]), whole.tokens)
        numbers = [p.documents for p in parts if p.documents is not None]
        assert whole.documents is not None
        assert np.array_equal(np.concatenate(numbers), whole.documents)
    with pytest.raises(UserError, match="phase 'warmup': .*got 4 sequences for 3 ranks"):
        feed.at(0, ranks=3)


def test_a_change_of_any_content_changes_the_fingerprint(mixed: Fields, tmp_path: Path) -> None:
    first = opened(mixed, tmp_path / "data").fingerprint
    assert opened(mixed, tmp_path / "data").fingerprint == first
    content = bytearray((tmp_path / "books.bin").read_bytes())
    content[0] ^= 1
    (tmp_path / "books.bin").write_bytes(content)
    assert opened(mixed, tmp_path / "data").fingerprint != first


def test_ids_beyond_the_vocabulary_are_refused_before_step_1(mixed: Fields, tmp_path: Path) -> None:
    write_megatron(tmp_path / "books", [np.arange(300)], vocab_size=300)
    with pytest.raises(UserError, match=r"books\.bin: .*got id 299 at token 299; .*0 to 255"):
        opened(mixed, tmp_path / "data")


def test_a_source_that_holds_held_out_text_is_refused(mixed: Fields, tmp_path: Path) -> None:
    mixed["sources"]["code"] = {"text": [str(tmp_path / "held.jsonl")]}
    with pytest.raises(UserError, match="held-out text is also training text"):
        opened(mixed, tmp_path / "data")


def test_a_corpus_of_another_tokenizer_is_refused(
    mixed: Fields, text: Path, tmp_path: Path
) -> None:
    other = prepare(
        DataConfig(train=(str(text),), tokenizer="bpe", vocab_size=280), tmp_path / "other"
    )
    mixed["sources"]["old"] = {"corpus": str(other.folder)}
    with pytest.raises(UserError, match="source 'old': another tokenizer or vocabulary"):
        opened(mixed, tmp_path / "data")


def test_one_trained_bpe_serves_all_sources(mixed: Fields, tmp_path: Path) -> None:
    mixed["data"] |= {"tokenizer": "bpe", "vocab_size": 280}
    mixed["model"] |= {"vocab_size": 280}
    del mixed["sources"]["old"]
    for phase in mixed["phases"][3:]:
        phase["mixture"] = {"code": 1.0}
    feed = opened(mixed, tmp_path / "data")
    tokenizer = feed.corpus.load_tokenizer()
    assert tokenizer.decode(feed.sources["code"].tokens[: feed.sources["code"].starts[1] - 1])[
        :5
    ] == "code "  # fmt: skip


Change = Callable[[Fields], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.update(mixture={"books": 0.5, "code": 0.2, "wiki": 0.2, "data": 0.1011}),
         "the weights do not sum to 1; got 1.0011"),
        (lambda f: f["phases"][4].update(mixture={"old": 0.9989}), "of phase 'long'.*0.9989"),
        (lambda f: f["phases"][4].update(mixture={"old": 1.5, "wiki": -0.5}), "not a weight"),
        (lambda f: f["phases"][4].update(mixture={}), "names no source"),
        (lambda f: f["phases"][4].update(mixture={"odl": 1}), "names 'odl'; sources: books, code"),
        (lambda f: f.update(mixture=None), "phase 'warmup' has no mixture, but others have"),
        (lambda f: f["sources"].update(data={"megatron": "x"}), "cannot be called 'data'"),
        (lambda f: f["sources"].update(more={"megatron": "x"}), "names the source 'more'"),
        (lambda f: f["sources"].update({"a b": {"megatron": "x"}}), "should match pattern"),
        (lambda f: f["sources"].update(old={}), "one of megatron, corpus and text; got none"),
        (lambda f: f["sources"].update(old={"megatron": "x", "corpus": "y"}),
         "got megatron and corpus"),
        (lambda f: f["sources"].update(old={"megatron": "x", "wieght": 1}), "Extra inputs"),
        (lambda f: f["data"].pop("heldout"), "source 'code' is text, so data.heldout"),
    ],
)  # fmt: skip
def test_mixtures_that_cannot_be_are_refused(mixed: Fields, change: Change, message: str) -> None:
    Recipe.model_validate(mixed)
    change(mixed)
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate(mixed)


def test_the_hash_of_a_recipe_without_mixture_is_what_it_was(recipe: Recipe, mixed: Fields) -> None:
    import hashlib

    import rfc8785

    cadence = {"log_every", "checkpoint_every", "keep_last", "evaluate_every", "heldout_tokens"}
    later = {"data", "sources", "mixture", "mask_documents", "parametrization"}
    old = recipe.model_dump(mode="json", exclude=cadence | later)
    for phase in old["phases"]:
        for name in ("mixture", "recompute", "loss_chunk"):
            assert not phase.pop(name)
    assert recipe.sha256 == hashlib.sha256(rfc8785.dumps(old)).hexdigest()
    hashes = {recipe.sha256, Recipe.model_validate(mixed).sha256}
    hashes.add(Recipe.model_validate({**mixed, "mask_documents": False}).sha256)
    mixed["phases"][4]["mixture"] = {"old": 1.0}
    hashes.add(Recipe.model_validate(mixed).sha256)
    assert len(hashes) == 4


def trainer(fields: Fields, bundle: Bundle, folder: Path) -> Trainer:
    feed = opened(fields, folder)
    return Trainer(recipe=feed.recipe, table=bundle.table, corpus=feed.corpus,
                   sources=feed.sources)  # fmt: skip


def test_every_step_of_a_mixture_can_be_taken_up_bit_for_bit(
    mixed: Fields, bundle: Bundle, tmp_path: Path
) -> None:
    one = trainer(mixed, bundle, tmp_path / "data")
    states = []
    for _ in range(one.recipe.steps):
        path = checkpoint.save(tmp_path / "checkpoints", one.snapshot(IDENTITY))
        loss = one.train_step().loss
        states.append(
            (path, loss, {n: p.detach().clone() for n, p in one.model.named_parameters()})
        )
    for path, loss, weights in states[::3]:
        again = trainer(mixed, bundle, tmp_path / "data")
        again.restore(checkpoint.load(path, IDENTITY))
        assert again.train_step().loss == loss
        for name, parameter in again.model.named_parameters():
            assert torch.equal(parameter, weights[name]), name
        again.close()
    one.close()


def test_masks_reach_the_model_in_training_and_evaluation(
    mixed: Fields, bundle: Bundle, tmp_path: Path
) -> None:
    masked = trainer(mixed, bundle, tmp_path / "data")
    plain = trainer({**mixed, "mask_documents": False}, bundle, tmp_path / "data")
    numbers = {step: masked.feed.at(step).documents for step in range(9)}
    step = next(s for s, n in numbers.items() if n is not None and n[:, 8].any())
    masked.step = plain.step = step  # documents begin within its sequences
    assert torch.equal(masked.batch(step), plain.batch(step))
    batch = masked.feed.at(step)
    assert batch.documents is not None
    with torch.no_grad():
        tokens, documents = torch.from_numpy(batch.tokens), torch.from_numpy(batch.documents)
        wanted = masked.model.loss(tokens, documents).item()
        without = plain.model.loss(tokens).item()
    assert abs(wanted - without) > 1e-5
    assert masked.evaluate() != plain.evaluate()
    assert masked.train_step().loss == pytest.approx(wanted, abs=1e-6)
    assert plain.train_step().loss == pytest.approx(without, abs=1e-6)
    masked.close()
    plain.close()


def test_a_source_that_fails_later_stops_the_step(
    mixed: Fields, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trainer(mixed, bundle, tmp_path / "data")
    at = one.feed.at

    def broken(step: int) -> object:
        if step == 1:
            raise OSError("the disk is gone")
        return at(step)

    monkeypatch.setattr(one.feed, "at", broken)
    one.train_step()
    with pytest.raises(OSError, match="the disk is gone"):
        one.train_step()
    assert one.step == 1
    one.close()


def test_a_run_records_its_mixture(
    mixed: Fields, files: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    bundle_path, recipe_path = files(**mixed)
    folder = train(bundle_path, recipe_path, out=tmp_path / "run", accept_unverified=True)
    assert folder is not None
    result: Any = read_json(folder / "run.json")
    mixture = result["mixture"]
    assert mixture["mask_documents"]
    assert mixture["phases"]["long"]["given"]["wiki"] == 0.2995
    assert sum(s["consumed"] for s in mixture["sources"].values()) == result["tokens"]
    assert result["epochs"] == max(s["epochs"] for s in mixture["sources"].values())
    assert "the weights of decay sum to 0.9995 and were normalized" in result["notes"]
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [r for r in map(json.loads, lines) if r["kind"] == "train"]
    assert all(0 <= r["data_wait"] <= 1 for r in records)
    assert [sum(r["data_tokens"].values()) for r in records] == [r["tokens"] for r in records]
