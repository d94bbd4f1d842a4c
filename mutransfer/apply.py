"""From a model to its table, and from the table back to the model's initial weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from mutransfer import rules
from mutransfer.errors import UserError
from mutransfer.modules import set_carried
from mutransfer.roles import MATRIX_ROLES, Role, RoleFunction, decoder_role, pattern_of
from mutransfer.rules import BaseParams, Parametrization, Ratios
from mutransfer.table import Multipliers, Row, Table, make_multipliers, make_row


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What base shapes cannot tell: how the base model relates in scale to `base_width`.

    Attributes:
        base_width_mult: Width of the base *model* over the base width: with a proxy of
            d_model 192 and base_width 256 this is 0.75, and the proxy has m = 0.75.
        base_width: Width at which m = 1, read only by the standard parametrization's init;
            `None` reads it off the base model's embedding or head.
        n_layers, base_n_layers: Depth of the model and of the base.
        head_dim, base_head_dim: Size of an attention head; 1 for models without attention.
    """

    base_width_mult: float = 1.0
    base_width: float | None = None
    n_layers: int = 1
    base_n_layers: int = 1
    head_dim: int = 1
    base_head_dim: int = 1


def width_ratios(model: nn.Module, base: nn.Module) -> dict[str, float]:
    """Width ratio of every parameter by `mup`'s base shapes: fan-in's, else the one width's.

    Args:
        model: The model at hand; may live on the meta device.
        base: The base model, of equal depth; may live on the meta device.

    Raises:
        UserError: The two models do not have the same parameters.
    """
    from mup.shape import get_shapes, zip_infshapes

    shapes, base_shapes = get_shapes(model), get_shapes(base)
    if shapes.keys() != base_shapes.keys():
        odd = sorted(shapes.keys() ^ base_shapes.keys())
        raise UserError(
            "model and base model have different parameters",
            where=odd[0],
            got=f"{len(odd)} names in only one of them",
            expected="equal names: base shapes are taken at equal depth",
        )
    infshapes = zip_infshapes(base_shapes, shapes)
    return {fqn: float(infshape.width_mult()) for fqn, infshape in infshapes.items()}


def parametrize(
    model: nn.Module,
    base: nn.Module,
    params: BaseParams,
    parametrization: str | Parametrization = rules.DEFAULT,
    *,
    geometry: Geometry | None = None,
    role: RoleFunction = decoder_role,
) -> Table:
    """Applies every rule once and records the result.

    Args:
        model: The model to train; only its parameters' names and shapes are read, so the
            meta device will do.
        base: The same model at the base width and equal depth.
        params: The base hyperparameters.
        parametrization: A name, or a record of rules of your own.
        geometry: Depth, head size and base width; the default fits a model whose base has
            the same depth and no attention.
        role: (name, shape) -> role, for a model of your own.

    Raises:
        UserError: Names differ, a parameter has no role or one that its shape contradicts,
            or the model has neither an embedding nor a head.
    """
    p = (
        parametrization
        if isinstance(parametrization, Parametrization)
        else rules.get_parametrization(parametrization)
    )
    geometry = geometry or Geometry()
    depth = geometry.n_layers / geometry.base_n_layers
    base_width = geometry.base_width
    if base_width is None:
        base_width = _base_width(base, role) / geometry.base_width_mult
    ratios = {
        fqn: Ratios(
            width=ratio * geometry.base_width_mult,
            depth=depth,
            n_layers=geometry.n_layers,
            base_width=base_width,
        )
        for fqn, ratio in width_ratios(model, base).items()
    }
    roles = {fqn: role(fqn, tuple(t.shape)) for fqn, t in model.named_parameters()}
    ends = [ratios[fqn] for fqn, kind in roles.items() if kind in ("embedding", "head")]
    if not ends:
        raise UserError("model has no parameter with the role embedding or head",
                        cure="The output multiplier's width comes from there.")  # fmt: skip
    multipliers = make_multipliers(ends[-1], p, params, geometry.head_dim, geometry.base_head_dim)
    _check_fan_in(model, base, roles)
    rows = {
        fqn: make_row(fqn, tuple(t.shape), roles[fqn], ratios[fqn], p, params, multipliers)
        for fqn, t in model.named_parameters()
    }
    return Table(
        parametrization=p.name,
        version=p.version,
        multipliers=multipliers,
        rows=_by_pattern(rows),
    )


def _by_pattern(rows: Mapping[str, Row]) -> tuple[Row, ...]:
    """One row per pattern; where its rows differ (`nn.Sequential`), one row per name."""
    grouped: dict[str, list[Row]] = {}
    for fqn, row in rows.items():
        grouped.setdefault(pattern_of(fqn), []).append(row)
    merged: list[Row] = []
    for pattern, named in grouped.items():
        starred = [row.model_copy(update={"pattern": pattern}) for row in named]
        merged += starred[:1] if all(row == starred[0] for row in starred) else named
    return tuple(merged)


def _check_fan_in(model: nn.Module, base: nn.Module, roles: Mapping[str, Role]) -> None:
    """Refuses hidden matrices that grow in fan-out alone: their rules would read that ratio."""
    base_shapes = {fqn: tuple(t.shape) for fqn, t in base.named_parameters()}
    for fqn, parameter in model.named_parameters():
        shape, base_shape = tuple(parameter.shape), base_shapes[fqn]
        if roles[fqn] in MATRIX_ROLES and shape[-1] == base_shape[-1] and shape != base_shape:
            raise UserError(
                f"a matrix with the role {roles[fqn]} must grow in fan-in",
                where=fqn,
                got=f"{shape}, base {base_shape}",
                cure="A layer that reads an input of fixed size has the role embedding.",
            )


def _base_width(base: nn.Module, role: RoleFunction) -> float:
    """The width of the base model, read off its embedding or head."""
    widths = [
        t.shape[1]
        for fqn, t in base.named_parameters()
        if role(fqn, tuple(t.shape)) in ("embedding", "head")
    ]
    return float(widths[-1]) if widths else 1.0


@torch.no_grad()
def initialize(model: nn.Module, table: Table, *, seed: int) -> None:
    """Draws every parameter anew from the table's stds and hands the model its multipliers.

    Each parameter has a generator of its own, seeded by (seed, name): the values do not
    depend on the order of the parameters, on the device or on what else is drawn. Gains
    become one, biases zero. A model with multipliers must have `set_multipliers(Multipliers)`,
    or carry them (`mutransfer.modules.carry_multipliers`).

    Raises:
        UserError: Model and table do not match, or multipliers other than one would be lost.
    """
    rows = table.resolve(model)
    set_multipliers = getattr(model, "set_multipliers", None)
    if set_multipliers is not None:
        set_multipliers(table.multipliers)
    elif not set_carried(model, table.multipliers) and table.multipliers != Multipliers():
        raise UserError(
            "the model takes no multipliers, so they would be lost",
            where=type(model).__name__,
            got=table.multipliers,
            cure="Give the model a method set_multipliers(Multipliers) and use them in forward, "
            "or call mutransfer.modules.carry_multipliers(model, table) first.",
        )
    for fqn, parameter in model.named_parameters():
        row = rows[fqn]
        if row.role in ("gain", "final_gain"):
            parameter.fill_(1.0)
        elif row.role == "bias":
            parameter.zero_()
        else:
            digest = hashlib.sha256(f"{seed}:{fqn}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * row.init_std)
