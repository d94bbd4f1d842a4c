"""The check's own examination: every bug of the zoo is caught and named, nothing else is."""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from mutransfer.coord_check import CoordCheckResult

sys.path.insert(0, str(Path(__file__).parents[1]))
zoo: Any = importlib.import_module("coord_zoo")


@functools.cache
def examined(name: str) -> CoordCheckResult:
    bug = zoo.bug(name)
    result: CoordCheckResult = zoo.check(bug.variant, bug.inject)
    return result


def parts_in_order(text: str, parts: tuple[str, ...]) -> bool:
    place = 0
    for part in parts:
        place = text.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


@pytest.mark.parametrize("name", [bug.name for bug in zoo.ZOO])
def test_a_bug_is_caught_by_what_should_catch_it(name: str) -> None:
    bug, result = zoo.bug(name), examined(name)
    told = zoo.measured(result)
    assert (result.measured_verdict == "FAIL") == (bug.caught == "measured"), told[:2]
    assert bool(result.symbolic) == (bug.caught != "preflight" and not bug.hidden)
    assert result.verdict == ("FAIL" if bug.caught != "preflight" else result.measured_verdict)
    first = told if bug.caught == "measured" else result.culprits
    if bug.says:
        assert parts_in_order(first[0], bug.says), first[0]
    assert bool(bug.reason) == (bug.caught != "measured")


@pytest.mark.parametrize("variant", zoo.CORRECT, ids=lambda variant: variant.name)
def test_what_is_correct_has_no_fault(variant: Any) -> None:
    result = zoo.check(variant)
    assert [q.sentence for q in result.quantities if q.verdict == "FAIL"] == []
    assert result.symbolic == ()
    assert result.axis == variant.axis


@pytest.mark.slow
@pytest.mark.parametrize("variant", zoo.CORRECT, ids=lambda variant: variant.name)
def test_what_is_correct_has_no_fault_in_the_default_check(variant: Any) -> None:
    result = zoo.check(variant, run=zoo.DEFAULT, number=1)
    assert [q.sentence for q in result.quantities if q.verdict == "FAIL"] == []


def test_names_are_unique() -> None:
    names = [each.name for each in (*zoo.ZOO, *zoo.CORRECT)]
    assert len(names) == len(set(names))


def test_checks_of_different_numbers_share_no_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[list[int]] = []

    def record(factory: Any, sizes: Any, *, seeds: int, **rest: Any) -> None:
        found.append([factory(size, seed) for size in sizes for seed in range(seeds)])

    found: list[Any] = []
    monkeypatch.setattr(zoo, "coord_check", record)
    monkeypatch.setattr(zoo, "make", lambda variant, size, seed, inject, run: seed)
    for number in range(3):
        zoo.check(zoo.ADAMW, number=number)
        seeds.append(sorted(set(found[-1])))
    assert seeds == [[0, 1], [2, 3], [4, 5]]
