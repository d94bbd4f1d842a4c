"""What a correct depth parametrization looks like: the slope over depth of each quantity.

The desiderata are CompleteP's (2505.01618, section 4): the residual stream and its change stay
constant in depth, and every block, being one of many, changes by its share of 1/depth. Branch
multipliers ~ depth^-1 with learning rates that do not know the depth (alpha = 1) meet all of
them. Multipliers ~ depth^-1/2 meet the first at init; with the same learning rates the changes,
which add up coherently where initial values add up at random, outgrow it.
"""

from __future__ import annotations

from mutransfer.coord_expect import ASSIGNED, UNJUDGED, Expectation, Ladder, Thresholds, Tolerance
from mutransfer.roles import MATRIX_ROLES

LOSS_SHIFTS = "under alpha = 1 the branches' share of the stream at init falls with the depth"
MULTIPLIER = "the residual multiplier does not shrink with the depth as it should"


def depth_expectation(
    kind: str, name: str, ladder: Ladder, limits: Thresholds
) -> Expectation | None:
    """The right slope over depth of a quantity, or `None` where there is no right or wrong.

    Args:
        kind, name: As in the result's frame.
        ladder: The models of the check.
        limits: The tolerances; the same as over width.
    """
    if kind == "loss" or (ladder.tokens and (kind, name) in UNJUDGED):
        return None
    if kind in ("weight", "update", "later_update", "update_norm"):
        return _weights(kind, name, ladder, limits)
    if kind.startswith("delta_"):
        return _change(kind, name, ladder, limits)
    if kind == "branch":
        # So many independent branches add up to the square root of their number at init, so
        # that none may be larger than depth^-1/2; alpha = 1 makes them smaller.
        return Expectation(slope=-0.5, above=limits.init, below=None, cause_above=MULTIPLIER)
    if kind == "residual":  # under alpha = 1 it falls to the embedding's share
        cause = f"the branches outgrow the stream: {MULTIPLIER}"
        return Expectation(slope=0.0, above=limits.init, below=None, cause_above=cause)
    grow, shrink = (f"something before them {verb} with the depth" for verb in ("grows", "shrinks"))
    if kind == "logits":
        above = {"self-token logits": limits.self_logits, "other-token logits":
                 limits.other_logits}.get(name, limits.any_logits)  # fmt: skip
        return Expectation(slope=0.0, above=above, below=limits.other_logits_below,
                           cause_above=grow, cause_below=shrink)  # fmt: skip
    if kind not in ("activation", "attention_logits"):
        return None
    branch = kind == "activation" and ladder.module_role(name) == "hidden_out"
    return _flat(limits.init.times(limits.product if branch else 1.0), grow, shrink)


def _change(kind: str, name: str, ladder: Ladder, limits: Thresholds) -> Expectation:
    if kind == "delta_branch":
        return Expectation(
            slope=-1.0,
            above=limits.change,
            below=limits.change,
            cause_above="the residual multiplier, times the learning rates inside the blocks, "
            "shrinks slower than 1/depth",
            cause_below="the residual multiplier, times the learning rates inside the blocks, "
            "shrinks faster than 1/depth",
        )
    fast = "deep models learn too fast: the residual multiplier or a learning rate is not scaled "
    slow = "deep models learn too slowly: the residual multiplier or a learning rate is scaled "
    if kind == "delta_logits":
        above, below = limits.change, limits.logits_change_below
    else:
        product = kind != "delta_activation" or ladder.module_role(name) == "hidden_out"
        above = below = limits.change.times(limits.product if product else 1.0)
    return Expectation(slope=0.0, above=above, below=below, cause_above=f"{fast}down with the "
                       "depth", cause_below=f"{slow}down too much with the depth")  # fmt: skip


def _weights(kind: str, name: str, ladder: Ladder, limits: Thresholds) -> Expectation | None:
    """No init and no learning rate knows the depth at alpha = 1 (CompleteP, Table 1)."""
    if kind == "weight":
        return _flat(limits.weight, "the init std grows with the depth",
                     "the init std shrinks with the depth, beside a residual multiplier that "
                     "does so already")  # fmt: skip
    if kind == "later_update":
        above = below = ASSIGNED
    else:
        above = "the learning rate grows with the depth"
        below = "the learning rate shrinks with the depth"
    muon = ladder.optimizer == "muon" and ladder.roles[name] in MATRIX_ROLES
    if kind == "update_norm":
        low = limits.muon_norm if muon else limits.norm_below
        return Expectation(slope=0.0, above=limits.muon_norm if muon else limits.norm_above,
                           below=low, cause_above=above, cause_below=below)  # fmt: skip
    if muon and kind == "later_update":
        return None
    if muon:
        return Expectation(slope=0.0, above=limits.muon_update_above, below=None,
                           cause_above=above)  # fmt: skip
    return _flat(limits.update if kind == "update" else limits.change, above, below)


def _flat(tolerance: Tolerance, above: str, below: str) -> Expectation:
    return Expectation(slope=0.0, above=tolerance, below=tolerance,
                       cause_above=above, cause_below=below)  # fmt: skip
