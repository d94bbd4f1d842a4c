"""The table: every rule applied once, recorded by fully qualified name, used everywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from mutransfer import rules
from mutransfer.errors import UserError
from mutransfer.roles import (
    BLOCK_ROLES,
    MATRIX_ROLES,
    Role,
    RoleFunction,
    decoder_role,
    matches,
    pattern_of,
)
from mutransfer.rules import BaseParams, Parametrization, Ratios

_RECORD = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class AdamWEntry(BaseModel):
    """AdamW's settings for one pattern; `lr` is a peak, `weight_decay` torch's coupled one."""

    model_config = _RECORD
    lr: float = Field(ge=0)
    eps: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    betas: tuple[float, float]
    lr_times_weight_decay: float = Field(ge=0, description="shrinkage per step at peak lr")


class MuonEntry(BaseModel):
    """Muon's settings for one pattern; `scale` multiplies the orthogonal update before lr."""

    model_config = _RECORD
    lr: float = Field(ge=0)
    weight_decay: float = Field(ge=0)
    momentum: float = Field(ge=0, lt=1)
    scale: float = Field(gt=0)
    lr_times_weight_decay: float = Field(ge=0, description="shrinkage per step at peak lr")


class OptimizerEntries(BaseModel):
    """The settings per optimizer; the phase of a recipe chooses the entry."""

    model_config = _RECORD
    adamw: AdamWEntry
    muon: MuonEntry | None = None


class Row(BaseModel):
    """Everything the bundle owns about the parameters that `pattern` names."""

    model_config = _RECORD
    pattern: str = Field(description="fully qualified name; * stands for one layer index")
    role: Role
    shape: tuple[int, ...]
    width_ratio: float = Field(gt=0, description="m: fan-in (or width) over the base's")
    depth_ratio: float = Field(gt=0, description="r: layers over the base's")
    init_std: float = Field(ge=0)
    forward_multiplier: float = Field(gt=0, description="factor on this layer's output")
    optimizers: OptimizerEntries


class Multipliers(BaseModel):
    """The effective forward multipliers of a model; `attention` is the whole softmax scale."""

    model_config = _RECORD
    embedding: float = Field(1.0, gt=0)
    output: float = Field(1.0, gt=0)
    residual: float = Field(1.0, gt=0)
    attention: float = Field(1.0, gt=0)


class Table(BaseModel):
    """The resolved parametrization of one model."""

    model_config = _RECORD
    parametrization: str
    version: int
    multipliers: Multipliers
    rows: tuple[Row, ...]

    def row(self, fqn: str) -> Row:
        """The one row that names `fqn`.

        Raises:
            UserError: No pattern names the parameter, or more than one does.
        """
        found = [row for row in self.rows if matches(row.pattern, fqn)]
        if len(found) != 1:
            raise UserError(
                "parameter is matched by no pattern" if not found else
                "parameter is matched by several patterns",
                where=fqn,
                got=[row.pattern for row in found] or None,
                expected="exactly one row of the table",
                cure="The model and the table do not belong together; rebuild the table.",
            )  # fmt: skip
        return found[0]

    def resolve(self, model: nn.Module) -> dict[str, Row]:
        """Rows by fully qualified name for every parameter of `model`, shapes checked.

        Raises:
            UserError: A parameter has no row or two, a shape differs, or a row names nothing.
        """
        rows = {}
        for fqn, parameter in model.named_parameters():
            row = rows[fqn] = self.row(fqn)
            if tuple(parameter.shape) != row.shape:
                raise UserError("shape differs from the table's", where=fqn,
                                got=tuple(parameter.shape), expected=row.shape)  # fmt: skip
        used = {row.pattern for row in rows.values()}
        if unused := [row.pattern for row in self.rows if row.pattern not in used]:
            raise UserError("rows of the table name no parameter of the model", got=unused)
        return rows


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


def make_multipliers(
    x: Ratios, p: Parametrization, params: BaseParams, head_dim: int, base_head_dim: int
) -> Multipliers:
    """The forward multipliers; `x` is where the head (or the tied embedding) stands."""
    return Multipliers(
        embedding=params.embedding_multiplier,
        output=rules.output_multiplier(p, x.width, params),
        residual=rules.residual_multiplier(p, x, params),
        attention=rules.softmax_scale(p, head_dim, base_head_dim, params),
    )


