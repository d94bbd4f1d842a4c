"""A population trains each of its members as it would train alone."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.optim import _muon

from mutransfer.errors import UserError
from mutransfer.rules import DEFAULT, PARAMETRIZATIONS, BaseParams
from proxies.data import Corpus, DataConfig, prepare
from proxies.decoder import Decoder, DecoderConfig
from proxies.population import Member, MemberState, Population
from proxies.run import Runner, RunResult, RunSpec, TrainConfig

# every matrix has more than 16 rows and columns: below, torch rounds a bfloat16 product
# differently in a batch and alone
MODEL = DecoderConfig(
    d_model=48, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=12, d_ff=64, vocab_size=256
)
BASE = MODEL.narrow(24, 1)
TRAIN = TrainConfig(
    steps=10, batch_size=2, seq_len=16, warmup=0.2, decay=0.4, rungs=2, last=2, heldout_tokens=64
)
NAMES = list(PARAMETRIZATIONS)


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


def run_of(corpus: Corpus, i: int, parametrization: str = DEFAULT, **train: Any) -> RunSpec:
    """A run that differs from those of other `i` in all that members may differ in.

    Learning rates are moderate: where they are so high that one model whose first weights are
    moved by one unit in the last place ends elsewhere, nothing could be compared to 1e-6.
    """
    params = BaseParams(
        lr=0.008 * 0.8**i, init_std=0.05 * (1 + i % 3), weight_decay=0.02 * i, beta1=0.9 - 0.02 * i,
        beta2=0.98 - 0.01 * i, eps=10.0 ** (-8 + i % 4), muon_factor=0.5 + 0.1 * i,
        muon_momentum=0.95 - 0.02 * i, embedding_multiplier=1 + 0.2 * i,
        output_multiplier=2 - 0.1 * i, residual_multiplier=1 + 0.1 * i,
        attention_multiplier=1 + 0.1 * i, embedding_lr_ratio=1 + 0.3 * i,
    )  # fmt: skip
    return RunSpec(
        model=MODEL, base=BASE, base_width=24, parametrization=parametrization, params=params,
        train=TrainConfig.model_validate({**TRAIN.model_dump(), **train}), seed=i % 3,
        data=corpus.fingerprint,
    )  # fmt: skip


def alone(
    corpus: Corpus, spec: RunSpec, dtype: torch.dtype = torch.float32
) -> tuple[RunResult, dict[str, Tensor]]:
    """The single-model trainer's result and last weights."""
    runner = Runner(corpus)
    model = Decoder(spec.model).to(dtype)
    runner._models[spec.model] = (model, model.loss)
    result = runner.run(spec)
    return result, {name: p.detach().clone() for name, p in model.named_parameters()}


def together(
    corpus: Corpus, specs: Sequence[RunSpec], dtype: torch.dtype = torch.float32
) -> tuple[list[RunResult], list[dict[str, Tensor]]]:
    """The same of a population, in the order of `specs`."""
    population = Population(corpus, specs, dtype=dtype)
    members = list(population.members)
    while not all(member.done for member in members):
        population.advance()
    weights = [population.state(member).tensors for member in members]
    return [population.result(member) for member in members], weights


def measured(result: RunResult) -> dict[str, Any]:
    """All of a result but the time it took."""
    return result.model_dump(exclude={"seconds"})


def assert_close(corpus: Corpus, specs: Sequence[RunSpec], rel: float) -> None:
    """Losses and weights of every run in float64, together and alone."""
    results, weights = together(corpus, specs, torch.float64)
    for spec, result, ours in zip(specs, results, weights, strict=True):
        expected, theirs = alone(corpus, spec, torch.float64)
        assert expected.loss is not None
        assert result.loss == pytest.approx(expected.loss, rel=rel)
        assert (result.key, result.tokens, result.epochs) == (
            expected.key, expected.tokens, expected.epochs)  # fmt: skip
        for (step, loss), (step_alone, loss_alone) in zip(
            result.evaluations, expected.evaluations, strict=True
        ):
            assert step == step_alone
            assert loss == pytest.approx(loss_alone, rel=rel), spec.parametrization
        for name, weight in theirs.items():
            gap = (ours[name] - weight).norm() / weight.norm()
            assert gap <= rel, (spec.parametrization, name)


def every_parametrization(corpus: Corpus, steps: int, handover: bool) -> list[RunSpec]:
    return [
        run_of(corpus, i, name, steps=steps, rungs=3, handover=handover)
        for i, name in enumerate(NAMES)
    ]


