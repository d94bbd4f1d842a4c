"""AdamW, Muon and the hand-over: float64 oracles, exact shrinkage, state that survives."""

from __future__ import annotations

import math

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from mutransfer.apply import initialize, parametrize
from mutransfer.errors import UserError
from mutransfer.groups import param_groups
from mutransfer.optimizers import Matrix, Momentum, Optimizers
from mutransfer.roles import Role
from mutransfer.rules import BaseParams
from mutransfer.table import Multipliers, Table
from proxies.decoder import Decoder, DecoderConfig
from proxies.tables import decoder_table

BASE = BaseParams(lr=0.02, init_std=0.1, weight_decay=0.1, muon_factor=0.5)
TINY = DecoderConfig(
    d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=160, vocab_size=32
)
TABLE = decoder_table(TINY, TINY.narrow(32), BASE)


def decoder(seed: int = 0) -> Decoder:
    model = Decoder(TINY)
    initialize(model, TABLE, seed=seed)
    return model


def backward(model: Decoder, step: int) -> float:
    tokens = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(step))
    loss = model.loss(tokens)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item()


def train(model: Decoder, optimizers: Optimizers, steps: range) -> None:
    for step in steps:
        optimizers.set_lr(1 / (1 + step))
        backward(model, step)
        optimizers.step()
        optimizers.zero_grad()


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Through the bytes of a file, as a checkpoint would."""
    return safetensors.torch.load(safetensors.torch.save(tensors))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class Matrices(nn.Module):
    """A square, a tall, a wide and a very wide matrix of width `d`."""

    shapes = ((1, 1), (5, 2), (2, 5), (1, 4))

    def __init__(self, d: int) -> None:
        super().__init__()
        self.head = nn.Linear(d, 2, bias=False)
        self.maps = nn.ModuleList(
            nn.Linear(d * fan_in // 2, d * out // 2, bias=False) for out, fan_in in self.shapes
        )


def matrices_role(fqn: str, shape: tuple[int, ...]) -> Role:
    return "head" if fqn == "head.weight" else "hidden"


def matrices(name: str, d: int = 64) -> tuple[Matrices, Table]:
    model = Matrices(d)
    table = parametrize(model, Matrices(d // 4), BASE, name, role=matrices_role)
    initialize(model, table.model_copy(update={"multipliers": Multipliers()}), seed=1)
    for index, p in enumerate(model.parameters()):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(index))
    return model, table


def newton_schulz(g: Tensor) -> Tensor:
    """Five quintic iterations with Muon's published coefficients, all in float64."""
    x = g.double() / g.double().norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


def muon_updates(name: str) -> list[tuple[Tensor, Tensor, float, float]]:
    """Per hidden matrix, one step of torch's Muon on our groups: (update, gradient, lr, scale).

    The update is the change of the weight with the decay, p * (1 - lr*wd), taken out.
    """
    model, table = matrices(name)
    before = {fqn: p.detach().double() for fqn, p in model.named_parameters()}
    torch.optim.Muon(param_groups(model, table, "muon")).step()
    found = []
    for fqn, p in model.named_parameters():
        if fqn == "head.weight":
            assert torch.equal(p.double(), before[fqn])
            continue
        entry = table.row(fqn).optimizers.muon
        assert entry is not None
        assert p.grad is not None
        update = p.detach().double() - before[fqn] * (1 - entry.lr_times_weight_decay)
        found.append((update, p.grad, entry.lr, entry.scale))
    assert len(found) == 4
    return found


@pytest.mark.parametrize("name", ["completep-tied", "mup", "xmodel"])
def test_muon_takes_the_step_lr_times_scale_times_newton_schulz(name: str) -> None:
    """Against a float64 Newton-Schulz with the same coefficients.

    torch iterates in bfloat16, whose unit roundoff is 2^-9. Each of the 5 iterations rounds
    three products, and an error made early is stretched by the slope of the quintic near
    zero, so single entries differ by percents; 3% in Frobenius norm is about 15 roundoffs.
    A wrong scale would be off by far more: the scales of our shapes differ by 40% or more.
    """
    for update, gradient, lr, scale in muon_updates(name):
        expected = -lr * scale * newton_schulz(gradient)
        assert ((update - expected).norm() / expected.norm()).item() < 0.03


