"""The modules behind the parameters, and hooks that let any of them carry a table's multipliers.

A model that is not written for μP, such as one of Hugging Face's, multiplies nothing: the hooks
do it where the roles of its parameters say.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from mutransfer.errors import UserError
from mutransfer.roles import Role
from mutransfer.table import Multipliers, Table

_CARRIED: dict[Role, str] = {"embedding": "embedding", "hidden_out": "residual", "head": "output"}
"""The multiplier that belongs to modules of a role."""


def module_roles(model: nn.Module, table: Table) -> dict[str, Role]:
    """What each module that owns parameters is for, by its name.

    The role is that of the module's first parameter (of a layer: the weight). Where several
    modules own the embedding's parameter, those that are no `nn.Embedding` are the `head`; if
    none is one, all but the first.

    Raises:
        UserError: Model and table do not match.
    """
    rows = table.resolve(model)
    names = {parameter: fqn for fqn, parameter in model.named_parameters()}
    roles: dict[str, Role] = {}
    owners: dict[Tensor, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            role = rows[names[parameter]].role
            roles.setdefault(name, role)
            if role == "embedding":
                owners.setdefault(parameter, []).append(name)
    for shared in owners.values():
        tables = [name for name in shared if isinstance(model.get_submodule(name), nn.Embedding)]
        roles |= dict.fromkeys(set(shared) - set(tables or shared[:1]), "head")
    return roles


def carry_multipliers(model: nn.Module, table: Table) -> None:
    """Lets a model without `set_multipliers` carry the table's multipliers, by forward hooks.

    The output of the embedding and of each `hidden_out` layer is multiplied, and the input of
    the head. The softmax scale goes where attention modules read it, as Hugging Face's do: into
    the attribute `scaling` of modules that have a `head_dim` too. The multipliers are buffers
    that are not saved: `initialize` and `Bundle.apply` set them. Call this before either, and
    before `torch.compile`.

    Raises:
        UserError: Model and table do not match, the model has multipliers already, or no module
            can carry one that is not 1.
    """
    if hasattr(model, "set_multipliers") or hasattr(model, "carried"):
        raise UserError("the model has multipliers already", where=type(model).__name__,
                        cure="Leave out carry_multipliers: it would multiply twice.")  # fmt: skip
    carried = {"attention"} if scaled_modules(model) else set()
    for owner, role in module_roles(model, table).items():
        if role not in _CARRIED:
            continue
        module, name = model.get_submodule(owner), f"{_CARRIED[role]}_multiplier"
        one = next(module.parameters(recurse=False)).new_ones(())
        module.register_buffer(name, one, persistent=False)
        if role == "head":
            module.register_forward_pre_hook(partial(_multiply_input, name))
        else:
            module.register_forward_hook(partial(_multiply_output, name))
        carried.add(_CARRIED[role])
    model.carried = frozenset(carried)  # type: ignore[assignment]
    set_carried(model, table.multipliers)


@torch.no_grad()
def set_carried(model: nn.Module, multipliers: Multipliers) -> bool:
    """Sets the multipliers of a model after `carry_multipliers`; returns whether it is one.

    Raises:
        UserError: No module can carry one that is not 1.
    """
    carried = getattr(model, "carried", None)
    if carried is None:
        return False
    for name, value in multipliers:
        if value != 1.0 and name not in carried:
            raise UserError(
                f"no module can carry the {name} multiplier",
                where=type(model).__name__,
                got=value,
                cure="Give the model a method set_multipliers(Multipliers) and use them in "
                "forward.",
            )
        for module in model.modules():
            if (buffer := module._buffers.get(f"{name}_multiplier")) is not None:
                buffer.fill_(value)
    for module in scaled_modules(model):
        module.scaling = multipliers.attention  # type: ignore[assignment]
    return True


def scaled_modules(model: nn.Module) -> list[nn.Module]:
    """The attention modules, told by their `head_dim`, that have their scale in `scaling`."""
    return [
        m
        for m in model.modules()
        if isinstance(getattr(m, "scaling", None), float) and hasattr(m, "head_dim")
    ]


def _multiply_input(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0] * getattr(module, name), *inputs[1:])


def _multiply_output(name: str, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    scaled: Tensor = output * getattr(module, name)
    return scaled
