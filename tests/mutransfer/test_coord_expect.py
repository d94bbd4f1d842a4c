"""The right slopes: the reference's table of expected slopes, quantity by quantity."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from mutransfer.coord_expect import (
    UNJUDGED,
    Expectation,
    Ladder,
    Thresholds,
    Tolerance,
    expectation,
)
from mutransfer.coord_late import is_share
from mutransfer.coord_text import SUBJECTS
from mutransfer.roles import Role

ROLES: dict[str, Role] = {
    "embedding.weight": "embedding",
    "head.weight": "head",
    "layers.*.q.weight": "hidden",
    "layers.*.k.weight": "hidden",
    "layers.*.o.weight": "hidden_out",
    "layers.*.norm.weight": "gain",
    "layers.*.norm.bias": "bias",
    "norm.weight": "final_gain",
}
GROWS = dict.fromkeys(ROLES, 1.0)
FIXED = {"embedding.weight": 0.0, "head.weight": 0.0}
LADDER = Ladder(optimizer="adamw", roles=ROLES, fan_in=GROWS, fan_out=GROWS | FIXED, tokens=True)
LIMITS = Thresholds()


def right(kind: str, name: str, ladder: Ladder = LADDER) -> Expectation:
    found = expectation(kind, name, ladder, LIMITS)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("kind", "name", "slope"),
    [
        ("activation", "layers.*.q", 0),
        ("activation", "layers.*.o", 0),
        ("activation", "embedding", 0),
        ("residual", "layers.*", 0),
        ("attention_logits", "layers.*.attend", 0),
        ("logits", "self-token logits", 0),
        ("logits", "other-token logits", -0.5),
        ("loss", "loss", 0),
        ("delta_activation", "layers.*.q", 0),
        ("delta_activation", "layers.*.o", 0),
        ("delta_residual", "layers.*", 0),
        ("delta_attention_logits", "layers.*.attend", 0),
        ("delta_logits", "logits", 0),
        ("weight", "layers.*.q.weight", -0.5),
        ("weight", "layers.*.o.weight", -0.5),
        ("weight", "embedding.weight", 0),
        ("weight", "head.weight", 0),
        ("weight", "norm.weight", 0),
        ("update", "embedding.weight", 0),
        ("update", "head.weight", 0),
        ("update", "layers.*.norm.weight", 0),
        ("update", "layers.*.norm.bias", 0),
        ("update", "norm.weight", 0),
        ("update_norm", "layers.*.q.weight", 0),
        ("update_norm", "layers.*.o.weight", 0),
    ],
)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_slopes_that_do_not_depend_on_the_optimizer(
    kind: str, name: str, slope: float, optimizer: str
) -> None:
    assert right(kind, name, replace(LADDER, optimizer=optimizer)).slope == slope


@pytest.mark.parametrize(("optimizer", "slope"), [("adamw", -1), ("muon", -0.5)])
@pytest.mark.parametrize("name", ["layers.*.q.weight", "layers.*.k.weight", "layers.*.o.weight"])
def test_slopes_of_the_update_of_hidden_matrices(name: str, optimizer: str, slope: float) -> None:
    assert right("update", name, replace(LADDER, optimizer=optimizer)).slope == slope


@pytest.mark.parametrize(
    ("fan_in", "fan_out", "adamw", "muon", "weight"),
    [
        (1, 1, -1, -0.5, -0.5),
        (1, 0, -1, -1, -0.5),  # sqrt(out/in) O of out rows: RMS sqrt(out)/in
        (1, 2, -1, -0.5, -0.5),  # more rows than columns: each column is a unit vector
        (2, 1, -2, -1.5, -1),
        (0, 0, 0, 0, 0),
        (0.5, 1, -0.5, -0.25, -0.25),
    ],
)
def test_matrices_that_grow_otherwise(
    fan_in: float, fan_out: float, adamw: float, muon: float, weight: float
) -> None:
    """Exponents follow the fan-in: the learning rate 1/fan-in, the init its square root."""
    name = "layers.*.q.weight"
    ladder = replace(LADDER, fan_in={name: fan_in}, fan_out={name: fan_out})
    assert right("update", name, ladder).slope == adamw
    assert right("update", name, replace(ladder, optimizer="muon")).slope == muon
    assert right("weight", name, ladder).slope == weight
    assert right("update_norm", name, ladder).slope == 0


def test_growing_heads_shrink_attention_logits_at_init_but_may_move_them_less() -> None:
    """q.k is a sum of head_dim random signs over head_dim; its change is aligned."""
    name, ladder = "layers.*.attend", replace(LADDER, head_dim=1.0)
    assert right("attention_logits", name, ladder).slope == -0.5
    assert right("attention_logits", name, replace(LADDER, head_dim=0.5)).slope == -0.25
    change = right("delta_attention_logits", name, ladder)
    assert (change.slope, change.below) == (0, None)
    assert right("delta_attention_logits", name).below is not None


@pytest.mark.parametrize(
    ("kind", "name", "above", "below"),
    [
        ("activation", "layers.*.q", LIMITS.init, LIMITS.init),
        ("activation", "layers.*.o", LIMITS.init.times(2), LIMITS.init.times(2)),
        ("residual", "layers.*", LIMITS.init, LIMITS.init),
        ("attention_logits", "layers.*.attend", LIMITS.init, LIMITS.init),
        ("delta_activation", "layers.*.q", LIMITS.change, LIMITS.change),
        ("delta_activation", "layers.*.q (call 2)", LIMITS.change, LIMITS.change),
        ("delta_activation", "layers.*.o", LIMITS.change.times(2), LIMITS.change.times(2)),
        ("delta_activation", "layers.*.o (call 2)", LIMITS.change.times(2),
         LIMITS.change.times(2)),
        ("delta_residual", "layers.*", LIMITS.change.times(2), LIMITS.change.times(2)),
        ("delta_logits", "logits", LIMITS.change, LIMITS.logits_change_below),
        ("logits", "self-token logits", LIMITS.self_logits, None),
        ("logits", "other-token logits", LIMITS.other_logits, LIMITS.other_logits_below),
        ("loss", "loss", LIMITS.loss, None),
        ("weight", "layers.*.q.weight", LIMITS.weight, LIMITS.weight),
        ("update", "layers.*.q.weight", LIMITS.update, LIMITS.update),
        ("update", "embedding.weight", LIMITS.update, LIMITS.update),
        ("update_norm", "layers.*.q.weight", LIMITS.norm_above, LIMITS.norm_below),
    ],
)  # fmt: skip
def test_tolerances(kind: str, name: str, above: Tolerance, below: Tolerance | None) -> None:
    found = right(kind, name)
    assert (found.above, found.below) == (above, below)


def test_tolerances_under_muon() -> None:
    ladder = replace(LADDER, optimizer="muon")
    update = right("update", "layers.*.q.weight", ladder)
    assert (update.above, update.below) == (LIMITS.muon_update_above, None)
    norm = right("update_norm", "layers.*.q.weight", ladder)
    assert (norm.above, norm.below) == (LIMITS.muon_norm, LIMITS.muon_norm)
    aux = right("update", "embedding.weight", ladder)
    assert (aux.above, aux.below) == (LIMITS.update, LIMITS.update)


def test_the_reference_s_tolerances_are_the_defaults() -> None:
    """Proposed there: init .08/.15, change .15/.25, update +-.1; a failure beyond a warning."""
    assert Tolerance(warn=0.08, fail=0.15) == LIMITS.init
    assert Tolerance(warn=0.15, fail=0.25) == LIMITS.change
    assert LIMITS.update.warn == 0.1
    tolerances = [getattr(LIMITS, each.name) for each in fields(LIMITS)]
    assert all(0 < t.warn < t.fail for t in tolerances if isinstance(t, Tolerance))
    assert sum(isinstance(t, Tolerance) for t in tolerances) == len(tolerances) - 2


@pytest.mark.parametrize(("kind", "name"), UNJUDGED)
def test_logits_are_judged_apart_at_init_and_together_later(kind: str, name: str) -> None:
    assert expectation(kind, name, LADDER, LIMITS) is None


def test_without_tokens_all_logits_are_judged_together() -> None:
    ladder = replace(LADDER, tokens=False)
    logits = right("logits", "logits", ladder)
    assert (logits.slope, logits.above, logits.below) == (0, LIMITS.any_logits, None)


@pytest.mark.parametrize("kind", ["update_ratio", "something"])
def test_other_kinds_have_no_right_slope(kind: str) -> None:
    assert expectation(kind, "layers.*.q.weight", LADDER, LIMITS) is None


def test_module_roles() -> None:
    assert LADDER.module_role("layers.*.o") == "hidden_out"
    assert LADDER.module_role("layers.*.o (call 3)") == "hidden_out"
    assert LADDER.module_role("layers.*.attend") is None
    only_bias = replace(LADDER, roles={"shift.offset": "bias"})
    assert only_bias.module_role("shift") == "bias"


def test_every_judged_side_has_a_cause_of_its_own() -> None:
    names = {"weight": [*ROLES], "update": [*ROLES], "later_update": [*ROLES],
             "update_norm": ["layers.*.q.weight", "layers.*.o.weight"],
             "logits": ["self-token logits", "other-token logits"], "loss": ["loss"]}  # fmt: skip
    for optimizer in ("adamw", "muon"):
        shares = {kind for kind in SUBJECTS if is_share(kind)}
        for kind in SUBJECTS.keys() - {"branch", "delta_branch"} - shares:
            for name in names.get(kind, ["layers.*.q"]):
                if (optimizer, kind) == ("muon", "later_update") and LADDER.roles[name].startswith(
                    "hidden"
                ):
                    continue
                found = right(kind, name, replace(LADDER, optimizer=optimizer))
                assert found.cause_above, kind
                if found.below is not None:
                    assert found.cause_below, kind
                    assert found.cause_above != found.cause_below or kind == "later_update"


@pytest.mark.parametrize(
    ("name", "adamw", "muon"),
    [("embedding.weight", 0, 0), ("norm.weight", 0, 0), ("layers.*.q.weight", -1, None)],
)
def test_later_updates_go_as_the_learning_rate(name: str, adamw: float, muon: float | None) -> None:
    found = right("later_update", name)
    assert (found.slope, found.above, found.below) == (adamw, LIMITS.change, LIMITS.change)
    under_muon = expectation("later_update", name, replace(LADDER, optimizer="muon"), LIMITS)
    assert (None if under_muon is None else under_muon.slope) == muon


def test_a_right_norm_falls_by_the_square_root_of_the_width_at_most() -> None:
    """lr = 1/fan-in: the norm is 1 for equal rows, fan-in^-1/2 for independent ones."""
    assert LIMITS.norm_below.warn == 0.5


def test_growing_heads_are_told_of_their_softmax_scale() -> None:
    name = "layers.*.attend"
    growing = right("attention_logits", name, replace(LADDER, head_dim=1.0))
    assert "1/sqrt(head_dim) where 1/head_dim is right" in growing.cause_above
    assert "head_dim" not in right("attention_logits", name).cause_above
