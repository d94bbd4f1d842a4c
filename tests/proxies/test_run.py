"""One proxy run: what names it, what it computes, and how it ends badly."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

import proxies.run
from mutransfer.apply import initialize
from mutransfer.errors import UserError
from mutransfer.rules import BaseParams
from proxies.data import Batches, Corpus, DataConfig, heldout_batches, prepare
from proxies.decoder import Decoder, DecoderConfig
from proxies.run import Pruned, Runner, RunResult, RunSpec, TrainConfig
from proxies.tables import decoder_table

MODEL = DecoderConfig(
    d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=160, vocab_size=256
)
BASE = MODEL.narrow(32)
TRAIN = TrainConfig(
    steps=10, batch_size=4, seq_len=16, warmup=0.2, decay=0.4, rungs=2, last=2, heldout_tokens=256
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """20 kB of words in a random order."""
    draw, folder = random.Random(0), tmp_path_factory.mktemp("corpus")
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 6))) for _ in range(40)]
    (folder / "text.txt").write_text(" ".join(draw.choices(words, k=4500)), encoding="utf-8")
    return prepare(DataConfig(train=(str(folder / "text.txt"),)), folder / "data")


@pytest.fixture
def spec(corpus: Corpus) -> RunSpec:
    """A run of ten steps."""
    return RunSpec(
        model=MODEL, base=BASE, base_width=32, params=BaseParams(lr=0.01, weight_decay=0.1),
        train=TRAIN, seed=3, data=corpus.fingerprint,
    )  # fmt: skip


def change(spec: RunSpec, **fields: Any) -> RunSpec:
    """A copy with fields replaced; `train__steps` is a field of `train`."""
    record = spec.model_dump()
    for name, value in fields.items():
        place = record
        *above, last = name.split("__")
        for part in above:
            place = place[part]
        place[last] = value
    return RunSpec.model_validate(record)


def measured(result: RunResult) -> dict[str, Any]:
    """All of a result but the time it took."""
    return result.model_dump(exclude={"seconds"})


# --- the name of a run


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    else:
        yield path, value


def other(path: tuple[str, ...], value: Any) -> Any:
    """Another value that the field allows."""
    special = {
        "decay_shape": "linear", "momentum": "fresh", "parametrization": "mup", "data": "other",
        "n_heads": 8, "head_dim": 32, "clip_norm": None,
        "precision": "bf16",
    }  # fmt: skip
    if path[-1] in special:
        return special[path[-1]]
    if path[-1] == "n_kv_heads":
        return 3 - value  # 1 or 2
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else value * 0.99 + 1e-9


def test_the_key_depends_on_every_field(spec: RunSpec) -> None:
    fields = list(leaves(spec.model_dump(mode="json")))
    assert {path[0] for path, _ in fields} == set(RunSpec.model_fields)
    for part, schema in (("train", TrainConfig), ("params", BaseParams), ("model", DecoderConfig)):
        assert {path[1] for path, _ in fields if path[0] == part} == set(schema.model_fields)
    keys = [spec.key]
    for path, value in fields:
        keys.append(change(spec, **{"__".join(path): other(path, value)}).key)
    assert len(set(keys)) == len(keys) == 1 + len(fields)


def test_the_key_is_stable(spec: RunSpec) -> None:
    assert RunSpec.model_validate(spec.model_dump()).key == spec.key
    record = json.loads(spec.model_dump_json())
    turned = {key: record[key] for key in reversed(record)}
    assert RunSpec.model_validate_json(json.dumps(turned, indent=3)).key == spec.key
    # by hand: sorted keys, no spaces, whole floats without a point
    plain = change(spec, params__eps=0.001, model__norm_eps=0.001, base__norm_eps=0.001)

    def as_javascript(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: as_javascript(item) for key, item in value.items()}
        whole = isinstance(value, float) and value.is_integer()
        return int(value) if whole else value

    text = json.dumps(
        as_javascript(plain.model_dump(mode="json")), sort_keys=True, separators=(",", ":")
    )
    assert plain.key == hashlib.sha256(text.encode()).hexdigest()


# --- TrainConfig


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({"steps": 100, "rungs": 4, "last": 3}, (25, 50, 75, 98, 99, 100)),
        ({"steps": 1000, "rungs": 2, "last": 3}, (500, 980, 990, 1000)),
        ({"steps": 12, "rungs": 2, "last": 1}, (6, 12)),
        ({"steps": 10, "rungs": 1, "last": 4}, (7, 8, 9, 10)),
        ({"steps": 4, "rungs": 4, "last": 1}, (1, 2, 3, 4)),
        ({"steps": 2, "rungs": 4, "last": 3}, (1, 2)),
        ({"steps": 3, "rungs": 100, "last": 20}, (1, 2, 3)),
    ],
)
def test_evaluate_after(fields: dict[str, int], steps: tuple[int, ...]) -> None:
    assert TrainConfig(**fields).evaluate_after == steps


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("steps", (2, 10**7), (1, 10**7 + 1, 2.5)),
        ("batch_size", (1, 2**20), (0, 2**20 + 1)),
        ("seq_len", (2, 2**20), (1, 2**20 + 1)),
        ("warmup", (0, 0.8), (-0.01, 0.81, 1.01, math.nan)),
        ("decay", (0, 0.9), (-0.01, 0.91, 1.01, math.inf)),
        ("final_lr", (0, 1), (-0.01, 1.01)),
        ("decay_shape", ("linear", "cosine"), ("exponential",)),
        ("momentum", ("seed", "fresh"), ("none",)),
        ("clip_norm", (None, 1e-9), (0, -1, math.nan)),
        ("rungs", (1, 100), (0, 101)),
        ("last", (1, 20), (0, 21)),
        ("heldout_tokens", (1,), (0,)),
        ("unknown", (), (1,)),
    ],
)
def test_boundaries(field: str, good: tuple[Any, ...], bad: tuple[Any, ...]) -> None:
    for value in good:
        assert getattr(TrainConfig.model_validate({field: value}), field) == value
    for value in bad:
        with pytest.raises(ValidationError):
            TrainConfig.model_validate({field: value})


def test_warmup_and_decay_may_fill_the_run() -> None:
    assert TrainConfig(warmup=0.5, decay=0.5).schedule.decay_start(10) == 5
    with pytest.raises(ValidationError, match=r"warmup \+ decay must be at most 1; got 0.6 \+ 0.5"):
        TrainConfig(warmup=0.6, decay=0.5)


def test_a_hand_over_needs_a_decay_to_start_with() -> None:
    TrainConfig(steps=10, handover=True, decay=0.1)
    for decay in (0.0, 0.04):  # 0.04 of ten steps is none
        with pytest.raises(ValidationError, match="there is no decay"):
            TrainConfig(steps=10, handover=True, decay=decay)


def test_derived_values() -> None:
    assert (TRAIN.batch_tokens, TRAIN.horizon_tokens) == (64, 640)
    with pytest.raises(ValidationError, match="seed"):
        RunSpec(model=MODEL, base=BASE, base_width=32, seed=-1, data="")
    with pytest.raises(ValidationError, match="base_width"):
        RunSpec(model=MODEL, base=BASE, base_width=0, data="")


# --- training


def shape_by_hand(step: int) -> float:
    """The schedule of `TRAIN`: two steps up, four at the peak, four down to zero."""
    if step < 2:
        return (step + 1) / 2
    return 1.0 if step < 6 else 2 * 0.5 ** ((step - 5) / 4) - 1


def test_training_is_that_of_a_plain_torch_loop(corpus: Corpus, spec: RunSpec) -> None:
    result = Runner(corpus).run(spec)

    table = decoder_table(MODEL, BASE, spec.params, spec.parametrization, base_width=32)
    model = Decoder(MODEL)
    initialize(model, table, seed=3)
    peaks = {name: table.row(name).optimizers.adamw for name, _ in model.named_parameters()}
    assert len({entry.lr for entry in peaks.values()}) > 1
    optimizer = torch.optim.AdamW(
        [
            {"params": [p], "lr": peaks[name].lr, "eps": peaks[name].eps,
             "betas": peaks[name].betas, "weight_decay": peaks[name].weight_decay}
            for name, p in model.named_parameters()
        ],
        foreach=False,
    )  # fmt: skip
    batches = Batches(corpus.train, seq_len=16, batch_size=4, seed=3)
    heldout = heldout_batches(corpus.heldout, seq_len=16, batch_size=4, max_tokens=256)
    assert len(heldout) == 4
    evaluations = {}
    for step in range(10):
        for group, entry in zip(optimizer.param_groups, peaks.values(), strict=True):
            group["lr"] = entry.lr * shape_by_hand(step)
        tokens = torch.from_numpy(batches.at(step))
        logits = model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.reshape(-1, 256), tokens[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.double().pow(2).sum()) for p in model.parameters()))
        for p in model.parameters():
            p.grad.mul_(min(1.0, 1.0 / norm))
        optimizer.step()
        with torch.no_grad():
            losses = [model.loss(torch.from_numpy(batch)).item() for batch in heldout]
        evaluations[step + 1] = sum(losses) / 4
    assert [step for step, _ in result.evaluations] == [5, 9, 10]
    for step, loss in result.evaluations:
        assert loss == pytest.approx(evaluations[step], rel=1e-5)
    assert result.loss == pytest.approx((evaluations[9] + evaluations[10]) / 2, rel=1e-5)
    assert evaluations[10] < evaluations[5] < math.log(256)
    assert (result.key, result.diverged_at, result.tokens) == (spec.key, None, 640)
    assert result.epochs == pytest.approx(640 / corpus.train_tokens)


def test_what_the_result_depends_on(corpus: Corpus, spec: RunSpec) -> None:
    runner = Runner(corpus)
    first = runner.run(spec)
    for field, value in (
        ("seed", 4), ("params__lr", 0.02), ("params__weight_decay", 0.0),
        ("train__clip_norm", None), ("train__decay", 0.0), ("train__warmup", 0.0),
        ("train__final_lr", 0.5), ("parametrization", "sp"), ("base_width", 16),
        ("params__attention_multiplier", 3.0), ("params__output_multiplier", 2.0),
    ):  # fmt: skip
        assert runner.run(change(spec, **{field: value})).evaluations != first.evaluations, field


def test_equal_specs_give_equal_bits(corpus: Corpus, spec: RunSpec) -> None:
    first = Runner(corpus).run(spec)
    again = Runner(corpus).run(RunSpec.model_validate_json(spec.model_dump_json()))
    assert measured(again) == measured(first)


def test_a_reused_model_remembers_nothing(corpus: Corpus, spec: RunSpec) -> None:
    """Neither weights, multipliers and gradients, nor what a run that ended badly left."""
    handed = change(spec, train__handover=True)
    fresh = [measured(Runner(corpus).run(s)) for s in (spec, handed)]
    runner = Runner(corpus)
    model, _ = runner._model(MODEL)
    assert measured(runner.run(spec)) == fresh[0]
    loud = {f"params__{name}_multiplier": 5.0 for name in ("embedding", "output", "attention")}
    runner.run(change(spec, seed=9, **loud))
    assert measured(runner.run(spec)) == fresh[0]
    assert runner.run(change(spec, params__lr=10.0, params__embedding_lr_ratio=1e4)).loss is None
    with pytest.raises(Pruned):
        runner.run(handed, lambda step, loss: True)
    assert measured(runner.run(handed)) == fresh[1]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    assert measured(runner.run(spec)) == fresh[0]
    runner.run(change(spec, model=BASE.model_dump()))
    assert runner._model(MODEL)[0] is model
    assert measured(runner.run(spec)) == fresh[0]


def test_hand_over(corpus: Corpus, spec: RunSpec) -> None:
    """Nothing differs until the decay starts, after step 6; then Muon has the matrices."""
    runner = Runner(corpus)
    spec = change(spec, train__rungs=10)
    plain, handed = (dict(runner.run(s).evaluations) for s in (
        spec, change(spec, train__handover=True)))  # fmt: skip
    same = [step for step in plain if plain[step] == handed[step]]
    assert same == [1, 2, 3, 4, 5, 6]
    assert handed[10] < handed[6]
    fresh = change(spec, train__handover=True, train__momentum="fresh")
    assert dict(runner.run(fresh).evaluations)[10] != handed[10]


def test_report_sees_every_evaluation_and_prunes(corpus: Corpus, spec: RunSpec) -> None:
    seen: list[tuple[int, float]] = []

    def at(stop: int | None, step: int, loss: float) -> bool:
        seen.append((step, loss))
        return step == stop

    runner = Runner(corpus)
    result = runner.run(spec, lambda step, loss: at(None, step, loss))
    assert tuple(seen) == result.evaluations
    for stop, count in ((5, 1), (9, 2), (10, 3)):
        seen.clear()
        with pytest.raises(Pruned):
            runner.run(spec, lambda step, loss, stop=stop: at(stop, step, loss))
        assert tuple(seen) == result.evaluations[:count]


def test_a_short_run_averages_what_it_has(corpus: Corpus, spec: RunSpec) -> None:
    """Two evaluations are all that two steps allow; a third that is not there is no zero."""
    result = Runner(corpus).run(change(spec, train__steps=2, train__last=3, train__rungs=4))
    (_, one), (_, two) = result.evaluations
    assert result.loss == pytest.approx((one + two) / 2)
    assert result.loss > 3


# --- bad ends


def test_a_diverged_run_has_no_loss(corpus: Corpus, spec: RunSpec) -> None:
    result = Runner(corpus).run(change(spec, params__lr=10.0, params__embedding_lr_ratio=1e4))
    assert result.loss is None
    assert result.diverged_at is not None
    assert result.tokens == result.diverged_at * 64
    assert RunResult.model_validate_json(result.model_dump_json()) == result


def test_a_loss_above_that_of_a_guess_is_divergence(corpus: Corpus, spec: RunSpec) -> None:
    """Finite to the end, and yet worse than ln(vocabulary)."""
    bad = change(spec, params__init_std=3.0, params__lr=1e-6, params__output_multiplier=20.0)
    result = Runner(corpus).run(bad)
    assert all(math.log(256) < loss < 1e6 for _, loss in result.evaluations)
    assert (result.loss, result.diverged_at, result.tokens) == (None, 10, 640)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_there(
    corpus: Corpus, spec: RunSpec, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    original, calls = proxies.run._mean_loss, []

    def mean_loss(*arguments: Any) -> float:
        calls.append(1)
        return value if len(calls) == 2 else original(*arguments)

    monkeypatch.setattr(proxies.run, "_mean_loss", mean_loss)
    reported: list[int] = []
    result = Runner(corpus).run(spec, lambda step, loss: bool(reported.append(step)))
    assert (result.loss, result.diverged_at) == (None, 9)
    assert (len(calls), reported) == (2, [5])
    assert [step for step, _ in result.evaluations] == [5]
    assert result.tokens == 9 * 64
    assert result.epochs == pytest.approx(9 * 64 / corpus.train_tokens)


def test_weights_that_are_not_finite_are_noticed(
    corpus: Corpus, spec: RunSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By way of the real evaluation: one infinite gradient at step 3 is enough."""
    original = nn.utils.clip_grad_norm_
    steps: list[int] = []

    def clip(parameters: Any, norm: float) -> torch.Tensor:
        parameters = list(parameters)
        steps.append(1)
        if len(steps) == 3:
            parameters[0].grad[0, 0] = math.inf
        return original(parameters, norm)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", clip)
    result = Runner(corpus).run(spec)
    assert (result.loss, result.diverged_at, len(steps)) == (None, 5, 5)


def test_another_corpus_and_another_vocabulary_are_refused(
    corpus: Corpus, spec: RunSpec, tmp_path: Path
) -> None:
    runner = Runner(corpus)
    with pytest.raises(UserError, match="another corpus") as error:
        runner.run(change(spec, data="f" * 64))
    assert (error.value.got, error.value.expected) == ("f" * 64, corpus.fingerprint)
    with pytest.raises(UserError, match="differ in vocabulary") as error:
        runner.run(change(spec, model__vocab_size=300, base__vocab_size=300))
    assert (error.value.got, error.value.expected) == (300, 256)
    assert runner._models == {}, "nothing was built"


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("parametrization", "mup2", "unknown parametrization"),
        ("base__d_ff", 81, "d_ff"),
        ("train__seq_len", 4096, "seq_len|shorter|longer"),
        ("train__batch_size", 2**20, "text"),
        ("train__heldout_tokens", 1, "held-out"),
    ],
)
def test_what_cannot_be_run_is_the_users_error(
    corpus: Corpus, spec: RunSpec, field: str, value: object, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        Runner(corpus).run(change(spec, **{field: value}))
