"""What the check measures: every value against a direct computation."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mutransfer.apply import initialize, parametrize
from mutransfer.coord_measure import (
    Recorder,
    Values,
    causal_logits,
    module_pattern,
    operator_norm,
    typical,
    weight_values,
)
from mutransfer.errors import UserError
from mutransfer.roles import Role
from mutransfer.rules import BaseParams
from mutransfer.table import Table

VOCAB, SEQ = 7, 5


class Core(nn.Module):
    """Attention without a softmax; the attribute is how a core of one's own is told."""

    is_attention_core = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.repeat_interleave(2, dim=-3).transpose(-2, -1)).tril() @ v


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 2 * width, bias=False)
        self.core = Core()
        self.gain = nn.LayerNorm(width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split((x.shape[-1], x.shape[-1] // 2, x.shape[-1] // 2), dim=-1)
        heads = [part.unflatten(-1, (-1, 2)).transpose(-3, -2) for part in (q, k)]
        v = v.unflatten(-1, (-1, 2)).transpose(-3, -2).repeat_interleave(2, dim=-3)
        mixed = self.core(*heads, v)
        out: Tensor = x + self.gain(mixed.transpose(-3, -2).flatten(-2))
        return out


class Small(nn.Module):
    """Two blocks, a bare layer that is called twice, an untied head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.twice = nn.ModuleList([nn.Linear(width, width, bias=False)])
        self.head = nn.Linear(width, VOCAB, bias=False)
        self.output = 1.0

    def set_multipliers(self, multipliers: Any) -> None:
        self.output = multipliers.output

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        x = self.twice[0](self.twice[0](x))
        logits: Tensor = self.head(x * self.output)
        return logits


def role(fqn: str, shape: tuple[int, ...]) -> Role:
    if len(shape) == 1:
        return "gain"
    ends: dict[str, Role] = {"embedding.weight": "embedding", "head.weight": "head"}
    return ends.get(fqn, "hidden")


@pytest.fixture
def model() -> Small:
    small = Small()
    initialize(small, make_table(small), seed=0)
    return small


def make_table(model: nn.Module, base: nn.Module | None = None) -> Table:
    return parametrize(model, base or Small(4), BaseParams(init_std=1.0), "mup", role=role)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(VOCAB, (3, SEQ), generator=torch.Generator().manual_seed(0))


def rms(*tensors: Tensor) -> float:
    """The geometric mean of the tensors' root mean squares."""
    logs = [0.5 * math.log(float(x.double().square().mean())) for x in tensors]
    return math.exp(sum(logs) / len(logs))


def outputs(model: Small, tokens: Tensor) -> dict[tuple[str, str], list[Tensor]]:
    """Every tensor that the recorder should see, computed by hand."""
    x = model.embedding(tokens)
    seen: dict[tuple[str, str], list[Tensor]] = {("activation", "embedding"): [x]}
    for block in model.blocks:
        qkv = block.qkv(x)
        q, k = qkv[..., :8].unflatten(-1, (4, 2)), qkv[..., 8:12].unflatten(-1, (2, 2))
        pairs = [q[b, i, h] @ k[b, j, h // 2] for b in range(len(tokens)) for h in range(4)
                 for i in range(SEQ) for j in range(i + 1)]  # fmt: skip
        seen.setdefault(("attention_logits", "blocks.*.core"), []).append(torch.stack(pairs))
        y = block(x)
        seen.setdefault(("activation", "blocks.*.qkv"), []).append(qkv)
        seen.setdefault(("activation", "blocks.*.gain"), []).append(y - x)
        seen.setdefault(("residual", "blocks.*"), []).append(y)
        x = y
    seen["activation", "twice.*"] = [once := model.twice[0](x)]
    seen["activation", "twice.* (call 2)"] = [x := model.twice[0](once)]
    logits = model.head(x * model.output)
    seen["logits", "logits"] = [logits]
    own = torch.nn.functional.one_hot(tokens, VOCAB).bool()
    seen["logits", "self-token logits"] = [logits[own]]
    seen["logits", "other-token logits"] = [logits[~own]]
    return seen


def watch(recorder: Recorder, model: nn.Module, tokens: Tensor) -> Values:
    with recorder.watch() as values:
        model(tokens)
    return values


@torch.no_grad()
def test_every_value_equals_a_direct_computation(model: Small, tokens: Tensor) -> None:
    recorder = Recorder(model, make_table(model), tokens)
    assert recorder.head_dim is None
    first, seen = watch(recorder, model, tokens), outputs(model, tokens)
    assert first.keys() == seen.keys()
    for key, tensors in seen.items():
        if key[0] == "attention_logits":
            deviations = [x - x.mean() for x in tensors]
            assert first[key] == pytest.approx(rms(*deviations), rel=1e-5)
        else:
            assert first[key] == pytest.approx(rms(*tensors), rel=1e-5), key
    assert recorder.head_dim == 2


@torch.no_grad()
def test_changes_are_those_since_the_first_pass(model: Small, tokens: Tensor) -> None:
    recorder = Recorder(model, make_table(model), tokens)
    watch(recorder, model, tokens)
    before = outputs(model, tokens)
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):  # the second time, still against the first
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        values = watch(recorder, model, tokens)
        after = outputs(model, tokens)
        assert len(values) == 2 * len(before)
        for (kind, name), tensors in after.items():
            moved = [x - y for x, y in zip(tensors, before[kind, name], strict=True)]
            change = values[f"delta_{kind}", name]
            assert change == pytest.approx(rms(*moved), rel=1e-4), (kind, name)


@torch.no_grad()
def test_an_unchanged_model_has_no_change(model: Small, tokens: Tensor) -> None:
    recorder = Recorder(model, make_table(model), tokens)
    first, again = (watch(recorder, model, tokens) for _ in range(2))
    deltas = {key: value for key, value in again.items() if key[0].startswith("delta_")}
    assert len(deltas) == len(first)
    assert set(deltas.values()) == {0.0}


def test_without_tokens_logits_stay_together(model: Small, tokens: Tensor) -> None:
    values = watch(Recorder(model, make_table(model)), model, tokens)
    assert [name for kind, name in values if kind == "logits"] == ["logits"]


def test_the_model_carries_hooks_only_while_watched(model: Small, tokens: Tensor) -> None:
    recorder = Recorder(model, make_table(model), tokens)

    def hooked() -> int:
        return sum(len(module._forward_hooks) for module in model.modules())

    assert hooked() == 0
    with recorder.watch():
        assert hooked() == 11  # the model, embedding, twice; per block itself, qkv, core, gain
        model(tokens)
    assert hooked() == 0
    with pytest.raises(ZeroDivisionError), recorder.watch():
        raise ZeroDivisionError
    assert hooked() == 0


def test_watching_changes_neither_outputs_nor_gradients(model: Small, tokens: Tensor) -> None:
    recorder = Recorder(model, make_table(model), tokens)
    plain = model(tokens)
    plain.square().mean().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]  # type: ignore[union-attr]
    model.zero_grad()
    with recorder.watch():
        watched = model(tokens)
    watched.square().mean().backward()
    assert torch.equal(watched, plain)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)  # type: ignore[arg-type]


def test_a_compiled_model_is_refused(model: Small) -> None:
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(UserError, match=r"^Trainable\.model: the model is compiled.*before torch"):
        Recorder(compiled, make_table(model))  # type: ignore[arg-type]


def test_another_batch_is_refused(model: Small, tokens: Tensor) -> None:
    recorder = Recorder(model, make_table(model))
    watch(recorder, model, tokens)
    match = r"^embedding: output changes its shape.*got \(2, 5, 8\); expected \(3, 5, 8\).*fixed"
    with pytest.raises(UserError, match=match):
        watch(recorder, model, tokens[:2])


def test_tokens_of_another_shape_are_refused(model: Small, tokens: Tensor) -> None:
    recorder = Recorder(model, make_table(model), tokens[:, 1:])
    match = r"^Trainable\.tokens: tokens do not belong.*got \(3, 4\); expected \(3, 5\)"
    with pytest.raises(UserError, match=match):
        watch(recorder, model, tokens)


def test_an_attention_core_that_hides_q_and_k_is_refused(model: Small, tokens: Tensor) -> None:
    recorder = Recorder(model, make_table(model))
    core, x = model.blocks[0].core, torch.ones(1, 4, SEQ, 2)
    match = r"^blocks\.0\.core: .*got 1 arguments by position"
    with pytest.raises(UserError, match=match), recorder.watch():
        core(x, k=x[:, ::2], v=x)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: (x, None),
        lambda x: [x],
        lambda x: SimpleNamespace(logits=x),
        lambda x: ((x, 1), 2),
    ],
)
def test_logits_are_found_in_what_models_return(wrap: Any, tokens: Tensor) -> None:
    class Wrapped(Small):
        def forward(self, tokens: Tensor) -> Any:
            return wrap(super().forward(tokens))

    model = Wrapped()
    table = make_table(model, Wrapped(4))
    initialize(model, table, seed=0)
    logits = Small.forward(model, tokens)
    values = watch(Recorder(model, table), model, tokens)
    assert values["logits", "logits"] == pytest.approx(rms(logits.detach()), rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_model_that_blows_up_is_still_measured(model: Small, tokens: Tensor, bad: float) -> None:
    recorder = Recorder(model, make_table(model))
    watch(recorder, model, tokens)
    with torch.no_grad():
        model.head.weight.fill_(bad)
    values = watch(recorder, model, tokens)
    assert not math.isfinite(values["logits", "logits"])
    assert not math.isfinite(values["delta_logits", "logits"])
    assert values["delta_activation", "embedding"] == 0


@pytest.mark.parametrize(("heads", "kv_heads", "lead"), [(4, 4, ()), (4, 2, (3,)), (6, 1, (2, 3))])
def test_causal_logits_equal_a_loop(heads: int, kv_heads: int, lead: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(*lead, heads, 5, 3, generator=generator)
    k = torch.randn(*lead, kv_heads, 5, 3, generator=generator)
    got = causal_logits(q, k)
    assert got.shape == (*lead, heads, 15)
    flat_q, flat_k = q.reshape(-1, heads, 5, 3), k.reshape(-1, kv_heads, 5, 3)
    expected = [
        float(flat_q[b, h, i] @ flat_k[b, h // (heads // kv_heads), j])
        for b in range(len(flat_q))
        for h in range(heads)
        for i in range(5)
        for j in range(i + 1)
    ]
    assert got.flatten().tolist() == pytest.approx(expected, abs=1e-6)


def near(shape: tuple[int, int], *singular: float) -> Tensor:
    """A matrix with these singular values, then zeros, along random directions; float64."""
    u, v = (
        torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(n)).double())[0]
        for n in shape
    )
    some = torch.tensor(singular, dtype=torch.float64)
    return u[:, : len(some)] * some @ v[:, : len(some)].T


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24), (1, 9), (9, 1), (256, 96)])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e9, 1e30])
def test_operator_norm_against_torch_in_float64(shape: tuple[int, int], scale: float) -> None:
    matrix = scale * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    sigma = float(torch.linalg.matrix_norm(matrix.double(), ord=2))
    expected = math.sqrt(shape[1] / shape[0]) * sigma
    assert operator_norm(matrix) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shape", [(96, 96), (240, 96), (96, 240)])
