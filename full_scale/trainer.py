"""One step of the run: a function of the weights, the optimizers' state and the step's number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from full_scale.attention_logits import watched
from full_scale.checkpoint import Checkpoint, Identity, State
from full_scale.feed import Feed
from full_scale.recipe import Phase, Recipe
from mutransfer.apply import initialize
from mutransfer.errors import UserError
from mutransfer.optimizers import Optimizers
from mutransfer.roles import Role
from mutransfer.table import Table
from proxies.data import Corpus, Sequences, Source, heldout_batches
from proxies.data.prefetch import Prefetch
from proxies.data.stream import document_numbers
from proxies.decoder import Decoder
from proxies.run import passes_in


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step did.

    Attributes:
        loss: Mean cross-entropy of the batch before the update, in nats; may be non-finite.
        grad_norm: Global gradient norm before clipping; may be non-finite.
        skipped: Whether loss or gradient was not finite, so that nothing was updated.
        handed_over: Whether the hidden matrices went from AdamW to Muon before this step.
        update_rms: Root mean square of the weights' change by role, where it was measured.
        attention_logit: The largest of the first micro-batch, where it was measured.
    """

    loss: float
    grad_norm: float
    skipped: bool
    handed_over: bool
    update_rms: dict[str, float] | None
    attention_logit: float | None = None


