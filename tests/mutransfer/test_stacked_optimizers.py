"""Stacked AdamW and Muon against torch's, member by member."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import _muon

from mutransfer.apply import initialize, parametrize
from mutransfer.errors import UserError
from mutransfer.newton_schulz import newton_schulz
from mutransfer.optimizers import Momentum, Optimizers
from mutransfer.roles import Role
from mutransfer.rules import PARAMETRIZATIONS, BaseParams
from mutransfer.stacked_optimizers import StackedOptimizers
from mutransfer.table import Multipliers, Table

NAMES = list(PARAMETRIZATIONS)
FACTORS = (0.25, 1.0, 0.8, 0.6, 0.3, 0.1)


class Net(nn.Module):
    """Hidden matrices of three shapes, two of them alike; a head, and gains."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(d)
        self.tall = nn.Linear(d, 2 * d, bias=False)
        self.square = nn.Linear(d, d, bias=False)
        self.wide = nn.Linear(2 * d, d, bias=False)
        self.other = nn.Linear(d, d, bias=False)
        self.head = nn.Linear(d, 5, bias=False)


def role(fqn: str, shape: tuple[int, ...]) -> Role:
    return {"norm.weight": "gain", "head.weight": "head"}.get(fqn, "hidden")  # type: ignore[return-value]


def table_of(i: int) -> Table:
    """Every setting differs between the members."""
    params = BaseParams(
        lr=0.01 * (1 + i), init_std=0.1, weight_decay=0.3 * i, beta1=0.95 - 0.1 * i,
        beta2=0.99 - 0.05 * i, eps=10.0 ** (-3 - i), muon_factor=0.5 + i,
        muon_momentum=0.9 - 0.1 * i,
    )  # fmt: skip
    table = parametrize(Net(32), Net(16), params, NAMES[i % len(NAMES)], role=role)
    return table.model_copy(update={"multipliers": Multipliers()})


class Pair:
    """The same members twice: in one stack, and alone."""

    def __init__(self, members: int = 3, dtype: torch.dtype = torch.float64) -> None:
        self.models = [Net(32).to(dtype) for _ in range(members)]
        self.tables = [table_of(i) for i in range(members)]
        for i, (model, table) in enumerate(zip(self.models, self.tables, strict=True)):
            initialize(model, table, seed=i)
        self.optimizers = [Optimizers(m, t) for m, t in zip(self.models, self.tables, strict=True)]
        self.stack = Net(32).to(dtype)
        for name, p in self.stack.named_parameters():
            p.data = torch.stack([m.get_parameter(name).detach() for m in self.models])
        self.stacked = StackedOptimizers(self.stack, Net(32), self.tables)

    def give_gradients(self, step: int) -> None:
        """Of another size for each member and step."""
        draw = torch.Generator().manual_seed(step)
        for name, p in self.stack.named_parameters():
            size = torch.arange(1, len(p) + 1).view(-1, *[1] * (p.dim() - 1)) * 0.03
            p.grad = (torch.randn(p.shape, generator=draw) * size).to(p.dtype)
            for i, model in enumerate(self.models):
                model.get_parameter(name).grad = p.grad[i].clone()

    def step(self, step: int, clip: float | None = None, factor: float = 1.0) -> None:
        self.give_gradients(step)
        factors = [factor * 0.9**i for i in range(len(self.models))]
        self.stacked.set_lr(factors)
        self.stacked.step(clip)
        self.stacked.zero_grad()
        for each, model, optimizers in zip(factors, self.models, self.optimizers, strict=True):
            optimizers.set_lr(each)
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizers.step()
            optimizers.zero_grad()

    def gap(self) -> float:
        """The largest difference between a member's weight here and there, over its size."""
        gaps = [0.0]
        for name, p in self.stack.named_parameters():
            for i, model in enumerate(self.models):
                own = model.get_parameter(name).detach()
                gaps.append(((p.detach()[i] - own).norm() / own.norm()).item())
        return max(gaps)


