"""The rules: pure functions of (role, width ratio, depth ratio), one record per parametrization.

Notation: m = width / base width (per matrix: the fan-in ratio), r = depth / base depth,
n = base learning rate, l = base weight decay, e = base Adam epsilon, s = base init std.
Weight decay is torch's coupled coefficient: a step shrinks a weight by lr * weight_decay.

Sources: Tensor Programs V (TP-V, 2203.03466) Table 8; CompleteP (2505.01618) Table 1;
spectral width-depth scaling (2603.00541) Tables 3 and 6; Moonlight (2502.16982) eq. 4;
MiniCPM (2404.06395) App. A.1; Megatron-LM `--use-mup`; Xmodel-2.5 (2511.19496).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from mutransfer.errors import UserError
from mutransfer.roles import BLOCK_ROLES, MATRIX_ROLES, Role


class BaseParams(BaseModel):
    """The base hyperparameters: what a sweep finds, and all that transfer carries over."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    lr: float = Field(2**-7, gt=0, le=10, description="peak learning rate at the base width")
    embedding_lr_ratio: float = Field(
        1.0, gt=0, le=1e4, description="embedding and head lr over lr"
    )
    init_std: float = Field(0.05, gt=0, le=10, description="std of every matrix at base width")
    embedding_multiplier: float = Field(1.0, gt=0, le=1e4, description="h0 = this * E[token]")
    output_multiplier: float = Field(1.0, gt=0, le=1e4, description="logits factor at base width")
    residual_multiplier: float = Field(
        1.0, gt=0, le=1e4, description="branch factor before the depth rule"
    )
    attention_multiplier: float = Field(1.0, gt=0, le=1e4, description="softmax scale factor")
    weight_decay: float = Field(0.0, ge=0, le=100, description="coupled weight decay at base width")
    beta1: float = Field(0.9, ge=0, lt=1, description="Adam's first-moment decay")
    beta2: float = Field(0.95, ge=0, lt=1, description="Adam's second-moment decay")
    eps: float = Field(1e-8, gt=0, le=1, description="Adam's epsilon at base width and depth")
    muon_factor: float = Field(1.0, gt=0, le=1e3, description="rho: Muon lr over AdamW lr, at base")
    muon_momentum: float = Field(0.95, ge=0, lt=1, description="Muon's momentum (EMA form)")


@dataclass(frozen=True, kw_only=True)
class Parametrization:
    """One set of rules, as data. The defaults are `completep-tied`.

    Attributes:
        name: The name that experiment files and bundles use.
        version: Goes up whenever a rule of this name changes.
        init: Hidden init std: `width` s/sqrt(m), or `fan_in` s*sqrt(base width/fan-in).
        out_init: o and down projections: as `hidden`, or the Megatron family's
            `depth` s/sqrt(2L) and `width_depth` s/sqrt(2Lm).
        hidden_lr: Exponent x of AdamW's hidden lr, n/m^x.
        gain_lr: The same for norm gains and biases.
        depth_lr: Whether lr inside the blocks is scaled by r^(alpha-1) (CompleteP).
        eps_width: Which roles have e/m: `none`, `hidden` or `all`.
        eps_depth: Which roles have e/r^alpha: `none`, `block` or `all`.
        independent_decay: Whether hidden weight decay is l*m^x, so that lr*wd is constant.
        decay_embedding, decay_gains: Whether weight decay touches these at all.
        attention: Softmax scale: `base` sqrt(base head_dim)/head_dim, `inverse` 1/head_dim,
            `sqrt` 1/sqrt(head_dim).
        residual: Branch factor: `relative` L0^-1/2 * r^-alpha, `sqrt_depth` L^-1/2,
            `ratio` r^-alpha, `none` 1.
        alpha: Depth exponent.
        logits: Output factor: `width` a/m, `replace` a, or 1/m where a is 1, `none` a.
        muon_scale: Update scale: `match_rms` 0.2*sqrt(max(out, in)) (Moonlight eq. 4) or
            `unit_rms` sqrt(out/in).
        muon_lr: Exponent x of Muon's hidden lr, rho*n/m^x.
    """

    name: str
    version: int = 1
    init: Literal["width", "fan_in"] = "width"
    out_init: Literal["hidden", "depth", "width_depth"] = "hidden"
    hidden_lr: float = 1.0
    gain_lr: float = 0.0
    depth_lr: bool = True
    eps_width: Literal["none", "hidden", "all"] = "all"
    eps_depth: Literal["none", "block", "all"] = "block"
    independent_decay: bool = True
    decay_embedding: bool = False
    decay_gains: bool = False
    attention: Literal["base", "inverse", "sqrt"] = "base"
    residual: Literal["relative", "sqrt_depth", "ratio", "none"] = "relative"
    alpha: float = 1.0
    logits: Literal["width", "replace", "none"] = "width"
    muon_scale: Literal["match_rms", "unit_rms"] = "match_rms"
    muon_lr: float = 0.5