@pytest.mark.parametrize(
    "singular",
    [
        (1.0,),  # rank 1
        (1.0, 1.0, 1.0),
        (1.0, 1 - 1e-7, 1 - 1e-6, 1 - 1e-4),
        (1.0, *[1e-6] * 95),
        tuple(1 - 1e-5 * i for i in range(96)),  # near Muon's: all alike
        tuple(0.8**i for i in range(96)),
    ],
)
def test_operator_norm_does_not_depend_on_the_gap_below(
    shape: tuple[int, int], singular: tuple[float, ...]
) -> None:
    """Iterations would stall where singular values lie close; rounding to fp32 is all there is."""
    expected = math.sqrt(shape[1] / shape[0]) * max(singular)
    assert operator_norm(near(shape, *singular).float()) == pytest.approx(expected, rel=1e-5)


def test_operator_norm_of_signs_in_few_columns() -> None:
    """As the first update of a layer whose inputs are mostly zero; fp32 alone does not converge."""
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        matrix = torch.zeros(256, 256)
        signs = torch.randint(0, 2, (256, 18), generator=generator) * 2.0 - 1
        matrix[:, torch.randperm(256, generator=generator)[:18]] = signs
        expected = float(torch.linalg.matrix_norm(matrix.double(), 2))
        assert operator_norm(matrix) == pytest.approx(expected, rel=1e-5)


