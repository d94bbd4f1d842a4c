"""What the check says: sentences, merged names, the order of culprits, the table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mutransfer.coord_text import (
    SATURATED,
    SUBJECTS,
    culprits,
    excess,
    join_names,
    power,
    sentence,
    subject,
    table,
)
from mutransfer.coord_verdict import INITIAL, Quantity
from mutransfer.symbolic import Finding

BELOW = {"warn_below": 0.2, "fail_below": 0.4}


def quantity(kind: str, name: str, slope: float | None = 0.0, **changes: Any) -> Quantity:
    fields: dict[str, Any] = {
        "t": 0, "times": (0,), "expected": 0.0, "two_sided": True, "warn": 0.1, "fail": 0.2,
        **BELOW, "verdict": "PASS", "cause": "", "sentence": "",
        "low": None if slope is None else slope - 0.01,
        "high": None if slope is None else slope + 0.02, "slope_wide": slope,
    }  # fmt: skip
    return Quantity(kind=kind, name=name, slope=slope, **(fields | changes))


def finding(name: str, field: str, sentence: str) -> Finding:
    return Finding(name=name, field=field, got=1.0, expected=2.0, sentence=sentence)


@pytest.mark.parametrize(
    ("names", "joined"),
    [
        (["embedding.weight"], "embedding"),
        (["norm.bias"], "norm.bias"),
        (["layers.*.attention.q.weight", "layers.*.attention.k.weight"],
         "layers.*.attention.{q,k}"),
        (["a.b.weight", "c.weight", "a.d.weight", "e"], "a.{b,d}, c, e"),
        (["a.q (call 2)", "a.q"], "a.{q (call 2),q}"),
        (["logits"], "logits"),
    ],
)  # fmt: skip
def test_names_with_one_parent_are_merged(names: list[str], joined: str) -> None:
    assert join_names(names) == joined


@pytest.mark.parametrize(
    ("slopes", "text"),
    [
        ([-0.98], "width^-0.98"),
        ([0.02, -0.98, -0.5], "width^-0.98…+0.02"),
        ([0.1, 0.1001], "width^+0.10"),
        ([-0.0], "width^+0.00"),
        ([-0.004], "width^+0.00"),
        ([-0.004, 0.004], "width^+0.00"),
    ],
)
def test_powers(slopes: list[float], text: str) -> None:
    assert power(slopes) == text


def test_subjects() -> None:
    assert subject("update", ["a.q.weight", "a.k.weight"]) == "first updates of a.{q,k}"
    assert subject("logits", ["self-token logits"]) == "self-token logits at init"
    assert subject("residual", ["layers.*"]) == "the residual stream at init"


def test_sentence_of_one_quantity() -> None:
    right = quantity("update", "a.q.weight", -0.97, expected=-1.0)
    assert sentence([right]) == "first updates of a.q scale as width^-0.97, right is width^-1.00"
    wrong = quantity("loss", "loss", 0.3, two_sided=False, verdict="FAIL", cause="too large")
    assert sentence([wrong]) == (
        "the loss at init scales as width^+0.30, right is at most width^+0.00: too large"
    )


def test_sentence_of_several_quantities() -> None:
    several = [quantity("update", f"a.{name}.weight", slope, expected=-1.0, cause="no 1/width")
               for name, slope in (("q", 0.1), ("k", -0.2))]  # fmt: skip
    assert sentence(several) == (
        "first updates of a.{q,k} scale as width^-0.20…+0.10, right is width^-1.00: no 1/width"
    )


def test_sentence_without_a_slope_is_the_cause() -> None:
    dead = quantity("update", "a.q.weight", None, verdict="FAIL", cause="nothing moves it")
    assert sentence([dead]) == "first updates of a.q: nothing moves it"


def test_culprits_are_merged_by_verdict_kind_cause_and_right_slope() -> None:
    told = culprits(
        [
            quantity("update", "a.q.weight", 0.0, expected=-1.0, verdict="FAIL", cause="no 1/m"),
            quantity("update", "a.k.weight", 0.1, expected=-1.0, verdict="FAIL", cause="no 1/m"),
            quantity("update", "a.v.weight", -0.8, expected=-1.0, verdict="WARN", cause="no 1/m"),
            quantity("update", "a.o.weight", 0.3, expected=-0.5, verdict="FAIL", cause="no 1/m"),
            quantity("update", "a.b.weight", 0.3, expected=-1.0, verdict="FAIL", cause="other"),
            quantity("update", "a.c.weight", -1.0, expected=-1.0),
        ],
        (),
    )
    assert told == (  # of one verdict and kind, the one furthest off first
        "first updates of a.b scale as width^+0.30, right is width^-1.00: other",
        "first updates of a.{q,k} scale as width^+0.00…+0.10, right is width^-1.00: no 1/m",
        "first updates of a.o scale as width^+0.30, right is width^-0.50: no 1/m",
        "first updates of a.v scale as width^-0.80, right is width^-1.00: no 1/m",
    )


def test_culprits_stand_worst_first_and_causes_before_consequences() -> None:
    kinds = ("delta_logits", "weight", "loss", "update", "activation")
    told = culprits(
        [
            quantity("weight", "embedding.weight", 0.1, verdict="WARN", cause="x"),
            *(quantity(kind, "a.q", 0.5, verdict="FAIL", cause="y") for kind in kinds),
        ],
        [finding("a.q.weight", "lr", "lr of a.q is wrong")],
    )
    starts = ["lr of a.q is wrong", "initial weights of a.q", "first updates", "activations",
              "the loss", "changes in the a.q", "initial weights of embedding"]  # fmt: skip
    assert len(told) == len(starts)
    for line, start in zip(told, starts, strict=True):
        assert line.startswith(start)


def test_later_updates_are_told_only_where_the_first_is_right() -> None:
    told = culprits(
        [
            quantity("update", "a.q.weight", 0.5, verdict="FAIL", cause="no 1/m"),
            quantity("later_update", "a.q.weight", 0.5, verdict="FAIL", cause="assigns"),
            quantity("update", "a.k.weight"),
            quantity("later_update", "a.k.weight", 0.5, verdict="FAIL", cause="assigns"),
        ],
        (),
    )
    assert [line.partition(" scale")[0] for line in told] == [
        "first updates of a.q", "later updates of a.k"
    ]  # fmt: skip


def test_one_sided_first_updates_are_not_told_beside_the_norm_that_tells_the_same() -> None:
    """Under Muon the norm names all matrices, and the RMS only some of them."""
    one_sided = {"two_sided": False, "warn_below": None, "fail_below": None}
    wrong: dict[str, Any] = {"verdict": "FAIL", "cause": "no root"}
    update = quantity("update", "a.q.weight", 0.5, **wrong, **one_sided)
    norms = [quantity("update_norm", f"a.{name}.weight", 0.5, **wrong) for name in "qk"]
    (told,) = culprits([update, *norms], ())
    assert told.startswith("operator norms of the updates of a.{q,k} scale")
    assert len(culprits([update], ())) == 1
    assert len(culprits([replace(update, two_sided=True), *norms], ())) == 2


def test_a_consequence_is_told_after_its_cause() -> None:
    told = culprits(
        [
            quantity("update", "embedding.weight", -0.3, verdict="FAIL", cause=SATURATED),
            quantity("loss", "loss", 0.5, verdict="FAIL", cause="the logits grow"),
            quantity("delta_logits", "logits", 0.3, verdict="WARN", cause="y"),
        ],
        (),
    )
    assert [line.partition(" scale")[0] for line in told] == [
        "the loss at init", "first updates of embedding", "changes in the logits"
    ]  # fmt: skip


def test_eps_is_told_as_a_share_and_depth_as_depth() -> None:
    eps = quantity("eps_share", "a.q.weight", 0.34, verdict="FAIL", cause="too large")
    assert sentence([eps]) == (
        "eps takes up to 34% off the steps of a.q, right is at most 10%: too large"
    )
    deep = quantity("update", "a.q.weight", -0.5, verdict="FAIL", cause="lr", axis="depth")
    assert sentence([deep]) == (
        "first updates of a.q scale as depth^-0.50, right is depth^+0.00: lr"
    )


def test_symbolic_findings_of_one_field_are_told_once() -> None:
    told = culprits(
        [],
        [
            finding("a.q.weight", "lr", "lr of q"),
            finding("a.k.weight", "lr", "lr of k"),
            finding("norm.weight", "eps", "eps of norm"),
            finding("a.v.weight", "lr", "lr of v"),
        ],
    )
    assert told == ("lr of q (and 2 more like it)", "eps of norm")


def test_nothing_wrong_has_no_culprit() -> None:
    assert culprits([quantity("loss", "loss")], []) == ()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"slope": 0.1}, 0.5),
        ({"slope": -0.1}, 0.25),
        ({"slope": 0.0}, 0.0),
        ({"slope": -0.4, "expected": -0.5}, 0.5),
        ({"slope": -0.4, "warn_below": None, "fail_below": None}, 0.0),
        ({"slope": None}, float("inf")),
    ],
)
def test_excess_is_in_units_of_what_fails(changes: dict[str, Any], expected: float) -> None:
    assert excess(quantity("update", "a.q.weight", **changes)) == pytest.approx(expected)


def test_the_table_has_a_line_per_kind_with_the_worst_curve() -> None:
    lines = table(
        [
            quantity("loss", "loss", -0.25, two_sided=False, warn_below=None, fail_below=None),
            quantity("update", "a.q.weight", -0.95, expected=-1.0),
            quantity("update", "a.k.weight", -1.15, expected=-1.0),
            quantity("weight", "a.q.weight", -0.4, expected=-0.5, verdict="WARN", cause="x"),
            quantity("weight", "a.k.weight", -0.7, expected=-0.5),
            quantity("delta_logits", "logits", None, verdict="FAIL", cause="diverges"),
            quantity("delta_logits", "others", 9.0, verdict="FAIL", cause="y"),
        ]
    )
    assert lines[0].split() == [
        "quantity",
        "curves",
        "slope,",
        "furthest",
        "off",
        "right",
        "verdict",
    ]
    cells = [[cell for cell in line.strip().split("  ") if cell] for line in lines[1:]]
    assert [[cell.strip() for cell in row] for row in cells] == [
        ["initial weights", "2", "-0.40 [-0.41, -0.38]", "-0.5", "WARN"],
        ["first updates", "2", "-1.15 [-1.16, -1.13]", "-1.0", "PASS"],
        ["the loss at init", "1", "-0.25 [-0.26, -0.23]", "≤ +0.0", "PASS"],
        ["changes in the logits", "2", "none", "+0.0", "FAIL"],
    ]
    assert len({len(line) for line in lines[1:]}) == 1


def test_every_judged_kind_has_a_subject() -> None:
    assert SUBJECTS.keys() >= INITIAL
    assert {kind for kind in SUBJECTS if kind.startswith("delta_")} == {
        "delta_activation", "delta_branch", "delta_residual", "delta_attention_logits",
        "delta_logits",
    }  # fmt: skip