@pytest.mark.parametrize("name", ["completep-tied", "mup", "xmodel"])
def test_muon_scale_is_exact(name: str) -> None:
    """Newton-Schulz's rounding cancels against torch's own Muon at lr 1 on equal gradients.

    What is left is float32 rounding of weights of size 0.1: 1e-8 on each entry of an update
    whose root mean square is at least 1e-3.
    """
    for update, gradient, lr, scale in muon_updates(name):
        p = nn.Parameter(torch.zeros_like(gradient))
        p.grad = gradient
        torch.optim.Muon([p], lr=1.0, weight_decay=0.0, adjust_lr_fn="original").step()
        fan_out, fan_in = gradient.shape
        orthogonal = p.detach().double() / math.sqrt(max(1, fan_out / fan_in))
        expected = lr * scale * orthogonal
        assert ((update - expected).norm() / expected.norm()).item() < 3e-5


def test_muon_update_is_nearly_orthogonal() -> None:
    """Against the exact polar factor U V^T: singular values about 1, the same directions.

    Muon's quintic trades accuracy for speed: it leaves singular values in about [0.68, 1.13]
    where the input's are not tiny (a square Gaussian's smallest are, so only shapes with
    ratios of 2 and more are held to it), and never above 1.3.
    """
    for update, gradient, lr, scale in muon_updates("completep-tied"):
        u, _, vt = torch.linalg.svd(gradient.double(), full_matrices=False)
        values = (u.T @ (-update / (lr * scale)) @ vt.T).diagonal()
        assert values.max() < 1.3
        if max(gradient.shape) >= 2 * min(gradient.shape):
            assert values.min() > 0.6
            off = u.T @ (-update / (lr * scale)) @ vt.T - values.diag()
            assert off.norm() / values.norm() < 0.05


def test_rms_matched_updates_have_rms_of_a_fifth() -> None:
    """RMS of O is sqrt(mean s^2 / max(out, in)), so RMS of the update is 0.2 lr * rms(s)."""
    for update, _, lr, _ in muon_updates("completep-tied"):
        assert 0.8 < update.square().mean().sqrt().item() / (0.2 * lr) < 1.1


def test_unit_rms_updates_have_rms_operator_norm_lr() -> None:
    """sqrt(in/out) * ||dW||_2 = lr * s_max for every shape: what the spectral papers ask."""
    for update, _, lr, _ in muon_updates("mup"):
        fan_out, fan_in = update.shape
        norm = math.sqrt(fan_in / fan_out) * torch.linalg.matrix_norm(update, 2).item()
        assert 0.8 < norm / lr < 1.3


def test_unit_rms_groups_have_the_effective_step_and_the_shrinkage() -> None:
    """torch's `original` mode multiplies lr by sqrt(max(1, out/in)); ours must undo that."""
    model, table = matrices("mup")
    seen = 0
    for group in param_groups(model, table, "muon"):
        assert group["adjust_lr_fn"] == "original"
        for _, p in group["params"]:
            fan_out, fan_in = p.shape
            step = group["lr"] * math.sqrt(max(1, fan_out / fan_in))
            assert step == pytest.approx(0.01 * math.sqrt(fan_out / fan_in), rel=1e-14)
            assert group["lr"] * group["weight_decay"] == pytest.approx(0.02 * 0.1, rel=1e-14)
            assert group["lr"] == group["peak_lr"]
            seen += 1
    assert seen == 4


def test_rms_matched_groups_keep_their_lr() -> None:
    model, table = matrices("completep-tied")
    (group,) = param_groups(model, table, "muon")
    assert group["adjust_lr_fn"] == "match_rms_adamw"
    assert group["lr"] == group["peak_lr"] == pytest.approx(0.5 * 0.02 / 2, rel=1e-14)
    assert group["momentum"] == 0.95


@pytest.mark.parametrize("name", ["completep-tied", "completep", "mup", "xmodel-fixed", "sp"])
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_a_step_without_gradient_shrinks_equally_before_and_after_the_hand_over(
    name: str, factor: float
) -> None:
    """With zero gradients both optimizers do nothing but p * (1 - s * n * l), s the schedule."""
    table = decoder_table(TINY, TINY.narrow(32), BASE, name)
    model = Decoder(TINY)
    initialize(model, table, seed=0)
    optimizers = Optimizers(model, table)
    hidden = [p for fqn, p in model.named_parameters() if fqn.endswith(("q.weight", "down.weight"))]
    assert len(hidden) == 4
    for kind in ("adamw", "muon"):
        assert optimizers.kind == kind
        optimizers.set_lr(factor)
        before = [p.detach().clone() for p in hidden]
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizers.step()
        for p, old in zip(hidden, before, strict=True):
            torch.testing.assert_close(p, old * (1 - factor * 0.02 * 0.1), rtol=3e-7, atol=0)
        if kind == "adamw":
            optimizers.hand_over()