def test_operator_norm_of_a_map_that_keeps_the_rms_is_one() -> None:
    """It is the largest ratio of the RMS of the output to that of the input."""
    assert operator_norm(torch.eye(6)) == pytest.approx(1)
    tall = torch.cat([torch.eye(3), torch.eye(3)])
    assert operator_norm(tall) == pytest.approx(1)
    assert operator_norm(torch.ones(4, 16)) == pytest.approx(16)


def test_operator_norm_of_nothing_and_of_what_is_no_number() -> None:
    assert operator_norm(torch.zeros(3, 4)) == 0
    for bad in (math.nan, math.inf):
        matrix = torch.ones(3, 4)
        matrix[1, 1] = bad
        assert operator_norm(matrix) == math.inf


@torch.no_grad()
def test_weights_and_how_far_they_moved(model: Small) -> None:
    table = make_table(model)
    first = {fqn: p.clone() for fqn, p in model.named_parameters()}
    initial = weight_values(model, first, table.resolve(model), initial=True)
    assert {kind for kind, _ in initial} == {"weight"}
    assert {name for _, name in initial} == {row.pattern for row in table.rows}
    qkv = [first[f"blocks.{i}.qkv.weight"] for i in range(2)]
    assert initial["weight", "blocks.*.qkv.weight"] == pytest.approx(rms(*qkv), rel=1e-6)
    assert initial["weight", "blocks.*.gain.weight"] == 1

    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    later = weight_values(model, first, table.resolve(model), initial=False)
    moved = {fqn: p - first[fqn] for fqn, p in model.named_parameters()}
    changes = [moved[f"blocks.{i}.qkv.weight"] for i in range(2)]
    name = "blocks.*.qkv.weight"
    assert later["update", name] == pytest.approx(rms(*changes), rel=1e-5)
    norms = [math.log(operator_norm(change)) for change in changes]
    assert later["update_norm", name] == pytest.approx(math.exp(sum(norms) / 2), rel=1e-5)
    assert later["update_ratio", name] == pytest.approx(rms(*changes) / rms(*qkv), rel=1e-5)
    assert later["update", "embedding.weight"] == pytest.approx(
        rms(moved["embedding.weight"]), rel=1e-5
    )
    hidden = {"blocks.*.qkv.weight", "twice.*.weight"}
    for kind in ("update_norm", "update_ratio"):
        assert {name for found, name in later if found == kind} == hidden
    assert {name for found, name in later if found == "update"} == {
        row.pattern for row in table.rows
    }