DEFAULT = "completep-tied"

PARAMETRIZATIONS: dict[str, Parametrization] = {
    record.name: record
    for record in (
        Parametrization(name=DEFAULT),
        Parametrization(
            name="completep",
            eps_depth="all",
            decay_embedding=True,
            attention="inverse",
            residual="ratio",
            muon_scale="unit_rms",
            muon_lr=0.0,
        ),
        Parametrization(
            name="mup",
            depth_lr=False,
            eps_width="none",
            eps_depth="none",
            decay_embedding=True,
            decay_gains=True,
            residual="none",
            muon_scale="unit_rms",
            muon_lr=0.0,
        ),
        Parametrization(
            name="megatron",
            out_init="width_depth",
            depth_lr=False,
            eps_width="hidden",
            eps_depth="none",
            independent_decay=False,
            decay_embedding=True,
            residual="none",
            logits="replace",
            muon_scale="unit_rms",
            muon_lr=0.0,
        ),
        Parametrization(
            name="minicpm",
            depth_lr=False,
            eps_width="none",
            eps_depth="none",
            independent_decay=False,
            decay_embedding=True,
            attention="sqrt",
            residual="sqrt_depth",
        ),
        Parametrization(
            name="xmodel",
            out_init="depth",
            gain_lr=1.0,
            depth_lr=False,
            eps_width="none",
            eps_depth="none",
            independent_decay=False,
            decay_embedding=True,
            attention="inverse",
            residual="sqrt_depth",
            muon_lr=1.0,
        ),
        Parametrization(
            name="xmodel-fixed",
            depth_lr=False,
            eps_depth="none",
            attention="inverse",
            residual="sqrt_depth",
        ),
        Parametrization(
            name="sp",
            init="fan_in",
            hidden_lr=0.0,
            depth_lr=False,
            eps_width="none",
            eps_depth="none",
            attention="sqrt",
            residual="sqrt_depth",
            logits="none",
            muon_lr=0.0,
        ),
    )
}


def get_parametrization(name: str) -> Parametrization:
    """The parametrization called `name`.

    Raises:
        UserError: There is none of that name.
    """
    if name not in PARAMETRIZATIONS:
        raise UserError(
            "unknown parametrization", got=name, expected=f"one of {', '.join(PARAMETRIZATIONS)}"
        )
    return PARAMETRIZATIONS[name]


def register(parametrization: Parametrization) -> None:
    """Makes rules of your own known by their name: to experiments, sweeps and `Bundle.verify`.

    It holds for this process: sweeps with them train in one worker, and a program that reads
    their bundles registers them too.

    Raises:
        UserError: Other rules have that name.
    """
    known = PARAMETRIZATIONS.setdefault(parametrization.name, parametrization)
    if known != parametrization:
        raise UserError("other rules have this name", where="parametrization",
                        got=parametrization.name, cure="Name yours differently.")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Ratios:
    """Where one parameter stands relative to the base model.

    Attributes:
        width: m, the fan-in ratio of a hidden matrix, or the width ratio of anything else.
        depth: r = n_layers / base n_layers.
        n_layers: L of the model at hand (blocks, each with two residual branches).
        base_width: Width that m is relative to; only `fan_in` init reads it.
    """

    width: float
    depth: float
    n_layers: int
    base_width: float

    @property
    def base_layers(self) -> float:
        """L0, the depth of the base model."""
        return self.n_layers / self.depth


