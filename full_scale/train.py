"""The whole run: bundle and recipe in, run folder out. Also `python -m full_scale.train`."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from full_scale import checkpoint, report
from full_scale.admission import Admission, admit, admit_data
from full_scale.checkpoint import Identity
from full_scale.feed import Feed, open_sources
from full_scale.loop import Loop
from full_scale.metrics import Metrics, read_metrics
from full_scale.recipe import Recipe, load_recipe
from full_scale.stopping import graceful, only_one
from full_scale.trainer import Trainer
from mutransfer.bundle import Bundle
from mutransfer.errors import UserError
from mutransfer.files import read_json, write_json, write_text
from mutransfer.hardware import peak_flops
from mutransfer.progress import Display
from proxies.data import Corpus, prepare

_MAX_EPOCHS = 4


def run_folder(bundle: Bundle, recipe: Recipe) -> Path:
    """Where a run goes unless told otherwise."""
    return Path("runs") / f"{recipe.name}-{bundle.sha256[:8]}"


def train(
    bundle_path: Path | str,
    recipe_name: Path | str,
    *,
    out: Path | None = None,
    data_folder: Path | None = None,
    accept_unverified: bool = False,
) -> Path | None:
    """Trains a recipe's model from a bundle; goes on by itself where a run was cut off.

    Args:
        bundle_path: The bundle.
        recipe_name: Path of a recipe, or the name of a shipped one.
        out: The run folder; `run_folder` by default.
        data_folder: Where tokenized corpora are kept; `data/` in the run folder by default.
        accept_unverified: Whether a missing or failed verdict of the bundle is accepted.

    Returns:
        The run folder, or `None` where a signal stopped the run before its end.

    Raises:
        UserError: Bundle, recipe, data or checkpoint is refused, or the run diverged.
    """
    if (ranks := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise UserError("the trainer runs in one process", where="WORLD_SIZE", got=ranks,
                        expected=1)  # fmt: skip
    bundle, recipe = Bundle.load(bundle_path), load_recipe(recipe_name)
    admission = admit(bundle, recipe, accept_unverified=accept_unverified)
    folder = out or run_folder(bundle, recipe)
    with only_one(folder):
        display, data_folder = Display(), data_folder or folder / "data"
        corpus = prepare(recipe.data, data_folder)
        admitted = admit_data(bundle, corpus)
        sources = open_sources(recipe, corpus, data_folder, display)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        trainer = Trainer(
            recipe=recipe, table=admission.table, corpus=corpus, device=device, sources=sources
        )
        feed = trainer.feed
        notes = [*admission.notes, *admitted, *_notes(recipe, feed)]
        identity = Identity(bundle=bundle.sha256, recipe=recipe.sha256, data=feed.fingerprint)
        taken_up = _resume(trainer, identity, folder, display)
        display.start_from(trainer.tokens / recipe.horizon_tokens)
        if taken_up and trainer.step == recipe.steps and (folder / "run.json").is_file():
            display("this run is finished already; its result:")
        else:
            _keep(folder, bundle, corpus)
            for line in _plan(recipe, admission, notes):
                display(line)
            with (
                graceful() as request,
                Metrics(folder, step=trainer.step) as metrics,
                display,
                closing(trainer),
            ):
                finished = Loop(
                    trainer=trainer, identity=identity, folder=folder, metrics=metrics,
                    say=display, request=request,
                    peak_flops=peak_flops(str(trainer.device), recipe.precision),
                ).run()  # fmt: skip
            if not finished:
                display(
                    f"stopped by {request.by} after step {trainer.step} of {recipe.steps}; saved. "
                    "The same command goes on from there."
                )
                return None
            _write_results(folder, bundle, recipe, admission, notes, identity, feed, device)
        for line in _result(folder):
            display(line)
    return folder


def _resume(trainer: Trainer, identity: Identity, folder: Path, say: Callable[[str], None]) -> bool:
    """Takes up the newest whole checkpoint, if there is one."""
    path = checkpoint.newest(folder / "checkpoints", say)
    if path is None:
        return False
    trainer.restore(checkpoint.load(path, identity, str(trainer.device)))
    say(f"going on from {path}")
    return True


def _keep(folder: Path, bundle: Bundle, corpus: Corpus) -> None:
    """Leaves beside the checkpoints what an export needs of the bundle and the text."""
    bundle.save(folder / "bundle.json")
    if (tokenizer := corpus.load_tokenizer().json) is not None:
        write_text(folder / "tokenizer.json", tokenizer)


def _notes(recipe: Recipe, feed: Feed) -> list[str]:
    """What the user should know before the run starts."""
    notes = list(recipe.jumps)
    for name, epochs in feed.epochs.items():
        text = f"the source {name}" if recipe.mixed else "its text"
        if epochs > _MAX_EPOCHS:
            notes.append(
                f"the run passes over {text} {epochs:.1f} times; more text would do it good"
            )
    for phase in recipe.phases:
        given = sum((recipe.mixture_of(phase) or {}).values())
        if recipe.mixed and abs(given - 1) > 1e-9:
            notes.append(f"the weights of {phase.name} sum to {given:.6g} and were normalized")
    for name, source in recipe.sources.items():
        if source.megatron is not None:
            notes.append(f"source {name}: a Megatron file does not say which tokenizer made it")
    return notes


def _plan(recipe: Recipe, admission: Admission, notes: list[str]) -> list[str]:
    """The run in a few lines."""
    lines = [
        f"recipe {recipe.name}: {recipe.model.n_parameters:,} parameters "
        f"({recipe.model.n_nonembedding:,} non-embedding), {recipe.steps:,} steps, "
        f"{recipe.horizon_tokens:,} tokens, {recipe.precision}"
    ]
    for phase in recipe.phases:
        rate = f"{phase.lr_end:g}"
        if phase.shape != "constant":
            rate = f"{phase.lr_start:g} → {rate} ({phase.shape})"
        lines.append(
            f"  {phase.name}: {phase.steps:,} steps × {phase.batch_size:,} sequences × "
            f"{phase.seq_len:,} tokens, lr/peak {rate}, {phase.optimizer}"
        )
    lines += [f"converted: {conversion}" for conversion in admission.conversions]
    return lines + [f"note: {note}" for note in notes]


def _write_results(
    folder: Path,
    bundle: Bundle,
    recipe: Recipe,
    admission: Admission,
    notes: list[str],
    identity: Identity,
    feed: Feed,
    device: str,
) -> None:
    records = read_metrics(folder)
    report.save_figure(
        report.draw(report.curves(recipe, records), f"{recipe.name}: loss"), folder / "loss.png"
    )
    write_json(
        folder / "run.json",
        report.summary(
            recipe,
            records,
            epochs=max(feed.epochs.values()),
            mixture=feed.record(),
            identity=identity.model_dump(),
            model=recipe.model.model_dump(mode="json"),
            parametrization=bundle.parametrization.model_dump(mode="json"),
            base_hyperparameters=admission.params.model_dump(mode="json"),
            conversions=[asdict(conversion) for conversion in admission.conversions],
            notes=notes,
            device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
            versions=_versions(),
        ),
    )


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("mutransfer", "torch", "safetensors"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _result(folder: Path) -> list[str]:
    """The result of a finished run, from its `run.json`, in a few lines."""
    content: Any = read_json(folder / "run.json")
    losses = ", ".join(
        f"{phase['name']} {phase['heldout_loss']:.4f}" for phase in content["phases"]
    )
    lines = [
        f"held-out loss {content['heldout_loss']:.4f} nats per token after "
        f"{content['tokens']:,} tokens ({content['epochs']:.2f} passes over the text)",
        f"at the end of each phase: {losses}",
    ]
    if content["skipped_steps"]:
        lines.append(f"{content['skipped_steps']} steps were skipped: not finite")
    return [*lines, f"{folder}: run.json, loss.png, metrics.jsonl, tensorboard/, checkpoints/"]


def main() -> int:
    """The command of `python -m full_scale.train`; returns the exit code."""
    import typer

    from full_scale import cli

    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(cli.train)
    try:
        result = app(standalone_mode=False)
    except (UserError, typer.TyperException) as error:
        print("Error:", error, file=sys.stderr)
        return 2
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main())