class Trainer:
    """Weights, optimizers and data of a run, and the step that moves them.

    A batch is a function of the step alone, so that a run can be taken up anywhere. The position
    in the text is counted in tokens: phases of equal `seq_len` go on where the one before
    stopped; another `seq_len` cuts the text into other windows, in an order of its own. The
    sources of a mixture go on to the token. Batches are made beside the training, in a thread
    that `close` ends.

    Args:
        recipe: The run.
        table: The parametrization of its model, ready to use.
        corpus: The text.
        device: Where to train.
        sources: What the recipe's mixtures name (`full_scale.feed.open_sources`).

    Attributes:
        feed: What each step trains on.
        step: Steps done, skipped ones included.
        skipped: Steps skipped so far.
        skipped_in_a_row: How many of these were the last ones in a row.
        update_rms: By role, at the last step that measured it.

    Raises:
        UserError: Model and table do not match, or the text is too short for a phase.
    """

    def __init__(
        self,
        *,
        recipe: Recipe,
        table: Table,
        corpus: Corpus,
        device: str = "cpu",
        sources: Mapping[str, Source] | None = None,
    ) -> None:
        self.recipe, self.table, self.device = recipe, table, torch.device(device)
        self.model = Decoder(recipe.model).to(self.device)
        initialize(self.model, table, seed=recipe.seed)
        self.optimizers = Optimizers(self.model, table, recipe.phases[0].optimizer)
        self.step, self.skipped, self.skipped_in_a_row = 0, 0, 0
        self.update_rms: dict[str, float] = {}
        self._rows = table.resolve(self.model)
        self.feed = Feed(recipe, corpus, sources or {})
        self._prefetch = Prefetch(self._prepare, stop=recipe.steps)
        self._separator = corpus.separator
        first = recipe.phases[0]
        self._heldout = heldout_batches(
            corpus.heldout, first.seq_len, first.micro, recipe.heldout_tokens
        )

    @property
    def tokens(self) -> int:
        """Tokens consumed so far."""
        return self.recipe.tokens_before(self.step)

    def batch(self, step: int) -> Tensor:
        """The sequences of a step (0-based): (batch, seq + 1)."""
        return torch.from_numpy(self.feed.at(step).tokens).to(self.device)

    @property
    def waited(self) -> float:
        """Seconds that steps have waited for their data so far."""
        return self._prefetch.waited

    def close(self) -> None:
        """Ends the thread that makes batches; no step can be taken after it."""
        self._prefetch.close()

    def train_step(self, *, measure: bool = False) -> Step:
        """Takes the next step of the recipe.

        A loss or gradient that is not finite leaves weights and moments as they are; its data
        counts as consumed.

        Args:
            measure: Whether to measure the change of the weights, at the cost of a copy of them,
                and the largest attention logit.
        """
        phase, index = self.recipe.at(self.step)
        handed_over = self._hand_over(phase)
        self.optimizers.set_lr(phase.factor(index))
        self.model.memory = phase.memory
        loss, logit = self._gradients(phase, measure)
        norm = float(
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm or math.inf)
        )
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        update_rms = None
        if not skipped:
            before = self._copy() if measure else None
            self.optimizers.step()
            if before is not None:
                update_rms = self.update_rms = self._change(before)
        self.optimizers.zero_grad()
        self.step += 1
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        return Step(loss=loss, grad_norm=norm, skipped=skipped, handed_over=handed_over,
                    update_rms=update_rms, attention_logit=logit)  # fmt: skip

    @torch.no_grad()
    def evaluate(self) -> float:
        """Held-out loss in nats per token, at the first phase's `seq_len` all through the run."""
        masked = self.recipe.mask_documents
        losses = []
        for batch in self._heldout:
            numbers = document_numbers(batch[:, :-1], self._separator) if masked else None
            part = _tensors(Sequences(tokens=batch, documents=numbers), pin=False)
            losses.append(self._loss(*(t.to(self.device) for t in part)).item())
        return sum(losses) / len(losses)

    def learning_rates(self) -> dict[str, float]:
        """The learning rate of each parameter group now, by the roles in it."""
        return {label: float(group["lr"]) for label, group in self._labelled_groups().items()}

    def group_settings(self) -> dict[str, dict[str, float]]:
        """Of each parameter group, by the roles in it: peak lr, and the shrinkage lr * wd there."""
        return {
            label: {
                "peak_lr": group["peak_lr"],
                "lr_times_weight_decay": group["peak_lr"] * group["weight_decay"],
            }
            for label, group in self._labelled_groups().items()
        }

    def snapshot(self, identity: Identity) -> Checkpoint:
        """All that the rest of the run depends on; the tensors are shared, not copied."""
        return Checkpoint(
            model=dict(self.model.named_parameters()),
            optimizer=self.optimizers.state_tensors(),
            state=State(
                identity=identity,
                step=self.step,
                tokens=self.tokens,
                optimizer=self.optimizers.kind,
                skipped=self.skipped,
                skipped_in_a_row=self.skipped_in_a_row,
                update_rms=self.update_rms,
            ),
        )

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes on from a checkpoint of the same run.

        Raises:
            UserError: Its tensors, step or optimizer are not this recipe's.
        """
        state = checkpoint.state
        if state.step > self.recipe.steps or state.tokens != self.recipe.tokens_before(state.step):
            raise UserError("the checkpoint is of another recipe", where=f"step {state.step}",
                            got=f"{state.tokens} tokens")  # fmt: skip
        kind = self.recipe.at(max(0, state.step - 1))[0].optimizer
        if state.optimizer != kind:
            raise UserError("the checkpoint is of another optimizer", where=f"step {state.step}",
                            got=state.optimizer, expected=kind)  # fmt: skip
        parameters = dict(self.model.named_parameters())
        if odd := sorted(parameters.keys() ^ checkpoint.model.keys()):
            raise UserError("the checkpoint is of another model", where=odd[0])
        for name, parameter in parameters.items():
            value = checkpoint.model[name]
            if value.shape != parameter.shape:
                raise UserError(
                    "the checkpoint is of another model",
                    where=name,
                    got=tuple(value.shape),
                    expected=tuple(parameter.shape),
                )
            parameter.copy_(value)
        self.optimizers = Optimizers(self.model, self.table, kind)
        if checkpoint.optimizer:  # empty where every step so far was skipped
            self.optimizers.load_state_tensors(checkpoint.optimizer)
        self.step, self.skipped = state.step, state.skipped
        self.skipped_in_a_row, self.update_rms = state.skipped_in_a_row, dict(state.update_rms)

    def _labelled_groups(self) -> dict[str, dict[str, Any]]:
        """The parameter groups by the roles in them."""
        groups: dict[str, dict[str, Any]] = {}
        for group in self.optimizers.groups:
            label = "+".join(sorted({self._rows[name].role for name in group["param_names"]}))
            if label in groups:  # the same roles at another width: told apart by a parameter
                label = f"{label} ({group['param_names'][0]})"
            groups[label] = group
        return groups

    def _hand_over(self, phase: Phase) -> bool:
        """Moves the hidden matrices to Muon where `phase` is the first that wants them there."""
        if self.optimizers.kind == phase.optimizer:
            return False
        self.optimizers.hand_over(phase.momentum)
        return True

    def _gradients(self, phase: Phase, measure: bool) -> tuple[float, float | None]:
        """Accumulates the gradients of the step's batch.

        Returns:
            The batch's mean loss and, if to be measured, the first part's largest attention logit.
        """
        batch = [t.to(self.device, non_blocking=True) for t in self._prefetch.get(self.step)]
        parts = list(zip(*(tensor.split(phase.micro) for tensor in batch), strict=True))
        total, logit = torch.zeros((), device=self.device), None
        for number, part in enumerate(parts):
            with watched(self.model, measure and number == 0) as seen:
                loss = self._loss(*part) / len(parts)
            logit = logit if seen.value is None else float(seen.value)
            loss.backward()
            total += loss.detach()
        return float(total), logit

    def _loss(self, *batch: Tensor) -> Tensor:
        """The loss of tokens and, where attention is masked, their documents."""
        with passes_in(self.recipe.precision, self.device):
            return self.model.loss(*batch)

    def _prepare(self, step: int) -> tuple[Tensor, ...]:
        return _tensors(self.feed.at(step), pin=self.device.type == "cuda")

    def _copy(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    @torch.no_grad()
    def _change(self, before: dict[str, Tensor]) -> dict[str, float]:
        """Root mean square of (weights now - `before`) by role."""
        squares: dict[Role, Tensor] = {}
        counts: dict[Role, int] = {}
        for name, parameter in self.model.named_parameters():
            role = self._rows[name].role
            square = (parameter - before[name]).square().sum()
            squares[role] = squares.get(role, torch.zeros_like(square)) + square
            counts[role] = counts.get(role, 0) + parameter.numel()
        return {role: math.sqrt(float(squares[role]) / counts[role]) for role in sorted(counts)}


def _tensors(sequences: Sequences, *, pin: bool) -> tuple[Tensor, ...]:
    """Tokens and, where there are any, document numbers; in pinned memory for a GPU."""
    arrays = (sequences.tokens, sequences.documents)
    tensors = (torch.from_numpy(array) for array in arrays if array is not None)
    return tuple(tensor.pin_memory() if pin else tensor for tensor in tensors)
