"""The coordinate check and torch.compile: measured as if not compiled, or refused clearly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mutransfer.apply import initialize, parametrize
from mutransfer.coord_check import Trainable, coord_check
from mutransfer.coord_measure import Recorder, Values
from mutransfer.errors import UserError
from mutransfer.groups import param_groups
from mutransfer.roles import Role
from mutransfer.rules import BaseParams
from mutransfer.table import Multipliers

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo reads it

WIDTHS, TOKENS = (8, 16, 32), torch.arange(48).view(8, 6) * 5 % 11


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(x).relu()


class Model(nn.Module):
    """Two blocks; with `tied` the same one twice."""

    def __init__(self, width: int, *, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        block = Block(width)
        self.blocks = nn.ModuleList([block, block if tied else Block(width)])
        self.head = nn.Linear(width, 11, bias=False)

    def set_multipliers(self, multipliers: Multipliers) -> None:
        self.output = multipliers.output

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x * self.output)
        return logits


def role(fqn: str, shape: tuple[int, ...]) -> Role:
    ends: dict[str, Role] = {"embedding.weight": "embedding", "head.weight": "head"}
    return ends.get(fqn, "hidden")


Loss = Callable[[], Tensor]


def trainable(
    width: int, seed: int, compiled: Callable[[Model, Loss], Loss], *, tied: bool = False
) -> Trainable:
    """A model with the loss that `compiled` makes of it and of its plain loss."""
    model = Model(width, tied=tied)
    table = parametrize(model, Model(8, tied=tied), BaseParams(lr=2**-5, init_std=0.3), "mup",
                        role=role)  # fmt: skip
    initialize(model, table, seed=seed)

    def loss() -> Tensor:
        return F.cross_entropy(model(TOKENS[:, :-1]).flatten(0, 1), TOKENS[:, 1:].flatten())

    return Trainable(
        model=model,
        optimizer=torch.optim.AdamW(param_groups(model, table, "adamw")),
        loss=compiled(model, loss),
        table=table,
        tokens=TOKENS[:, :-1],
    )


def plain(model: Model, loss: Loss) -> Loss:
    return loss


def compiled_loss(model: Model, loss: Loss) -> Loss:
    return torch.compile(loss, backend="eager")


def compiled_and_run(model: Model, loss: Loss) -> Loss:
    """Traced before any hook is there; later hooks would be ignored without a word."""
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    compiled()
    return compiled


def compiled_beside(model: Model, loss: Loss) -> Loss:
    """The loss runs what torch.compile returned; the check is given the model inside it."""
    compiled = torch.compile(model, backend="eager")
    return lambda: F.cross_entropy(
        compiled(TOKENS[:, :-1]).flatten(0, 1), TOKENS[:, 1:].flatten()
    )  # fmt: skip


def in_place(model: Model, loss: Loss) -> Loss:
    model.compile(backend="eager")
    loss()
    return loss


def in_place_inside(model: Model, loss: Loss) -> Loss:
    model.blocks[1].compile(backend="eager")  # type: ignore[no-untyped-call]
    loss()
    return loss


WAYS = [compiled_loss, compiled_and_run, compiled_beside, in_place, in_place_inside]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_model_is_measured_as_if_it_were_not(
    way: Callable[[Model, Loss], Loss],
) -> None:
    """Every value of every step: hooks fire, and the compiled steps between them train."""
    expected, got = (
        coord_check(lambda w, s: trainable(w, s, kind), WIDTHS, seeds=1, steps=4)  # noqa: B023
        for kind in (plain, way)
    )
    key = ["kind", "name", "t", "width", "seed"]
    both = expected.frame.merge(got.frame, on=key, validate="1:1")
    assert len(both) == len(expected.frame) == len(got.frame)
    assert {"logits", "activation", "residual", "delta_logits"} <= set(both.kind)
    assert both.value_y.tolist() == pytest.approx(both.value_x.tolist(), rel=1e-4)


def test_outside_the_measured_passes_it_runs_compiled() -> None:
    """Else the check would train what the user does not."""
    runs: list[bool] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            runs.append(True)
            return graph(*arguments)

        return run

    built = trainable(8, 0, lambda model, loss: torch.compile(loss, backend=backend))
    recorder = Recorder(built.model, built.table)
    built.loss()
    assert len(runs) == 1
    watch(recorder, built.loss)
    assert len(runs) == 1
    built.loss()
    assert len(runs) == 2


def test_the_wrapper_of_a_model_is_refused() -> None:
    built = trainable(8, 0, plain)
    whole = torch.compile(built.model, backend="eager")
    match = (
        r"^Trainable\.model: the model is compiled, .*got OptimizedModule\. Return the model as it "
        r"was before torch\.compile; loss\(\) may run the compiled one"
    )
    with pytest.raises(UserError, match=match):
        Recorder(whole, built.table)  # type: ignore[arg-type]


def test_the_wrapper_of_a_part_is_refused_by_its_name() -> None:
    built = trainable(8, 0, plain)
    blocks = built.model.blocks
    blocks[1] = torch.compile(blocks[1], backend="eager")  # type: ignore[index, operator]
    with pytest.raises(UserError, match=r"^Trainable\.model\.blocks\.1: the model is compiled"):
        Recorder(built.model, built.table)


def watch(recorder: Recorder, loss: Loss) -> Values:
    with torch.no_grad(), recorder.watch() as values:
        loss()
    return values


def test_a_loss_that_runs_another_model_is_refused() -> None:
    """As of an export or a copy: nothing that the check could see."""
    built = trainable(8, 0, plain)
    twin = copy.deepcopy(built.model)
    match = r"^Trainable\.loss: loss\(\) ran nothing of the model.*got 0 outputs; expected some\. "
    with pytest.raises(UserError, match=match):
        watch(Recorder(built.model, built.table), lambda: twin(TOKENS))


def test_a_loss_that_runs_less_than_at_first_is_refused() -> None:
    built = trainable(8, 0, plain)
    recorder, model = Recorder(built.model, built.table), built.model
    assert len(watch(recorder, lambda: model(TOKENS))) == 4
    match = (
        r"^Trainable\.loss: loss\(\) ran less of the model.*got 1 outputs, without blocks\.0\.up; "
        r"expected 6, as before\. "
    )
    with pytest.raises(UserError, match=match):
        watch(recorder, lambda: model.embedding(TOKENS))  # type: ignore[operator]
    assert len(watch(recorder, lambda: model(TOKENS))) == 8


def test_the_same_block_twice_is_measured_at_each_call() -> None:
    built = trainable(8, 0, plain, tied=True)
    recorder, model = Recorder(built.model, built.table), built.model
    values = watch(recorder, lambda: model(TOKENS))
    with torch.no_grad():
        x = model.embedding(TOKENS)  # type: ignore[operator]
        for call in ("", " (call 2)"):
            up = model.blocks[0].up(x)  # type: ignore[index, operator, union-attr]
            x = x + up.relu()
            for kind, name, tensor in (("activation", "blocks.*.up", up),
                                       ("residual", "blocks.*", x)):  # fmt: skip
                rms = float(tensor.square().mean().sqrt())
                assert values[kind, name + call] == pytest.approx(rms, rel=1e-6)
    result = coord_check(
        lambda width, seed: trainable(width, seed, plain, tied=True), WIDTHS, seeds=2, steps=2
    )
    judged = {q.name for q in result.quantities if q.kind == "residual"}
    assert judged == {"blocks.*", "blocks.* (call 2)"}
    assert [q.sentence for q in result.quantities if q.verdict == "FAIL"] == []
