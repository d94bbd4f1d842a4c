"""The table: every rule applied once, recorded by fully qualified name, used everywhere.

`mutransfer.apply` makes it from a model and initializes the model from it; `mutransfer.groups`
makes optimizer groups of it.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from mutransfer import rules
from mutransfer.errors import UserError
from mutransfer.roles import BLOCK_ROLES, MATRIX_ROLES, Role, matches
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
