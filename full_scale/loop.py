"""The loop over a recipe's steps: what is logged, evaluated and saved, and when."""

from __future__ import annotations

import math
import time
from pathlib import Path

from full_scale import checkpoint
from full_scale.checkpoint import Identity
from full_scale.metrics import Metrics
from full_scale.recipe import Phase
from full_scale.stopping import Request
from full_scale.trainer import Step, Trainer
from mutransfer.errors import UserError
from mutransfer.progress import Report, duration
from proxies.cost import flops_per_token


class Loop:
    """Runs a trainer to the end of its recipe, or to a request to stop.

    Within a step the order is: update, metrics, held-out loss, checkpoint. A checkpoint so
    follows all that was recorded up to it, and nothing is there twice when it is taken up.

    Args:
        trainer: Where the run stands.
        identity: What its checkpoints belong to.
        folder: Of the run; checkpoints go to `checkpoints/` in it.
        metrics: The record.
        say: Takes what the user sees.
        request: Whether to stop between two steps.
        peak_flops: FLOP/s of the device at most, of which MFU is the used share; `None`: unknown.
    """

    def __init__(
        self,
        *,
        trainer: Trainer,
        identity: Identity,
        folder: Path,
        metrics: Metrics,
        say: Report,
        request: Request,
        peak_flops: float | None = None,
    ) -> None:
        self.trainer, self.identity = trainer, identity
        self.checkpoints = folder / "checkpoints"
        self.metrics, self.say, self.request = metrics, say, request
        self.peak_flops = peak_flops
        self._seconds, self._tokens, self._waited = 0.0, 0, trainer.waited

    def run(self) -> bool:
        """Whether the run reached its end; if not, it was saved where it stopped.

        Raises:
            UserError: Too many steps in a row were not finite.
        """
        trainer, recipe = self.trainer, self.trainer.recipe
        while trainer.step < recipe.steps:
            phase, index = recipe.at(trainer.step)
            number = trainer.step + 1
            ends = index + 1 == phase.steps
            log = number % recipe.log_every == 0 or index == 0 or ends
            hands_over = trainer.optimizers.kind != phase.optimizer
            before = trainer.update_rms
            groups = trainer.group_settings() if hands_over else {}
            started = time.perf_counter()
            step = trainer.train_step(measure=log)
            self._seconds += time.perf_counter() - started
            self._tokens += phase.batch_tokens
            if step.handed_over:
                self._log_hand_over(before, groups, step)
            if step.skipped:
                self._log_skipped(step)
            elif log:
                self._log(step, phase, index)
            if ends or _due(number, recipe.evaluate_every):
                self._evaluate(phase.name)
            last = number == recipe.steps
            if last or self.request.by or _due(number, recipe.checkpoint_every):
                self._save()
            if self.request.by and not last:
                return False
        return True

    def _save(self) -> None:
        self.metrics.sync()
        checkpoint.save(self.checkpoints, self.trainer.snapshot(self.identity))
        checkpoint.prune(self.checkpoints, self.trainer.recipe.keep_last)

    def _evaluate(self, phase: str) -> None:
        loss = self.trainer.evaluate()
        if not math.isfinite(loss):
            raise UserError(
                "the held-out loss is not finite",
                where=f"step {self.trainer.step}",
                got=loss,
                cure="The run diverged: check data and learning rate; the last checkpoint is kept.",
            )
        self._record("heldout", phase=phase, loss=loss)
        self.say(f"{phase} · step {self.trainer.step} · held-out loss {loss:.4f}")

    def _log(self, step: Step, phase: Phase, index: int) -> None:
        trainer, recipe = self.trainer, self.trainer.recipe
        speed, waited = self._tokens / self._seconds, trainer.waited
        share = (waited - self._waited) / self._seconds
        self._seconds, self._tokens, self._waited = 0.0, 0, waited
        used = None
        if self.peak_flops is not None:
            used = speed * flops_per_token(recipe.model, phase.seq_len) / self.peak_flops
        left = (phase.steps - index - 1) * phase.batch_tokens / speed
        self._record(
            "train",
            phase=phase.name,
            loss=step.loss,
            grad_norm=step.grad_norm,
            lr_factor=phase.factor(index),
            lr=trainer.learning_rates(),
            update_rms=step.update_rms,
            attention_logit=step.attention_logit,
            tokens_per_s=speed,
            mfu=used,
            phase_seconds_left=left,
            data_wait=share,
            data_tokens=trainer.feed.consumed(trainer.step),
            skipped=trainer.skipped,
        )
        mfu = "" if used is None else f" · MFU {used:.1%}"
        self.say(
            f"{phase.name} · step {trainer.step:,} of {recipe.steps:,} · loss {step.loss:.4f} · "
            f"{speed:,.0f} tok/s{mfu} · phase left {duration(left)}",
            trainer.tokens / recipe.horizon_tokens,
        )

    def _log_hand_over(
        self, before: dict[str, float], groups: dict[str, dict[str, float]], step: Step
    ) -> None:
        after = step.update_rms or {}
        changes = {
            role: {"adamw": before.get(role), "muon": after.get(role)}
            for role in sorted(before.keys() | after.keys())
        }
        settings = {"adamw": groups, "muon": self.trainer.group_settings()}
        self._record("hand_over", update_rms=changes, groups=settings)
        shown = ", ".join(
            f"{role} {_number(rms['adamw'])} → {_number(rms['muon'])}"
            for role, rms in changes.items()
        )
        self.say(
            f"hand-over at step {self.trainer.step}: hidden matrices from AdamW to Muon; "
            f"update RMS {shown}"
        )

    def _log_skipped(self, step: Step) -> None:
        trainer, limit = self.trainer, self.trainer.recipe.max_skipped
        what = f"loss {step.loss}, gradient norm {step.grad_norm}"
        self._record("skipped", reason=what, skipped=trainer.skipped)
        self.say(
            f"step {trainer.step} skipped: {what} "
            f"({trainer.skipped_in_a_row} in a row, {trainer.skipped} in all)"
        )
        if trainer.skipped_in_a_row >= limit:
            raise UserError(
                "loss or gradient was not finite in too many steps in a row",
                where=f"step {trainer.step}",
                got=f"{trainer.skipped_in_a_row} steps, the last with {what}",
                expected=f"fewer than max_skipped = {limit}",
                cure="The run diverged: check data and learning rate; the last checkpoint is kept.",
            )

    def _record(self, kind: str, **values: object) -> None:
        self.metrics.write(kind, step=self.trainer.step, tokens=self.trainer.tokens, **values)


def _due(number: int, every: int | None) -> bool:
    return every is not None and number % every == 0


def _number(value: float | None) -> str:
    return "(not measured)" if value is None else f"{value:.3g}"