def init_std(
    p: Parametrization, role: Role, x: Ratios, base: BaseParams, fan_in: int | None = None
) -> float:
    """Init std; 0 for gains and biases, which start at one and zero (TP-V Table 8, row 1).

    Raises:
        ValueError: The rule needs a `fan_in` and got none.
    """
    if role in ("embedding", "head"):
        return base.init_std
    if role not in MATRIX_ROLES:
        return 0.0
    if role == "hidden_out" and p.out_init != "hidden":
        width = x.width if p.out_init == "width_depth" else 1.0
        return base.init_std / math.sqrt(2 * x.n_layers * width)
    if p.init == "fan_in":
        if fan_in is None:
            raise ValueError("fan_in init needs the fan-in")
        return base.init_std * math.sqrt(x.base_width / fan_in)
    return base.init_std / math.sqrt(x.width)


def adamw_lr(p: Parametrization, role: Role, x: Ratios, base: BaseParams) -> float:
    """AdamW's peak learning rate (TP-V Table 8 row 3; depth: CompleteP Table 1)."""
    if role in ("embedding", "head"):
        return base.lr * base.embedding_lr_ratio
    exponent = p.hidden_lr if role in MATRIX_ROLES else p.gain_lr
    depth = math.pow(x.depth, p.alpha - 1) if p.depth_lr and role in BLOCK_ROLES else 1.0
    return base.lr * depth / math.pow(x.width, exponent)


def adamw_eps(p: Parametrization, role: Role, x: Ratios, base: BaseParams) -> float:
    """Adam's epsilon, in step with the gradient (TP-V App. B.3; 2603.00541 Table 6)."""
    wide = p.eps_width == "all" or (p.eps_width == "hidden" and role in MATRIX_ROLES)
    deep = p.eps_depth == "all" or (p.eps_depth == "block" and role in BLOCK_ROLES)
    return base.eps / (x.width if wide else 1.0) / (math.pow(x.depth, p.alpha) if deep else 1.0)


def adamw_decay(p: Parametrization, role: Role, x: Ratios, base: BaseParams) -> float:
    """Coupled weight decay; l*m on hidden matrices keeps lr*wd constant in width."""
    if role in MATRIX_ROLES:
        return base.weight_decay * (math.pow(x.width, p.hidden_lr) if p.independent_decay else 1.0)
    decays = p.decay_embedding if role in ("embedding", "head") else p.decay_gains
    return base.weight_decay if decays else 0.0


def muon_lr(p: Parametrization, x: Ratios, base: BaseParams) -> float:
    """Muon's peak learning rate for a hidden matrix (2603.00541 Table 3: rho*n/sqrt(m))."""
    return base.muon_factor * base.lr / math.pow(x.width, p.muon_lr)


def muon_decay(p: Parametrization, x: Ratios, base: BaseParams) -> float:
    """Muon's weight decay: lr*wd equals AdamW's n*l across the hand-over and over widths."""
    if not p.independent_decay:
        return base.weight_decay
    return base.weight_decay * math.pow(x.width, p.muon_lr) / base.muon_factor


def muon_scale(p: Parametrization, fan_out: int, fan_in: int) -> float:
    """Factor on Muon's orthogonal update, before the learning rate."""
    if p.muon_scale == "match_rms":
        return 0.2 * math.sqrt(max(fan_out, fan_in))
    return math.sqrt(fan_out / fan_in)


def residual_multiplier(p: Parametrization, x: Ratios, base: BaseParams) -> float:
    """Factor on every residual branch (CompleteP eq. 3; MiniCPM App. A.1: a/sqrt(L))."""
    rule = {
        "relative": math.pow(x.depth, -p.alpha) / math.sqrt(x.base_layers),
        "sqrt_depth": 1 / math.sqrt(x.n_layers),
        "ratio": math.pow(x.depth, -p.alpha),
        "none": 1.0,
    }[p.residual]
    return base.residual_multiplier * rule


def output_multiplier(p: Parametrization, width: float, base: BaseParams) -> float:
    """Factor on the hidden state before the head (TP-V Table 8, output weights)."""
    a = base.output_multiplier
    if p.logits == "none":
        return a
    if p.logits == "replace":
        return 1 / width if a == 1.0 else a
    return a / width


def softmax_scale(p: Parametrization, head_dim: int, base_head_dim: int, base: BaseParams) -> float:
    """Factor on q.k before the softmax (TP-V Definition 4.1: 1/head_dim, fixed at the base)."""
    rule = {
        "base": math.sqrt(base_head_dim) / head_dim,
        "inverse": 1 / head_dim,
        "sqrt": 1 / math.sqrt(head_dim),
    }[p.attention]
    return base.attention_multiplier * rule