@torch.no_grad()
def test_zero_weights_have_updates_and_no_ratio(model: Small) -> None:
    table = make_table(model)
    model.twice[0].weight.zero_()
    first = {fqn: p.clone() for fqn, p in model.named_parameters()}
    model.twice[0].weight += 1.0
    later = weight_values(model, first, table.resolve(model), initial=False)
    assert later["update", "twice.*.weight"] == 1
    assert ("update_ratio", "twice.*.weight") not in later
    assert later["update", "head.weight"] == 0


def test_layers_pool_geometrically_and_one_bad_layer_shows() -> None:
    key = ("update", "x")
    assert typical({key: [1.0, 100.0]}) == {key: pytest.approx(10)}
    assert typical({key: [0.0, 100.0]}) == {key: 0.0}
    assert math.isnan(typical({key: [1.0, math.nan, 0.0]})[key])
    assert typical({key: [1.0, math.inf]}) == {key: math.inf}


@pytest.mark.parametrize(
    ("name", "pattern"),
    [("layers.3", "layers.*"), ("layers.12.mlp.up", "layers.*.mlp.up"), ("head", "head"),
     ("net.0.1", "net.*.*"), ("layer2.up", "layer2.up")],
)  # fmt: skip
def test_module_patterns(name: str, pattern: str) -> None:
    assert module_pattern(name) == pattern
