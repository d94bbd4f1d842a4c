"""What a correct width parametrization looks like: the slope that each quantity should have.

The expectations are μP's desiderata for the optimizer in use, not what the parametrization
under test claims. Slopes are exponents s of value ~ width^s. Sources: Tensor Programs V
(2203.03466) Table 14 and App. J.2 (initial values and changes stay constant in width);
2310.17813 (weights and updates have constant RMS-operator norm).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mutransfer.roles import MATRIX_ROLES, Role

Axis = Literal["width", "depth"]
"""What the models of a check differ in."""


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far a slope may be off, on one side, before it is a warning and a failure."""

    warn: float
    fail: float

    def times(self, factor: float) -> Tolerance:
        """The same, `factor` times as wide."""
        return Tolerance(warn=self.warn * factor, fail=self.fail * factor)


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Every tolerance of the verdict, in units of slope.

    Attributes:
        init: Activations, residual stream and attention logits at t = 0.
        change: Their change after the steps, and that of the logits, upwards; also the
            farthest entry of later updates under AdamW: the learning rate, times how steady
            the steadiest sign is.
        product: Factor on `change` for attention logits, branch outputs (o, down) and the
            residual stream that sums them: each is a product of two changed factors (q and
            k, attention weights and values, gate and up), so the same error counts twice.
            Also on `init` for branch outputs: what attention averages is one random table's
            few tokens over and over, so that o scatters twice as much as the rest.
        logits_change_below: Change of the logits, downwards. Wide, because the first steps
            are not aligned yet and move wide models' logits less.
        weight: Initial weights; their RMS is known to about 1%.
        update: First update of every parameter under AdamW, whose step is the learning rate.
            Also the share of a step that eps takes away: that is by how much the slope of
            the update would be off, were eps wrong in width.
        muon_update_above: RMS of Muon's update, upwards only: a gradient of few tokens has
            few directions, so the RMS of a wide matrix's update falls faster than -1/2.
        muon_norm: RMS-operator norm of Muon's update, which does not have that problem.
        norm_above, norm_below: The same under AdamW, where the norm depends on how aligned
            the update's rows are. From perfectly aligned (fan-in times the RMS) to not at
            all (its square root) a right learning rate gives slopes from 0 to -1/2, so that
            only what is below -1/2 is wrong; the RMS itself is judged apart.
        self_logits, other_logits, any_logits: Logits at t = 0 of a position's own token, of
            other tokens (expected -1/2), and of all where tokens are unknown, upwards.
        other_logits_below: Logits of other tokens at t = 0, downwards.
        loss: Loss at t = 0, upwards.
        late: Warns of what only warns of a model that was trained before the check; times
            `product` where that applies.
        overflow: Share of a tensor's entries that FP8 casts clamp, at the step and width
            where it is largest, less what they clamp in the smallest models. Correct models
            stay below 0.6%, lr 2^-10 to 2^-4; where learning rates do not shrink with the
            width, a ladder to 256 shows 4% to 39% (docs/decisions/0003-coordinate-check.md).
    """

    init: Tolerance = field(default=Tolerance(warn=0.08, fail=0.15))
    change: Tolerance = field(default=Tolerance(warn=0.15, fail=0.25))
    product: float = 2.0
    logits_change_below: Tolerance = field(default=Tolerance(warn=0.4, fail=0.6))
    weight: Tolerance = field(default=Tolerance(warn=0.05, fail=0.1))
    update: Tolerance = field(default=Tolerance(warn=0.1, fail=0.2))
    muon_update_above: Tolerance = field(default=Tolerance(warn=0.1, fail=0.2))
    muon_norm: Tolerance = field(default=Tolerance(warn=0.1, fail=0.2))
    norm_above: Tolerance = field(default=Tolerance(warn=0.15, fail=0.25))
    norm_below: Tolerance = field(default=Tolerance(warn=0.5, fail=0.6))
    self_logits: Tolerance = field(default=Tolerance(warn=0.25, fail=0.35))
    other_logits: Tolerance = field(default=Tolerance(warn=0.4, fail=0.6))
    other_logits_below: Tolerance = field(default=Tolerance(warn=0.4, fail=0.6))
    any_logits: Tolerance = field(default=Tolerance(warn=0.2, fail=0.3))
    loss: Tolerance = field(default=Tolerance(warn=0.05, fail=0.1))
    late: float = 0.35
    overflow: Tolerance = field(default=Tolerance(warn=0.01, fail=0.03))


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """What the models of a check have in common, and how their shapes grow with width.

    Attributes:
        axis: What the models differ in; all exponents are 0 where that is the depth.
        trained: Steps that the models were trained for before the check.
        optimizer: `adamw` or `muon`, for the hidden matrices.
        roles: Role by parameter pattern.
        fan_in, fan_out: Exponent of the fan-in and fan-out by parameter pattern: 1 for a side
            that is proportional to the width, 0 for one that is fixed.
        head_dim: The same for the size of an attention head.
        tokens: Whether the logits of a position's own token are told from the others.
    """

    optimizer: str
    roles: Mapping[str, Role]
    fan_in: Mapping[str, float]
    fan_out: Mapping[str, float]
    head_dim: float = 0.0
    tokens: bool = False
    axis: Axis = "width"
    trained: int = 0

    def module_role(self, name: str) -> Role | None:
        """Role of a module's parameter, by the module's pattern."""
        name = name.partition(" ")[0]
        return self.roles.get(f"{name}.weight") or next(
            (role for fqn, role in self.roles.items() if fqn.rpartition(".")[0] == name), None
        )


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """The right slope of one quantity.

    Attributes:
        slope: Exponent of the width.
        above, below: Tolerance on either side; `None` where that side is not judged.
        cause_above, cause_below: What a deviation to that side means, in plain words.
    """

    slope: float
    above: Tolerance
    below: Tolerance | None
    cause_above: str
    cause_below: str = ""


ASSIGNED = (
    "the first step is right and later ones are not: a schedule assigns learning rates instead "
    "of multiplying them"
)
"""Told of later updates only where the first one is right."""

UNJUDGED = {
    ("logits", "logits"): "the logits of own and other tokens are judged apart",
    ("delta_logits", "self-token logits"): "all logits are judged together after a step",
    ("delta_logits", "other-token logits"): "all logits are judged together after a step",
}
"""(kind, name) of what is measured and shown but not judged, where tokens are known."""


def expectation(kind: str, name: str, ladder: Ladder, limits: Thresholds) -> Expectation | None:
    """The right slope of a quantity, or `None` where there is no right or wrong.

    Args:
        kind, name: As in the result's frame.
        ladder: The models of the check.
        limits: The tolerances.
    """
    if ladder.tokens and (kind, name) in UNJUDGED:
        return None
    if kind in ("logits", "loss"):
        return _outputs(kind, name, limits)
    if kind.startswith("delta_"):
        return _change(kind, name, ladder, limits)
    if kind in ("weight", "update", "later_update", "update_norm"):
        return _weights(kind, name, ladder, limits)
    if kind not in ("activation", "residual", "attention_logits"):
        return None
    above = {
        "activation": "the init std of the weights before them does not shrink with the fan-in",
        "residual": "the branches outgrow the stream: their init or multiplier grows with width",
        "attention_logits": "the softmax scale, or the init of q and k, is too large in width",
    }
    below = {
        "activation": "the init std of the weights before them shrinks too fast with the fan-in",
        "residual": "the branches fade from the stream: their init or multiplier shrinks",
        "attention_logits": "the softmax scale, or the init of q and k, shrinks with width",
    }
    if ladder.head_dim > 0:
        above["attention_logits"] = (
            "the softmax scale is 1/sqrt(head_dim) where 1/head_dim is right, or the init of q "
            "and k is too large in width"
        )
    # Independent q and k give q.k ~ sqrt(head_dim) and the scale is 1/head_dim (TP-V Def. 4.1).
    slope = -0.5 * ladder.head_dim if kind == "attention_logits" else 0.0
    branch = kind == "activation" and ladder.module_role(name) == "hidden_out"
    tolerance = limits.init.times(limits.product if branch else 1.0)
    return _two_sided(slope, tolerance, above[kind], below[kind])


def _outputs(kind: str, name: str, limits: Thresholds) -> Expectation:
    """Logits and loss at init. A tied own-token logit is a sum of d_model like signs: constant
    under the 1/m multiplier; any other logit is a random sum: m^-1/2."""
    missing = "the output multiplier is not divided by the width"
    if kind == "loss":
        return Expectation(slope=0.0, above=limits.loss, below=None,
                           cause_above=f"the logits grow; most likely {missing}")  # fmt: skip
    if name == "self-token logits":
        return Expectation(slope=0.0, above=limits.self_logits, below=None, cause_above=missing)
    if name == "other-token logits":
        return Expectation(
            slope=-0.5,
            above=limits.other_logits,
            below=limits.other_logits_below,
            cause_above=missing,
            cause_below="the output multiplier is divided by the width more than once",
        )
    return Expectation(slope=0.0, above=limits.any_logits, below=None, cause_above=missing)


def _change(kind: str, name: str, ladder: Ladder, limits: Thresholds) -> Expectation:
    """Changes after the steps: constant in width (TP-V App. J.2.1, the second desideratum)."""
    if kind == "delta_logits":
        return Expectation(
            slope=0.0,
            above=limits.change,
            below=limits.logits_change_below,
            cause_above="the output multiplier is not divided by the width, or hidden "
            "learning rates are too large in width",
            cause_below="the output multiplier is divided by the width more than once, or "
            "learning rates shrink too fast",
        )
    product = kind != "delta_activation" or ladder.module_role(name) == "hidden_out"
    tolerance = limits.change.times(limits.product if product else 1.0)
    shrinks = kind == "delta_attention_logits" and ladder.head_dim > 0
    return Expectation(
        slope=0.0,
        above=tolerance,
        below=None if shrinks else tolerance,
        cause_above="wide models learn too fast: a learning rate or multiplier before it is "
        "not scaled down with the width",
        cause_below="wide models learn too slowly: a learning rate or multiplier before it is "
        "scaled down too much",
    )


def _weights(kind: str, name: str, ladder: Ladder, limits: Thresholds) -> Expectation | None:
    """Initial weights and their updates (TP-V Table 8; 2603.00541 Table 3 for Muon)."""
    role, fan_in, fan_out = ladder.roles[name], ladder.fan_in[name], ladder.fan_out[name]
    hidden = role in MATRIX_ROLES
    if kind == "weight":
        return _two_sided(
            -fan_in / 2 if hidden else 0.0,
            limits.weight,
            "the init std is not divided by the square root of the width"
            if hidden
            else "the init std grows with the width, where it should not know the width",
            "the init std shrinks too fast with the width"
            if hidden
            else "the init is scaled like a hidden matrix's",
        )
    tolerance = limits.update if kind == "update" else limits.change
    if not hidden:
        grows = "the learning rate grows with the width"
        shrinks = "the learning rate is scaled like a hidden matrix's"
        if kind == "later_update":
            grows = shrinks = ASSIGNED
        return _two_sided(0.0, tolerance, grows, shrinks)
    if ladder.optimizer != "muon":
        above = "the learning rate is not divided by the width"
        below = "the learning rate shrinks faster than 1/width"
        if kind == "later_update":
            above = below = ASSIGNED
        if kind != "update_norm":
            return _two_sided(-fan_in, tolerance, above, below)
        return Expectation(slope=0.0, above=limits.norm_above, below=limits.norm_below,
                           cause_above=above, cause_below=below)  # fmt: skip
    above = "Muon's step is not divided by the square root of the width"
    below = "Muon's step is divided by the width where the square root is right"
    if kind == "update_norm":
        return _two_sided(0.0, limits.muon_norm, above, below)
    if kind == "later_update":
        return None
    # sqrt(out/in) times a matrix of min(out, in) unit singular values: RMS sqrt(min/(in*in)).
    slope = (min(fan_in, fan_out) - 2 * fan_in) / 2
    return Expectation(slope=slope, above=limits.muon_update_above, below=None, cause_above=above)


def _two_sided(slope: float, tolerance: Tolerance, above: str, below: str) -> Expectation:
    return Expectation(slope=slope, above=tolerance, below=tolerance,
                       cause_above=above, cause_below=below)  # fmt: skip