def test_both_parts_together_are_torch_s_adamw() -> None:
    """Splitting the parameters between two optimizers changes no bit."""
    ours, plain = decoder(), decoder()
    optimizers = Optimizers(ours, TABLE)
    oracle = torch.optim.AdamW(param_groups(plain, TABLE, "adamw"), fused=True)
    for step in range(3):
        backward(ours, step)
        backward(plain, step)
        optimizers.step()
        optimizers.zero_grad()
        oracle.step()
        oracle.zero_grad()
    assert same(ours.state_dict(), plain.state_dict())
    assert not same(ours.state_dict(), decoder().state_dict())


@pytest.mark.parametrize("matrix", ["adamw", "muon"])
def test_every_parameter_has_one_optimizer(matrix: Matrix) -> None:
    model = decoder()
    optimizers = Optimizers(model, TABLE, matrix)
    assert optimizers.kind == matrix
    held = [p for group in optimizers.groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(model.parameters()))
    aux = {fqn for group in optimizers.aux.param_groups for fqn in group["param_names"]}
    assert aux == {n for n, _ in model.named_parameters() if "norm" in n or "embedding" in n}


@pytest.mark.parametrize("momentum", ["seed", "fresh"])
def test_hand_over(momentum: Momentum) -> None:
    """Weights, loss and the auxiliary moments and steps stay; momentum is seeded or zero."""
    model = decoder()
    optimizers = Optimizers(model, TABLE)
    train(model, optimizers, range(3))
    loss = backward(model, 99)
    optimizers.zero_grad()
    before = {key: value.clone() for key, value in optimizers.state_tensors().items()}
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    aux = optimizers.aux
    optimizers.hand_over(momentum)
    assert optimizers.kind == "muon"
    assert optimizers.aux is aux
    assert backward(model, 99) == loss
    assert same(model.state_dict(), weights)
    after = optimizers.state_tensors()
    seeded = 0
    for fqn, row in TABLE.resolve(model).items():
        if row.optimizers.muon is None:
            for key in ("exp_avg", "exp_avg_sq", "step"):
                assert torch.equal(after.pop(f"{fqn}/{key}"), before[f"{fqn}/{key}"])
            assert before[f"{fqn}/step"] == 3
            continue
        buffer, first = after.pop(f"{fqn}/momentum_buffer"), before[f"{fqn}/exp_avg"]
        assert first.any()
        assert torch.equal(buffer, first if momentum == "seed" else torch.zeros_like(first))
        seeded += 1
    assert seeded == 14
    assert after == {}


def test_the_seeded_step_is_muon_s_on_the_averaged_gradient() -> None:
    """The first step after the hand-over: buffer lerp(exp_avg, g, 1 - 0.95), then Nesterov.

    A real gradient has tiny singular values, which bfloat16 cannot resolve, so the step is
    compared with torch's Newton-Schulz of that very input (momentum 0), up to float32.
    """
    model = decoder()
    optimizers = Optimizers(model, TABLE)
    train(model, optimizers, range(2))
    name = "layers.0.attention.q.weight"
    q = model.get_parameter(name)
    first = optimizers.state_tensors()[f"{name}/exp_avg"].clone()
    optimizers.hand_over()
    backward(model, 5)
    assert q.grad is not None
    gradient, before = q.grad.clone(), q.detach().double()
    optimizers.step()
    buffer = optimizers.state_tensors()[f"{name}/momentum_buffer"]
    torch.testing.assert_close(
        buffer.double(), 0.95 * first.double() + 0.05 * gradient.double(), rtol=1e-4, atol=1e-8
    )
    p = nn.Parameter(torch.zeros_like(q))
    p.grad = gradient.lerp(buffer, 0.95)
    torch.optim.Muon([p], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False).step()
    lr = 0.5 * 0.02 / math.sqrt(2)
    expected = lr * 0.2 * 8 * p.detach().double()
    update = q.detach().double() - before * (1 - 0.02 * 0.1)
    assert ((update - expected).norm() / expected.norm()).item() < 3e-5