# --- float64, 300 steps, 1e-6


@pytest.mark.parametrize("handover", [False, True])
def test_float64_every_parametrization(corpus: Corpus, handover: bool) -> None:
    _require_equal_products(handover)
    assert_close(corpus, every_parametrization(corpus, 40, handover), 1e-6)


@pytest.mark.parametrize("handover", [False, True])
def test_float64_over_300_steps(corpus: Corpus, handover: bool) -> None:
    _require_equal_products(handover)
    specs = [run_of(corpus, i, steps=300, rungs=3, handover=handover) for i in (1, 4)]
    assert_close(corpus, specs, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("handover", [False, True])
def test_float64_every_parametrization_over_300_steps(corpus: Corpus, handover: bool) -> None:
    _require_equal_products(handover)
    assert_close(corpus, every_parametrization(corpus, 300, handover), 1e-6)


@pytest.mark.slow
def test_float64_through_the_hand_over_without_bfloat16(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every machine, as no product is rounded to bfloat16; see `_require_equal_products`."""
    settings = ((3.4445, -4.7750, 2.0315), 5, 1e-7)

    def orthogonalize(
        grad: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
    ) -> Tensor:
        x = grad if len(grad) <= grad.shape[1] else grad.T
        x = x / x.norm().clamp(min=eps)
        for _ in range(steps):
            gram = x @ x.T
            a, b, c = coefficients
            x = a * x + (b * gram + c * gram @ gram) @ x
        out: Tensor = x if len(grad) <= grad.shape[1] else x.T
        return out

    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", orthogonalize)
    monkeypatch.setattr(
        "mutransfer.stacked_optimizers.newton_schulz",
        lambda updates: torch.stack([orthogonalize(u, *settings) for u in updates]),
    )
    assert_close(corpus, every_parametrization(corpus, 300, True), 1e-6)


def _require_equal_products(handover: bool) -> None:
    """Muon rounds to bfloat16 fifteen times a step: one product that is rounded the other way
    moves a weight by far more than 1e-6, so the test needs a machine that computes products in
    a batch as it computes them alone."""
    draw = torch.Generator().manual_seed(0)
    for rows, columns in ((48, 48), (24, 48), (48, 64)) if handover else ():
        x = torch.randn(100, rows, columns, generator=draw).bfloat16()
        gram = x @ x.mT
        same = torch.equal(gram, torch.stack([m @ m.T for m in x])) and torch.equal(
            torch.baddbmm(x, gram, x, beta=2.0),
            torch.stack([torch.addmm(m, g, m, beta=2.0) for m, g in zip(x, gram, strict=True)]),
        )
        if not same:
            pytest.skip("this machine rounds bfloat16 products differently in a batch and alone")


# --- float32


@pytest.mark.parametrize(
    ("steps", "handover"), [(10, False), pytest.param(60, True, marks=pytest.mark.slow)]
)
def test_float32_gap_is_at_most_that_of_the_thread_count(
    corpus: Corpus, steps: int, handover: bool
) -> None:
    specs = [run_of(corpus, i, steps=steps, handover=handover) for i in range(2)]
    results, _ = together(corpus, specs)
    for spec, result in zip(specs, results, strict=True):
        first, _ = alone(corpus, spec)
        torch.set_num_threads(2)
        second, _ = alone(corpus, spec)
        torch.set_num_threads(1)
        for (_, ours), (_, one), (_, two) in zip(
            result.evaluations, first.evaluations, second.evaluations, strict=True
        ):
            ulp = math.ldexp(one, -23)  # no two sums need agree to less
            assert abs(ours - one) <= max(abs(two - one), ulp)


# --- members apart


def trained(
    corpus: Corpus,
    specs: Sequence[RunSpec],
    disturb: Any = lambda population, members, evaluated: None,
) -> tuple[list[Member], Population]:
    """Trains these to their ends; `disturb` is called after every evaluation."""
    population = Population(corpus, specs)
    members = list(population.members)
    while population.members:
        if evaluated := population.advance():
            disturb(population, members, evaluated)
    return members, population


@pytest.mark.parametrize("handover", [False, True])
def test_a_member_that_diverges_leaves_the_others_bits(corpus: Corpus, handover: bool) -> None:
    specs = [run_of(corpus, i, handover=handover) for i in range(3)]
    calm, _ = trained(corpus, specs)
    population = Population(corpus, specs)
    one, ill, other = population.members
    with torch.no_grad():
        population._model.get_parameter("layers.1.mlp.up.weight")[1, 3, 3] = torch.nan
    evaluated = population.advance()
    assert evaluated == [one, ill, other]
    assert (ill.diverged_at, ill.evaluations, ill.done) == (5, [], True)
    result = population.result(ill)
    assert (result.loss, result.diverged_at, result.tokens) == (None, 5, 5 * 32)
    while population.members:
        population.advance()
    assert one.evaluations == calm[0].evaluations
    assert other.evaluations == calm[2].evaluations


def test_a_member_that_blows_up_by_itself_is_the_single_trainer_s(corpus: Corpus) -> None:
    wild = run_of(corpus, 1)
    params = wild.params.model_copy(update={"lr": 10.0, "embedding_lr_ratio": 1e4})
    specs = [run_of(corpus, 0), wild.model_copy(update={"params": params}), run_of(corpus, 2)]
    for spec, result in zip(specs, together(corpus, specs)[0], strict=True):
        expected, _ = alone(corpus, spec)
        assert (result.diverged_at, result.tokens) == (expected.diverged_at, expected.tokens)
        assert (result.loss is None) == (spec is specs[1])


@pytest.mark.parametrize("handover", [False, True])
def test_members_come_and_go_and_the_others_keep_their_bits(corpus: Corpus, handover: bool) -> None:
    """Newcomers have step counts of their own, so both optimizers are in the stack at once."""
    specs = [run_of(corpus, i, handover=handover) for i in range(4)]
    late = [run_of(corpus, i, "sp", handover=handover) for i in (4, 5, 6)]
    calm, _ = trained(corpus, specs)
    joined: list[Member] = []

    def disturb(population: Population, members: list[Member], evaluated: list[Member]) -> None:
        at = evaluated[0].step
        if at == 5 and not joined:
            assert evaluated == members
            joined.extend(population.exchange([members[1], members[2]], late[:1]))
            assert population.members == [members[0], joined[0], members[3]]
        elif at == 9 and len(joined) == 1:
            assert [m.step for m in population.members] == [9, 4, 9]
            joined.extend(population.exchange((), late[1:]))
            assert [m.step for m in population.members] == [9, 4, 9, 0, 0]

    members, population = trained(corpus, specs, disturb)
    assert population.members == []
    for i in (0, 3):
        assert members[i].evaluations == calm[i].evaluations
    for i in (1, 2):
        assert members[i].evaluations == calm[i].evaluations[:1]
    for member, spec in zip(joined, late, strict=True):
        assert member.spec is spec
        expected, _ = alone(corpus, spec)
        got = population.result(member)
        assert [step for step, _ in got.evaluations] == [5, 9, 10]
        assert got.loss == pytest.approx(expected.loss, rel=1e-5)
        assert measured(got)["epochs"] == measured(expected)["epochs"]


def test_an_empty_population_can_be_filled_again(corpus: Corpus) -> None:
    specs = [run_of(corpus, i) for i in range(3)]
    population = Population(corpus, specs[:1])
    population.exchange(population.members)
    assert population.advance() == []
    joined = population.exchange((), specs)
    while population.members:
        population.advance()
    calm, _ = trained(corpus, specs)
    assert [m.evaluations for m in joined] == [m.evaluations for m in calm]


@pytest.mark.parametrize("handover", [False, True])
@pytest.mark.parametrize("at", [5, 9])
def test_a_member_goes_on_elsewhere_as_if_it_had_not_stopped(
    corpus: Corpus, handover: bool, at: int
) -> None:
    """Before and after the hand-over at step 6; among others, and by itself."""
    specs = [run_of(corpus, i, handover=handover) for i in range(3)]
    whole, _ = trained(corpus, specs)
    population = Population(corpus, specs)
    while population.members[1].step < at:
        population.advance()
    state = population.state(population.members[1])
    tensors = safetensors.torch.load(safetensors.torch.save(state.tensors))
    population.advance()  # the state is a copy
    state = MemberState(
        spec=RunSpec.model_validate_json(state.spec.model_dump_json()),
        evaluations=state.evaluations, seconds=state.seconds, tensors=tensors,
    )  # fmt: skip
    for company in ([], [run_of(corpus, 7, "mup", handover=handover)]):
        other = Population(corpus, [run_of(corpus, 6, "sp", handover=handover), *company])
        (member,) = other.exchange([other.members[0]], [state])
        assert (member.step, other.members[0]) == (at, member)
        while not member.done:
            other.advance()
        assert member.evaluations == whole[1].evaluations


def test_run_keeps_the_stack_full(corpus: Corpus) -> None:
    specs = [run_of(corpus, i) for i in range(6)]
    asked: list[tuple[str, int]] = []

    def prune(spec: RunSpec, step: int, loss: float) -> bool:
        asked.append((spec.key, step))
        assert math.isfinite(loss)
        return spec is specs[1] or (spec is specs[3] and step == 9)

    population = Population(corpus, specs[:2])
    results = {result.key: result for result in population.run(specs[2:], prune)}
    assert results.keys() == {specs[i].key for i in (0, 2, 4, 5)}
    assert [step for key, step in asked if key == specs[1].key] == [5]
    assert [step for key, step in asked if key == specs[3].key] == [5, 9]
    for i in (0, 2, 4, 5):
        expected, _ = alone(corpus, specs[i])
        got = results[specs[i].key]
        assert got.loss == pytest.approx(expected.loss, rel=1e-5)
        assert got.seconds > 0


# --- compiled, and in bfloat16


@pytest.mark.parametrize("handover", [False, True])
def test_a_compiled_stack_keeps_its_size_until_half_of_it_has_left(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, handover: bool
) -> None:
    """Copies fill it up, which change nothing; every size is compiled once."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    specs = [run_of(corpus, i, handover=handover) for i in range(6)]
    calm, _ = trained(corpus, specs)
    population = Population(corpus, specs[:5], compile=True)
    sizes, kept = [], population.members[4]
    for leaving in (1, 1, 1):
        population.exchange(population.members[:leaving])
        sizes.append(population._size)
        population.step()
    (joined,) = population.exchange([], specs[5:])
    sizes.append(population._size)
    while population.members:
        population.advance()
    assert sizes == [5, 5, 2, 3]
    for member, expected in ((kept, calm[4]), (joined, calm[5])):  # up to the order of sums
        assert member.evaluations == [
            (step, pytest.approx(loss, rel=1e-5)) for step, loss in expected.evaluations
        ]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4, "5, 2, 3 and, alone, 1"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_compiled_for_real_it_trains_the_same(corpus: Corpus) -> None:
    specs = [run_of(corpus, i, handover=True) for i in range(3)]
    calm, _ = trained(corpus, specs)
    population = Population(corpus, specs, compile=True)
    members = list(population.members)
    while population.members:
        population.advance()
    for member, expected in zip(members, calm, strict=True):
        assert member.evaluations == [
            (step, pytest.approx(loss, rel=1e-4)) for step, loss in expected.evaluations
        ]


def test_bfloat16_is_that_of_the_single_trainer(corpus: Corpus) -> None:
    """Passes alone are in bfloat16; apart from rounding, both trainers do the same."""
    specs = [run_of(corpus, i, precision="bf16") for i in range(3)]
    calm, population = trained(corpus, specs)
    wide, _ = trained(corpus, [run_of(corpus, i) for i in range(3)])
    for row, (spec, member) in enumerate(zip(specs, calm, strict=True)):
        single, _ = alone(corpus, spec)
        assert member.evaluations == [
            (step, pytest.approx(loss, abs=0.01)) for step, loss in single.evaluations
        ]
        assert member.evaluations != wide[row].evaluations
    assert {p.dtype for p in population._model.parameters()} == {torch.float32}


# --- refusals


def test_what_does_not_belong_is_refused(corpus: Corpus) -> None:
    spec = run_of(corpus, 0)
    with pytest.raises(UserError, match="needs members"):
        Population(corpus, [])
    population = Population(corpus, [spec])
    before = {name: p.detach().clone() for name, p in population._model.named_parameters()}
    for changed, words in (
        ({"data": "f" * 64}, "another corpus"),
        ({"rules_version": 9}, "another version"),
        ({"model": MODEL.narrow(24)}, "one shape"),
        ({"train": TRAIN.model_copy(update={"steps": 11})}, "one shape"),
    ):
        other = spec.model_copy(update=changed)
        with pytest.raises(UserError, match=words):
            Population(corpus, [spec, other])
        with pytest.raises(UserError, match=words):
            population.exchange(population.members, [other])
    assert all(torch.equal(p, before[n]) for n, p in population._model.named_parameters())
    state = population.state(population.members[0])
    del state.tensors["norm.weight"]
    with pytest.raises(UserError, match="missing"):
        population.exchange(population.members, [state])
