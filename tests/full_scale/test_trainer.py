"""One step of the trainer: against plain torch, across batches, and over the hand-over."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from full_scale import checkpoint
from full_scale.checkpoint import Identity
from full_scale.recipe import Recipe
from full_scale.trainer import Trainer
from mutransfer.apply import initialize
from mutransfer.bundle import Bundle
from mutransfer.errors import UserError
from mutransfer.groups import param_groups
from proxies.data import Batches, Corpus
from proxies.decoder import Decoder

IDENTITY = Identity(bundle="b" * 64, recipe="r" * 64, data="d" * 64)

Make = Callable[..., Trainer]
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def make(bundle: Bundle, corpus: Corpus, recipe_fields: dict[str, Any]) -> Make:
    """Makes a trainer; keywords change the recipe."""

    def trainer(**change: Any) -> Trainer:
        recipe = Recipe.model_validate({**recipe_fields, **change})
        return Trainer(recipe=recipe, table=bundle.table, corpus=corpus)

    return trainer


def weights(trainer: Trainer) -> Tensors:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def moments(trainer: Trainer) -> Tensors:
    return {name: t.clone() for name, t in trainer.optimizers.state_tensors().items()}


def equal(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_steps_equal_a_plain_torch_loop(make: Make, bundle: Bundle, corpus: Corpus) -> None:
    trainer = make()
    model = Decoder(trainer.recipe.model)
    initialize(model, bundle.table, seed=0)
    optimizer = AdamW(param_groups(model, bundle.table, "adamw"))
    batches = Batches(corpus.train, seq_len=16, batch_size=4, seed=0)
    for step, factor in enumerate((0.5, 1.0, 1.0)):
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak_lr"]
        loss = model.loss(torch.from_numpy(batches.at(step)))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done = trainer.train_step()
        assert done.loss == pytest.approx(loss.item(), rel=1e-6)
        assert done.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trainer.model.get_parameter(name), parameter, msg=name)


def test_accumulated_gradients_are_those_of_the_batch(make: Make) -> None:
    phase = {"name": "one", "steps": 1, "seq_len": 16, "batch_size": 8}
    whole = make(phases=[phase]).train_step()
    parts = make(phases=[{**phase, "micro_batch": 2}]).train_step()
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert parts.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)


def test_batches_go_on_through_phases(make: Make, corpus: Corpus) -> None:
    trainer = make()
    stream = Batches(corpus.train, seq_len=16, batch_size=1, seed=0)
    seen = torch.cat([trainer.batch(step) for step in range(13)])
    assert torch.equal(seen, torch.from_numpy(stream.take(0, len(seen))))  # nothing twice or left
    long = Batches(corpus.train, seq_len=32, batch_size=1, seed=0)
    position = math.ceil(trainer.recipe.tokens_before(13) / 32)
    assert torch.equal(trainer.batch(13), torch.from_numpy(long.take(position, 4)))
    assert torch.equal(trainer.batch(14), torch.from_numpy(long.take(position + 4, 4)))


def test_learning_rates_follow_the_recipe(make: Make) -> None:
    trainer = make()
    peaks = {id(group): group["peak_lr"] for group in trainer.optimizers.groups}
    trainer.train_step()
    assert all(g["lr"] == 0.5 * peaks[id(g)] for g in trainer.optimizers.groups)
    trainer.train_step()
    assert all(g["lr"] == peaks[id(g)] for g in trainer.optimizers.groups)
    rates = trainer.learning_rates()
    assert sum(len(label.split("+")) for label in rates) == 5  # every role once
    row = trainer.table.row("layers.0.attention.q.weight")
    assert rates["hidden+hidden_out"] == row.optimizers.adamw.lr


@pytest.mark.parametrize("momentum", ["seed", "fresh"])
def test_the_hand_over_happens_once_and_where_declared(
    make: Make, recipe_fields: dict[str, Any], momentum: str
) -> None:
    recipe_fields["phases"][3]["momentum"] = momentum
    trainer = make(phases=recipe_fields["phases"])
    done = []
    while trainer.step < trainer.recipe.steps:
        before, kind = moments(trainer), trainer.optimizers.kind
        done.append(trainer.train_step(measure=True))
        if done[-1].handed_over:
            assert kind == "adamw"
            after = moments(trainer)
            # what stays on AdamW goes on counting; the hidden matrices have Muon's state alone
            assert after["embedding.weight/step"] == before["embedding.weight/step"] + 1 == 10
            q = "layers.0.attention.q.weight"
            assert [k for k in after if k.startswith(q)] == [f"{q}/momentum_buffer"]
            # a buffer b became 0.95 b + 0.05 g: the seed is still 0.95 of it, or nothing is
            seed, buffer = before[f"{q}/exp_avg"], after[f"{q}/momentum_buffer"]
            along = float((seed * buffer).sum() / seed.square().sum())
            assert (along > 0.8) == (momentum == "seed")
    assert [i for i, step in enumerate(done) if step.handed_over] == [9]
    assert trainer.optimizers.kind == "muon"
    # RMS-matched Muon: 0.2 lr on hidden matrices, less where the gradient is not of full rank
    lr = trainer.learning_rates()["hidden+hidden_out"]
    rms = done[-1].update_rms
    assert rms is not None
    assert 0.05 * lr < rms["hidden"] < 0.25 * lr


def test_update_rms_is_the_change_by_role(make: Make) -> None:
    trainer = make()
    before = weights(trainer)
    assert trainer.train_step().update_rms is None
    middle = weights(trainer)
    measured = trainer.train_step(measure=True).update_rms
    after = weights(trainer)
    assert measured is not None
    assert trainer.update_rms == measured
    assert set(measured) == {"embedding", "hidden", "hidden_out", "gain", "final_gain"}
    for role, names in (("embedding", ["embedding.weight"]), ("final_gain", ["norm.weight"]),
                        ("gain", [n for n in after if "_norm." in n])):  # fmt: skip
        change = torch.cat([(after[n] - middle[n]).flatten() for n in names])
        assert measured[role] == pytest.approx(change.square().mean().sqrt().item(), rel=1e-5)
    assert not equal(before, middle)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped(
    make: Make, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    trainer = make()
    trainer.train_step()
    before, state, third = weights(trainer), moments(trainer), trainer.batch(2)
    loss = trainer.model.loss

    def broken(tokens: torch.Tensor) -> torch.Tensor:
        value = loss(tokens)
        # sqrt has an infinite slope at zero: the loss stays finite, its gradient does not
        return value * math.nan if where == "loss" else value + (value - value.detach()).sqrt()

    with monkeypatch.context() as patch:
        patch.setattr(trainer.model, "loss", broken)
        done = trainer.train_step(measure=True)
    assert done.skipped
    assert done.update_rms is None
    assert math.isfinite(done.loss) == (where == "gradient")
    assert equal(weights(trainer), before)
    assert equal(moments(trainer), state)
    assert (trainer.step, trainer.skipped, trainer.skipped_in_a_row) == (2, 1, 1)
    assert torch.equal(trainer.batch(trainer.step), third)
    assert not trainer.train_step().skipped
    assert (trainer.step, trainer.skipped, trainer.skipped_in_a_row) == (3, 1, 0)


def test_bf16_keeps_weights_and_moments_in_fp32(make: Make) -> None:
    plain, mixed = make(), make(precision="bf16")
    left, right = plain.train_step().loss, mixed.train_step().loss
    assert left != right
    assert right == pytest.approx(left, rel=0.01)
    assert {t.dtype for t in (*weights(mixed).values(), *moments(mixed).values())} == {
        torch.float32
    }


def test_every_step_can_be_taken_up_bit_for_bit(make: Make, tmp_path: Path) -> None:
    trainer = make()
    states = []
    for _ in range(trainer.recipe.steps):
        path = checkpoint.save(tmp_path, trainer.snapshot(IDENTITY))
        trainer.train_step()
        states.append((path, weights(trainer), moments(trainer)))
    for path, after, state in states:
        again = make()
        again.restore(checkpoint.load(path, IDENTITY))
        again.train_step()
        assert equal(weights(again), after), path.name
        assert equal(moments(again), state), path.name


def test_a_checkpoint_in_which_every_step_was_skipped(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make()
    loss = trainer.model.loss
    with monkeypatch.context() as patch:
        patch.setattr(trainer.model, "loss", lambda tokens: loss(tokens) * math.inf)
        assert trainer.train_step().skipped
    again = make()
    again.restore(trainer.snapshot(IDENTITY))
    assert (again.step, again.skipped, again.skipped_in_a_row) == (1, 1, 1)
    assert again.train_step().loss == trainer.train_step().loss


def test_checkpoints_that_do_not_fit_are_refused(make: Make) -> None:
    trainer = make()
    trainer.train_step()
    good = trainer.snapshot(IDENTITY)

    def refused(match: str, state: dict[str, Any], model: Tensors | None = None) -> None:
        bad = checkpoint.Checkpoint(
            model=good.model if model is None else model,
            optimizer=good.optimizer,
            state=good.state.model_copy(update=state),
        )
        with pytest.raises(UserError, match=match):
            make().restore(bad)

    refused("of another optimizer; got muon; expected adamw", {"optimizer": "muon"})
    refused("of another recipe", {"tokens": good.state.tokens + 1})
    refused("of another recipe", {"step": 17})
    # the optimizer's tensors are AdamW's, whatever the step says
    state = {"step": 10, "tokens": trainer.recipe.tokens_before(10), "optimizer": "muon"}
    refused("momentum_buffer", state)
    refused("norm.weight: .*another model", {},
            {k: v for k, v in good.model.items() if k != "norm.weight"})  # fmt: skip
    refused("norm.weight: .*another model", {}, {**good.model, "norm.weight": torch.ones(3)})


def test_heldout_loss_is_the_mean_over_its_windows(make: Make, corpus: Corpus) -> None:
    trainer = make(heldout_tokens=200)  # 12 windows of 16, in 3 batches of 4
    windows = torch.from_numpy(corpus.heldout[: 12 * 16 + 1].astype("int64"))
    sequences = torch.stack([windows[16 * i : 16 * i + 17] for i in range(12)])
    with torch.no_grad():
        expected = trainer.model.loss(sequences).item()
    assert trainer.evaluate() == pytest.approx(expected, rel=1e-6)


def test_text_too_short_for_a_phase_is_refused_before_step_1(make: Make) -> None:
    phase = {"name": "one", "steps": 1, "seq_len": 2048, "batch_size": 64, "micro_batch": 1}
    with pytest.raises(UserError, match="too short for one batch"):
        make(phases=[phase], heldout_tokens=4096)