def test_muon_makes_q_k_v_gate_and_up_orthogonal_each_by_itself() -> None:
    """Each update has the direction of its own Newton-Schulz, and not of one over q, k and v."""
    model = decoder()
    optimizers = Optimizers(model, TABLE, "muon")
    before = {fqn: p.detach().clone() for fqn, p in model.named_parameters()}
    gradients = {}
    for index, (fqn, p) in enumerate(model.named_parameters()):
        scale = 10.0 if ".q." in fqn or ".gate." in fqn else 1.0  # would rule a fused matrix
        p.grad = scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(index))
        gradients[fqn] = p.grad.clone()
    optimizers.step()

    def alignment(fqn: str, direction: Tensor) -> float:
        row = TABLE.row(fqn).optimizers.muon
        assert row is not None
        change = before[fqn] * (1 - row.lr_times_weight_decay) - model.get_parameter(fqn).detach()
        pair = change.double().flatten(), direction.flatten()
        return torch.nn.functional.cosine_similarity(*pair, dim=0).item()

    for fused in (("attention.q", "attention.k", "attention.v"), ("mlp.gate", "mlp.up")):
        names = [f"layers.1.{name}.weight" for name in fused]
        parts = [gradients[name] for name in names]
        together = newton_schulz(torch.cat(parts)).split([len(part) for part in parts])
        for name, part, shared in zip(names, parts, together, strict=True):
            assert alignment(name, newton_schulz(part)) > 0.99, name
            if name is not names[0]:  # the large one rules the fused matrix
                assert alignment(name, shared) < 0.99, name


def test_the_hand_over_happens_once() -> None:
    optimizers = Optimizers(decoder(), TABLE)
    optimizers.hand_over()
    with pytest.raises(UserError, match="on Muon already"):
        optimizers.hand_over()


def at_step_three(kind: str) -> tuple[Decoder, Optimizers]:
    """Three steps trained: on AdamW, on Muon, across the hand-over, or handed over just now."""
    model = decoder()
    optimizers = Optimizers(model, TABLE, "muon" if kind == "muon" else "adamw")
    if kind == "across":
        train(model, optimizers, range(2))
        optimizers.hand_over()
        train(model, optimizers, range(2, 3))
    else:
        train(model, optimizers, range(3))
        if kind == "just now":
            optimizers.hand_over("fresh")
    return model, optimizers


@pytest.mark.parametrize("kind", ["adamw", "muon", "across", "just now"])
def test_training_resumes_bit_for_bit(kind: str) -> None:
    model, optimizers = at_step_three(kind)
    weights, state = copies(model.state_dict()), copies(optimizers.state_tensors())
    resumed = decoder(seed=9)
    resumed.load_state_dict(weights)
    resumed_optimizers = Optimizers(resumed, TABLE, "adamw" if kind == "adamw" else "muon")
    resumed_optimizers.load_state_tensors(state)
    assert same(resumed_optimizers.state_tensors(), state)
    train(model, optimizers, range(3, 6))
    train(resumed, resumed_optimizers, range(3, 6))
    assert same(resumed.state_dict(), model.state_dict())
    assert same(resumed_optimizers.state_tensors(), optimizers.state_tensors())
    assert not same(model.state_dict(), weights)


def test_loading_copies() -> None:
    """The loaded optimizer shares no memory with what it was loaded from."""
    _, optimizers = at_step_three("adamw")
    state = copies(optimizers.state_tensors())
    other = decoder()
    second = Optimizers(other, TABLE)
    second.load_state_tensors(optimizers.state_tensors())
    train(other, second, range(3, 5))
    assert same(optimizers.state_tensors(), state)
    assert not same(second.state_tensors(), state)


@pytest.mark.parametrize(("saved", "loading"), [("adamw", "muon"), ("muon", "adamw")])
def test_the_state_of_another_optimizer_is_refused(saved: str, loading: Matrix) -> None:
    _, optimizers = at_step_three(saved)
    with pytest.raises(UserError, match=r"attention\.q\.weight/\w+: .*missing.*another optimizer"):
        Optimizers(decoder(), TABLE, loading).load_state_tensors(optimizers.state_tensors())


def test_state_that_does_not_fit_is_refused_by_name() -> None:
    _, optimizers = at_step_three("adamw")
    good = copies(optimizers.state_tensors())
    fresh = Optimizers(decoder(), TABLE)
    name = "layers.1.mlp.up.weight/exp_avg_sq"
    with pytest.raises(UserError, match=rf"^{name}: optimizer state is missing"):
        fresh.load_state_tensors({key: value for key, value in good.items() if key != name})
    with pytest.raises(UserError, match=r"another optimizer; got odd\.weight/exp_avg"):
        fresh.load_state_tensors(good | {"odd.weight/exp_avg": torch.zeros(1)})
    with pytest.raises(UserError, match=rf"^{name}: .*got \(64, 160\); expected \(160, 64\)"):
        fresh.load_state_tensors(good | {name: good[name].T.contiguous()})
    step = "norm.weight/step"
    with pytest.raises(UserError, match=rf"^{step}: .*got \(1,\); expected \(\)"):
        fresh.load_state_tensors(good | {step: good[step].reshape(1)})
    with pytest.raises(UserError, match="missing"):
        fresh.load_state_tensors({})
    fresh.load_state_tensors(good)