def make_row(
    pattern: str,
    shape: tuple[int, ...],
    role: Role,
    x: Ratios,
    p: Parametrization,
    params: BaseParams,
    multipliers: Multipliers,
) -> Row:
    """The row of one parameter, or of one pattern: a pure function of its arguments.

    Raises:
        UserError: The role is a matrix's and the shape is not.
    """
    if role not in ("gain", "final_gain", "bias") and len(shape) != 2:
        raise UserError("a matrix role needs two dimensions", where=pattern, got=shape)
    fan_in = shape[-1]
    lr = rules.adamw_lr(p, role, x, params)
    decay = rules.adamw_decay(p, role, x, params)
    muon = None
    if role in MATRIX_ROLES:
        muon_lr, muon_decay = rules.muon_lr(p, x, params), rules.muon_decay(p, x, params)
        muon = MuonEntry(
            lr=muon_lr,
            weight_decay=muon_decay,
            momentum=params.muon_momentum,
            scale=rules.muon_scale(p, shape[0], fan_in),
            lr_times_weight_decay=muon_lr * muon_decay,
        )
    forward = {"embedding": multipliers.embedding, "head": multipliers.output,
               "hidden_out": multipliers.residual}  # fmt: skip
    return Row(
        pattern=pattern,
        role=role,
        shape=shape,
        width_ratio=x.width,
        depth_ratio=x.depth if role in BLOCK_ROLES else 1.0,
        init_std=rules.init_std(p, role, x, params, fan_in),
        forward_multiplier=forward.get(role, 1.0),
        optimizers=OptimizerEntries(
            adamw=AdamWEntry(
                lr=lr,
                eps=rules.adamw_eps(p, role, x, params),
                weight_decay=decay,
                betas=(params.beta1, params.beta2),
                lr_times_weight_decay=lr * decay,
            ),
            muon=muon,
        ),
    )


@torch.no_grad()
def initialize(model: nn.Module, table: Table, *, seed: int) -> None:
    """Draws every parameter anew from the table's stds and hands the model its multipliers.

    Each parameter has a generator of its own, seeded by (seed, name): the values do not
    depend on the order of the parameters, on the device or on what else is drawn. Gains
    become one, biases zero. A model with multipliers must have `set_multipliers(Multipliers)`.

    Raises:
        UserError: Model and table do not match, or multipliers other than one would be lost.
    """
    rows = table.resolve(model)
    set_multipliers = getattr(model, "set_multipliers", None)
    if set_multipliers is not None:
        set_multipliers(table.multipliers)
    elif table.multipliers != Multipliers():
        raise UserError(
            "the model takes no multipliers, so they would be lost",
            where=type(model).__name__,
            got=table.multipliers,
            cure="Give the model a method set_multipliers(Multipliers) and use them in forward.",
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


GroupKind = Literal["adamw", "muon", "adamw_aux"]


def param_groups(model: nn.Module, table: Table, optimizer: GroupKind) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimizer, one per distinct setting.

    Args:
        model: The model that the table belongs to.
        table: What `parametrize` or `Bundle.apply` returned.
        optimizer: `adamw` for all parameters under AdamW; `muon` for the hidden matrices,
            ready for `torch.optim.Muon`; `adamw_aux` for what Muon leaves to AdamW.

    Returns:
        Groups with `params` (as (name, parameter) pairs, which torch keeps as
        `param_names`), the optimizer's settings, and `peak_lr` for schedules to multiply.

    Raises:
        UserError: Model and table do not match, or `optimizer` is none of the three.
    """
    if optimizer not in get_args(GroupKind):
        raise UserError("unknown kind of parameter groups", got=optimizer,
                        expected=f"one of {', '.join(get_args(GroupKind))}")  # fmt: skip
    grouped: dict[tuple[Any, ...], dict[str, Any]] = {}
    rows = table.resolve(model)
    for fqn, parameter in model.named_parameters():
        row = rows[fqn]
        muon = row.optimizers.muon
        if optimizer != "adamw" and (muon is not None) != (optimizer == "muon"):
            continue
        settings = _muon_settings(row) if optimizer == "muon" else _adamw_settings(row)
        group = grouped.setdefault(tuple(settings.items()), {"params": [], **settings})
        group["params"].append((fqn, parameter))
    return list(grouped.values())


def _adamw_settings(row: Row) -> dict[str, Any]:
    entry = row.optimizers.adamw
    return {
        "lr": entry.lr,
        "peak_lr": entry.lr,
        "eps": entry.eps,
        "weight_decay": entry.weight_decay,
        "betas": entry.betas,
    }


def _muon_settings(row: Row) -> dict[str, Any]:
    """Settings that make `torch.optim.Muon` take the step lr * scale * O, decay lr * wd.

    torch knows two scales: `match_rms_adamw` is ours where scale = 0.2*sqrt(max(out, in)).
    Any other scale goes into the lr of its `original` mode, whose own factor
    sqrt(max(1, out/in)) is divided out, with lr*wd kept.
    """
    entry = row.optimizers.muon
    assert entry is not None
    fan_out, fan_in = row.shape
    lr, decay, mode = entry.lr, entry.weight_decay, "match_rms_adamw"
    if not _close(entry.scale, 0.2 * max(fan_out, fan_in) ** 0.5):
        mode = "original"
        lr = entry.lr * entry.scale / max(1.0, fan_out / fan_in) ** 0.5
        decay = entry.lr_times_weight_decay / lr if lr else 0.0
    return {
        "lr": lr,
        "peak_lr": lr,
        "weight_decay": decay,
        "momentum": entry.momentum,
        "adjust_lr_fn": mode,
    }


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-12 * max(abs(a), abs(b))


def count_by_role(model: nn.Module, role: RoleFunction = decoder_role) -> Mapping[Role, int]:
    """Number of parameters per role."""
    counts: dict[Role, int] = {}
    for fqn, parameter in model.named_parameters():
        kind = role(fqn, tuple(parameter.shape))
        counts[kind] = counts.get(kind, 0) + parameter.numel()
    return counts
