"""The Python API on a model that is not ours: the one in `examples/`, checked over widths."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mutransfer import coord_check, param_groups, parametrize
from mutransfer.apply import initialize
from mutransfer.coord_check import CoordCheckResult, Trainable
from mutransfer.coord_plot import coord_check_figure
from mutransfer.optimizers import Optimizers
from mutransfer.roles import RoleFunction
from mutransfer.rules import BaseParams

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_model.py"
WIDTHS, CONTEXT = (32, 64, 128, 256), 4
PARAMS = BaseParams(lr=2**-7, init_std=0.1, embedding_multiplier=3.0, output_multiplier=2.0)

Break = Callable[[nn.Module, float], object]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("own_model", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(
    example: ModuleType,
    name: str = "completep-tied",
    *,
    optimizer: str = "torch",
    widths: tuple[int, ...] = WIDTHS,
    role: RoleFunction | None = None,
    damage: Break = lambda model, m: None,
    own_tokens: bool = False,
) -> CoordCheckResult:
    """The check as a user writes it, with a slip for the user to make."""

    def build(width: int) -> nn.Module:
        model: nn.Module = example.NextByte(width=width, context=CONTEXT, n_layers=2)
        return model

    def factory(width: int, seed: int) -> Trainable:
        model = build(width)
        table = parametrize(model, build(32), PARAMS, name, role=role or example.role)
        initialize(model, table, seed=seed)
        damage(model, width / 32)
        generator = torch.Generator().manual_seed(seed)
        text = torch.randint(256, (64, CONTEXT + 1), generator=generator)

        def loss() -> Tensor:
            return F.cross_entropy(model(text[:, :-1]), text[:, -1])

        return Trainable(
            model=model,
            optimizer=torch.optim.AdamW(param_groups(model, table, "adamw"))
            if optimizer == "torch"
            else Optimizers(model, table, "muon"),
            loss=loss,
            table=table,
            tokens=text[:, -2] if own_tokens else None,
        )

    return coord_check(factory, widths, seeds=2, steps=4)


@pytest.mark.parametrize("optimizer", ["torch", "muon"])
@pytest.mark.parametrize("name", ["completep-tied", "mup"])
def test_a_right_model_of_one_s_own_has_no_fault(
    example: ModuleType, name: str, optimizer: str
) -> None:
    result = run(example, name, optimizer=optimizer)
    assert [q.sentence for q in result.quantities if q.verdict == "FAIL"] == []
    assert result.symbolic == ()
    assert result.optimizer == ("adamw" if optimizer == "torch" else "muon")
    kinds = {(q.kind, q.name) for q in result.quantities}
    assert {name for kind, name in kinds if kind == "activation"} == {
        "embedding", "mix", "up.*", "down.*"
    }  # fmt: skip
    assert ("logits", "logits") in kinds
    assert not {kind for kind, _ in kinds} & {"residual", "attention_logits"}
    assert "no module that shows its queries and keys" in result.summary()
    json.dumps(result.to_json(), allow_nan=False)
    coord_check_figure(result)


def test_its_standard_parametrization_fails(example: ModuleType) -> None:
    result = run(example, "sp", widths=(32, 64, 128))
    assert result.verdict == "FAIL"
    assert result.symbolic == ()
    assert result.culprits[0].startswith("first updates of mix, up.*, down.* scale as width^+0.00")
    assert result.culprits[0].endswith("the learning rate is not divided by the width")


def test_tokens_of_a_model_that_predicts_one_position(example: ModuleType) -> None:
    result = run(example, widths=(32, 64, 128), own_tokens=True)
    names = {q.name: q.verdict for q in result.quantities if q.kind == "logits"}
    assert names == {"self-token logits": "PASS", "other-token logits": "PASS"}
    assert result.verdict != "FAIL"


def forget_output_multiplier(model: nn.Module, m: float) -> None:
    multipliers = model.multipliers
    model.set_multipliers(multipliers.model_copy(update={"output": multipliers.output * m}))  # type: ignore[operator]


def default_init(model: nn.Module, m: float) -> None:
    """torch's own, drawn after ours: uniform with a variance of 1/(3 fan-in)."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()


def freeze_the_mixing(model: nn.Module, m: float) -> None:
    model.mix.requires_grad_(False)  # type: ignore[operator, union-attr]


@pytest.mark.parametrize(
    ("damage", "first", "in_any"),
    [
        (
            forget_output_multiplier,
            "logits at init scale as width^+0.",
            "the output multiplier is not divided by the width",
        ),
        (default_init, "init std of mix.weight is", "initial weights of head scale as width^-0.5"),
        (
            freeze_the_mixing,
            "mix.weight is frozen (requires_grad is False)",
            "first updates of mix: nothing moves it",
        ),
    ],
)
def test_what_a_user_may_get_wrong_is_named(
    example: ModuleType, damage: Break, first: str, in_any: str
) -> None:
    result = run(example, widths=(32, 64, 128), damage=damage)
    assert result.verdict == result.measured_verdict == "FAIL"
    assert result.culprits[0].startswith(first)
    assert any(in_any in line for line in result.culprits)


def test_a_wrong_role_shows_in_the_activations(example: ModuleType) -> None:
    """Table and groups agree with each other, and are both wrong: only the slopes can tell."""

    def role(name: str, shape: tuple[int, ...]) -> str:
        return "embedding" if name == "mix.weight" else example.role(name, shape)

    result = run(example, widths=(32, 64, 128), role=role)  # type: ignore[arg-type]
    assert result.symbolic == ()
    assert result.verdict == "FAIL"
    assert result.culprits[0].startswith("activations of mix at init scale as width^+0.")
