"""What a recipe takes, said before anything is spent."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from full_scale.plan import plan_gpus, plan_here, table
from full_scale.recipe import Recipe
from mutransfer.cli import main
from mutransfer.errors import UserError
from mutransfer.hardware import get_device
from proxies.cost import flops_per_token


def test_a_run_on_gpus(recipe: Recipe) -> None:
    plan = plan_gpus(recipe, gpus=2, device=get_device("a100"), mfu=0.5)
    tokens = {16: 0, 32: 0}
    for phase in recipe.phases:
        tokens[phase.seq_len] += phase.tokens
    flops = sum(n * flops_per_token(recipe.model, length) for length, n in tokens.items())
    assert plan.flops == flops
    assert plan.seconds == pytest.approx(flops / (2 * 0.5 * 19.5e12))
    assert plan.cost(3.0) == pytest.approx(plan.seconds / 3600 * 2 * 3.0)
    assert plan.fits
    lines = table(plan, 3.0)
    assert "1,408" in "\n".join(lines)
    assert lines[-1].startswith("cost 0.00")


def test_a_gpu_s_share_shrinks_with_their_number(recipe: Recipe) -> None:
    one, four = (plan_gpus(recipe, gpus=n, device=get_device("h100"), mfu=0.4) for n in (1, 4))
    assert four.memory < one.memory
    assert one.seconds == pytest.approx(4 * four.seconds)
    with pytest.raises(UserError, match="do not divide the batch"):
        plan_gpus(recipe, gpus=3, device=get_device("h100"), mfu=0.4)


def test_saving_memory_costs_time(recipe: Recipe) -> None:
    thrifty = recipe.model_copy(
        update={
            "phases": tuple(
                p.model_copy(update={"recompute": True, "loss_chunk": 8}) for p in recipe.phases
            )
        }
    )
    plain, less = (plan_gpus(r, gpus=1, device=get_device("h100"), mfu=0.4)
                   for r in (recipe, thrifty))  # fmt: skip
    assert less.flops == plain.flops
    assert 1.2 < less.seconds / plain.seconds < 4 / 3
    assert less.memory < plain.memory


def test_what_does_not_fit_says_so(recipe: Recipe) -> None:
    small = replace(get_device("h100"), memory_gb=1e-4)
    plan = plan_gpus(recipe, gpus=1, device=small, mfu=0.4)
    assert plan.memory > 1e5
    assert plan.fits is False
    assert "DOES NOT FIT into h100's 0.0001 GB" in table(plan)


def test_a_run_on_this_processor_is_timed(recipe: Recipe) -> None:
    ticks = iter(range(10**6))
    plan = plan_here(recipe, clock=lambda: float(next(ticks)))
    # every part takes one tick, at any depth: a pass per micro-batch and one update
    assert [p.seconds for p in plan.phases] == [
        p.steps * (p.batch_size // p.micro + 1) for p in recipe.phases
    ]
    assert plan.fits is None
    assert math.isfinite(plan.memory)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--recipe", "smoke", "--gpus", "2", "--price-per-hour", "2"]) == 0
    printed = capsys.readouterr().out
    assert "122,880" in printed
    assert "device hours at 2" in printed
    assert main(["plan"]) == 2
    assert main(["plan", "--recipe", "smoke", "--gpus", "2", "--gpu", "h10"]) == 2
    assert main(["plan", "quickstart", "--gpus", "1"]) == 0
    assert "transfer-check" in capsys.readouterr().out
