"""Which module is for what, and multipliers carried by hooks: as if the model used them itself."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mutransfer.apply import Geometry, initialize, parametrize
from mutransfer.coord_measure import Recorder
from mutransfer.errors import UserError
from mutransfer.groups import param_groups
from mutransfer.modules import carry_multipliers, module_roles
from mutransfer.roles import Role
from mutransfer.rules import BaseParams
from mutransfer.symbolic import check_groups
from mutransfer.table import Multipliers, Table

TOKENS = torch.arange(12).view(2, 6) % 7
PARAMS = BaseParams(
    init_std=0.5, embedding_multiplier=3.0, output_multiplier=0.7, residual_multiplier=0.3
)


class Attention(nn.Module):
    """Scales by an attribute, as Hugging Face's do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scaling, self.head_dim = 1.0, width
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.o_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        out: Tensor = self.o_proj(F.scaled_dot_product_attention(q, k, v, scale=self.scaling))
        return out


class Foreign(nn.Module):
    """A model that knows nothing of multipliers; `head` shares the embedding where it is tied."""

    def __init__(self, width: int, *, tied: bool = True, head_first: bool = False) -> None:
        super().__init__()
        head = nn.Linear(width, 7, bias=not tied)
        if head_first:
            self.head = head
        self.embedding = nn.Embedding(7, width)
        self.attention = Attention(width)
        self.head = head
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        logits: Tensor = self.head(x + self.attention(x))
        return logits


class Native(Foreign):
    """The same, written for μP."""

    def set_multipliers(self, multipliers: Multipliers) -> None:
        self.m = multipliers
        self.attention.scaling = multipliers.attention

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) * self.m.embedding
        logits: Tensor = self.head((x + self.attention(x) * self.m.residual) * self.m.output)
        return logits


def role(fqn: str, shape: tuple[int, ...]) -> Role:
    if fqn.endswith("bias"):
        return "bias"
    ends: dict[str, Role] = {"embedding.weight": "embedding", "head.weight": "head"}
    return ends.get(fqn, "hidden_out" if "o_proj" in fqn else "hidden")


def tied_role(fqn: str, shape: tuple[int, ...]) -> Role:
    return "embedding" if fqn == "head.weight" else role(fqn, shape)


def make_table(model: nn.Module, params: BaseParams = PARAMS, **options: bool) -> Table:
    kind = tied_role if options.get("tied", True) else role
    return parametrize(model, Foreign(4, **options), params, role=kind,
                       geometry=Geometry(head_dim=8, base_head_dim=4))  # fmt: skip


@pytest.mark.parametrize("head_first", [False, True])
def test_a_tied_head_is_told_from_the_embedding(head_first: bool) -> None:
    model = Foreign(8, head_first=head_first)
    names = {name for name, _ in model.named_parameters()}
    assert ("head.weight" in names) is head_first
    assert module_roles(model, make_table(model, tied=True, head_first=head_first)) == {
        "embedding": "embedding",
        "attention.qkv": "hidden",
        "attention.o_proj": "hidden_out",
        "head": "head",
    }


def test_an_untied_head_has_its_own_role() -> None:
    model = Foreign(8, tied=False)
    roles = module_roles(model, make_table(model, tied=False))
    assert (roles["embedding"], roles["head"]) == ("embedding", "head")


def test_of_other_types_the_first_is_the_embedding() -> None:
    class Reads(nn.Linear):
        pass

    model = Foreign(8)
    model.embedding = Reads(8, 7, bias=False)  # type: ignore[assignment]
    model.head.weight = model.embedding.weight
    roles = module_roles(model, make_table(model))
    assert (roles["embedding"], roles["head"]) == ("embedding", "head")