def float64_newton_schulz(
    grad: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """torch's orthogonalization in float64: no rounding to bfloat16 that hides or makes gaps."""
    a, b, c = coefficients
    x = grad.double() if len(grad) <= len(grad.T) else grad.double().T
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    out: Tensor = x if len(grad) <= len(grad.T) else x.T
    return out


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the rounding to bfloat16 out of both Muons."""
    settings = ((3.4445, -4.7750, 2.0315), 5, 1e-7)
    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", float64_newton_schulz)
    monkeypatch.setattr(
        "mutransfer.stacked_optimizers.newton_schulz",
        lambda updates: torch.stack([float64_newton_schulz(u, *settings) for u in updates]),
    )


@pytest.mark.parametrize("clip", [None, 0.5])
def test_adamw_is_torch_s(clip: float | None) -> None:
    pair = Pair(members=len(NAMES))
    for step, factor in enumerate(FACTORS):
        pair.step(step, clip, factor)
    assert pair.gap() < 1e-13
    for i, optimizers in enumerate(pair.optimizers):
        ours, theirs = pair.stacked.state_tensors(i), optimizers.state_tensors()
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-12, atol=1e-18)
            assert ours[key].dtype == value.dtype


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("momentum", ["seed", "fresh"])
def test_the_hand_over_is_that_of_the_single_optimizers(momentum: Momentum) -> None:
    """Members go over one after another, so the stack has both kinds for a while."""
    pair = Pair(members=len(NAMES))
    for step in range(len(NAMES) + 3):
        rows = [step - 1] if 1 <= step <= len(NAMES) else []
        pair.stacked.hand_over(rows, momentum)
        for row in rows:
            pair.optimizers[row].hand_over(momentum)
        pair.step(step, 0.5, 1 / (1 + step))
        assert pair.stacked.on_muon.sum() == min(step, len(NAMES))
        assert pair.gap() < 1e-13
    for i, optimizers in enumerate(pair.optimizers):
        ours, theirs = pair.stacked.state_tensors(i), optimizers.state_tensors()
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-12, atol=1e-18)


def test_muon_from_the_first_step_on() -> None:
    tables = [table_of(i) for i in range(2)]
    pair = Pair(2)
    stacked = StackedOptimizers(pair.stack, Net(32), tables, matrix="muon")
    pair.optimizers = [Optimizers(m, t, "muon") for m, t in zip(pair.models, tables, strict=True)]
    pair.stacked = stacked
    assert stacked.on_muon.all()
    for step in range(3):
        pair.step(step)
    assert pair.gap() < 1e-4  # a bfloat16 that is rounded the other way is worth more than 1e-6


@pytest.mark.parametrize("shape", [(32, 32), (24, 48), (48, 24), (16, 32), (4, 4), (1, 8)])
def test_newton_schulz_is_torch_s_up_to_bfloat16(shape: tuple[int, int]) -> None:
    updates = torch.randn(64, *shape, generator=torch.Generator().manual_seed(0))
    updates[0] = 0
    settings = ((_muon.DEFAULT_A, _muon.DEFAULT_B, _muon.DEFAULT_C), 5, _muon.EPS)
    ours = newton_schulz(updates)
    theirs = torch.stack([_muon._zeropower_via_newtonschulz(u, *settings) for u in updates])
    assert ours.dtype == theirs.dtype == torch.bfloat16
    gap = (ours - theirs).float().flatten(1).norm(dim=1)
    assert (gap <= 2**-7 * theirs.float().flatten(1).norm(dim=1)).all()
    exact = torch.stack([float64_newton_schulz(u, *settings) for u in updates[1:]])
    far = (exact - updates[1:]).flatten(1).norm(dim=1)
    assert ((exact - ours[1:]).flatten(1).norm(dim=1) < 0.1 * far).all()


def test_single_precision_steps_have_the_bits_of_the_fused_optimizer() -> None:
    """As long as nothing is clipped: which norm is added up first may be the machine's choice."""
    if not torch.backends.mkl.is_available():
        pytest.skip("the rounding of torch's fused AdamW is known for x86 only")
    pair = Pair(dtype=torch.float32)
    for step, factor in enumerate(FACTORS):
        pair.step(step, None, factor)
    assert pair.gap() == 0


def test_a_gradient_that_is_not_finite_stays_with_its_member() -> None:
    one, two = Pair(dtype=torch.float32), Pair(dtype=torch.float32)
    for pair in (one, two):
        pair.step(0, 1.0)
        pair.stacked.hand_over([1, 2])
        pair.give_gradients(1)
    for p in two.stack.parameters():
        assert p.grad is not None
        p.grad[1].flatten()[0] = torch.nan
    for pair in (one, two):
        pair.stacked.step(1.0)
    for name, p in one.stack.named_parameters():
        other = two.stack.get_parameter(name)
        assert torch.equal(p[[0, 2]], other[[0, 2]])
        assert not other[1].isfinite().any(), "clipping spreads it over the whole member"


def test_select_moves_copies_and_drops_members() -> None:
    pair = Pair()
    pair.step(0)
    pair.stacked.hand_over([2])
    pair.optimizers[2].hand_over()
    pair.step(1)
    before = {name: p.detach().clone() for name, p in pair.stack.named_parameters()}
    states = [{k: v.clone() for k, v in pair.stacked.state_tensors(i).items()} for i in range(3)]
    order = [2, 0, 2, 0]
    pair.stacked.select(order)
    for name, p in pair.stack.named_parameters():
        assert torch.equal(p, before[name][order])
        assert p.grad is None
    for row, i in enumerate(order):
        now = pair.stacked.state_tensors(row)
        assert now.keys() == states[i].keys()
        assert all(torch.equal(now[key], states[i][key]) for key in now)
    assert pair.stacked.on_muon.tolist() == [True, False, True, False]
    pair.models = [pair.models[2], pair.models[0]]
    pair.optimizers = [pair.optimizers[2], pair.optimizers[0]]
    pair.stacked.select([0, 1])
    pair.step(2)
    assert pair.gap() < 1e-4, "each still has its own settings"


def test_state_goes_from_a_stack_to_a_single_model_and_back() -> None:
    for handed in (False, True):
        pair = Pair()
        pair.step(0)
        if handed:
            pair.stacked.hand_over([1])
            pair.optimizers[1].hand_over()
        pair.step(1)
        state = {k: v.clone() for k, v in pair.stacked.state_tensors(1).items()}
        alone = Optimizers(pair.models[1], pair.tables[1], "muon" if handed else "adamw")
        alone.load_state_tensors(state)
        assert all(torch.equal(v, state[k]) for k, v in alone.state_tensors().items())
        pair.stacked.reset(0, pair.tables[1])
        assert pair.stacked.state_tensors(0) == {}
        pair.stacked.load_state_tensors(0, alone.state_tensors())
        again = pair.stacked.state_tensors(0)
        assert again.keys() == state.keys()
        assert all(torch.equal(again[key], state[key]) for key in state)
        assert (pair.stacked.steps[0], pair.stacked.on_muon[0]) == (2, handed)


def test_states_that_do_not_fit_are_refused() -> None:
    pair = Pair()
    pair.step(0)
    state = {k: v.clone() for k, v in pair.stacked.state_tensors(1).items()}
    name = "tall.weight/exp_avg"
    for change, words in (
        ({name: None}, "missing"),
        ({name: torch.zeros(2, 2)}, "another shape"),
        ({"other/exp_avg": torch.zeros(2)}, "belongs to another"),
        ({"tall.weight/step": torch.tensor(7.0)}, "different numbers of steps"),
        ({"tall.weight/momentum_buffer": torch.zeros(64, 32)}, "missing"),
    ):
        broken = {k: v for k, v in {**state, **change}.items() if v is not None}
        pair.stacked.reset(0, pair.tables[0])
        with pytest.raises(UserError, match=words):
            pair.stacked.load_state_tensors(0, broken)


def test_the_hand_over_happens_once() -> None:
    pair = Pair()
    pair.stacked.hand_over([1])
    with pytest.raises(UserError, match="already"):
        pair.stacked.hand_over([0, 1])
    assert pair.stacked.on_muon.tolist() == [False, True, False]