@torch.no_grad()
def test_the_recorder_sees_logits_and_no_activation_in_a_tied_head() -> None:
    model = Foreign(8)
    table = make_table(model)
    recorder = Recorder(model, table)
    with recorder.watch() as values:
        logits = model(TOKENS)
    assert {key for key in values if "head" in key[1]} == set()
    rms = float(logits.square().mean().sqrt())
    assert values["logits", "logits"] == pytest.approx(rms, rel=1e-6)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_carried_multipliers_do_what_the_model_s_own_do(tied: bool) -> None:
    foreign, native = Foreign(8, tied=tied), Native(8, tied=tied)
    table = make_table(foreign, tied=tied)
    assert 1.0 not in dict(table.multipliers).values()
    carry_multipliers(foreign, table)
    keys = native.state_dict().keys()
    initialize(foreign, table, seed=3)
    initialize(native, table, seed=3)
    foreign.attention.o_proj.bias.fill_(0.5)
    native.attention.o_proj.bias.fill_(0.5)
    if not tied:
        foreign.head.bias.fill_(0.25)
        native.head.bias.fill_(0.25)
    expected = native(TOKENS)
    torch.testing.assert_close(foreign(TOKENS), expected)
    assert foreign.state_dict().keys() == keys, "multipliers are not saved"
    compiled = torch.compile(foreign, backend="eager")
    torch.testing.assert_close(compiled(TOKENS), expected)


@torch.no_grad()
def test_a_copy_has_multipliers_of_its_own() -> None:
    model = Foreign(8)
    table = make_table(model)
    carry_multipliers(model, table)
    initialize(model, table, seed=0)
    before = model(TOKENS)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(TOKENS), before)
    initialize(twin, make_table(model, PARAMS.model_copy(update={"output_multiplier": 7.0})),
               seed=0)  # fmt: skip
    torch.testing.assert_close(twin(TOKENS), 10 * before)
    torch.testing.assert_close(model(TOKENS), before)


def test_multiplying_twice_is_refused() -> None:
    model = Foreign(8)
    table = make_table(model)
    carry_multipliers(model, table)
    with pytest.raises(UserError, match=r"^Foreign: the model has multipliers already\. .*twice"):
        carry_multipliers(model, table)
    with pytest.raises(UserError, match=r"^Native: the model has multipliers already"):
        carry_multipliers(Native(8), table)


def test_a_multiplier_that_has_no_place_is_refused() -> None:
    class Bare(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.embedding = nn.Embedding(7, width)

        def forward(self, tokens: Tensor) -> Tensor:
            return F.linear(self.embedding(tokens), self.embedding.weight)

    plain = parametrize(Bare(4), Bare(4), BaseParams(), role=role)
    model = Bare(4)
    carry_multipliers(model, plain)
    initialize(model, plain, seed=0)
    wide = parametrize(Bare(8), Bare(4), BaseParams(), role=role)
    match = r"^Bare: no module can carry the output multiplier; got 0.5\. .*set_multipliers"
    with pytest.raises(UserError, match=match):
        carry_multipliers(Bare(8), wide)


def test_without_hooks_multipliers_would_be_lost() -> None:
    model = Foreign(8)
    with pytest.raises(UserError, match=r"^Foreign: .*would be lost.*carry_multipliers"):
        initialize(model, make_table(model), seed=0)


@pytest.mark.parametrize("name", ["embedding", "output", "residual", "attention"])
def test_the_symbolic_check_sees_a_carried_multiplier_that_is_wrong(name: str) -> None:
    model = Foreign(8)
    table = make_table(model)
    carry_multipliers(model, table)
    initialize(model, table, seed=0)
    groups = param_groups(model, table, "adamw")
    groups = [{**group, "params": [p for _, p in group["params"]]} for group in groups]
    assert check_groups(groups, table, model) == []
    if name == "attention":
        model.attention.scaling *= 2
    else:
        fqn = next(n for n, _ in model.named_buffers() if n.endswith(f".{name}_multiplier"))
        model.get_buffer(fqn).mul_(2)
    (finding,) = check_groups(groups, table, model)
    assert finding.name == f"{name}_multiplier"
    assert finding.expected is not None
    assert finding.got == pytest.approx(2 * finding.expected)
