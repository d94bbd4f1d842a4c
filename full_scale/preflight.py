"""The last check before money is spent: the real target, built from its bundle, takes some steps.

It needs no data but what is in the bundle: the batch of the coordinate check's first model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mutransfer.apply import initialize
from mutransfer.bundle import Bundle
from mutransfer.bundle_evidence import Replay
from mutransfer.coord_check import Trainable
from mutransfer.errors import UserError
from mutransfer.files import atomic_path, write_json
from mutransfer.optimizers import Matrix, Optimizers
from mutransfer.preflight import hold_replay, hold_target, sizes
from mutransfer.preflight_result import Held, PreflightResult
from mutransfer.progress import Report, part, quiet
from mutransfer.schema import parse
from mutransfer.table import Table
from proxies.decoder import DecoderConfig, meta_decoder
from proxies.footprint import free_memory
from proxies.tables import decoder_table

Precision = Literal["fp32", "bf16"]
SEQUENCES, TOKENS = 1, 64
"""The batch: of the target and of the narrow models that it is held against."""

_REPLAY_SHARE = 0.05
_BYTES: dict[Precision, int] = {"bf16": 15, "fp32": 30}
"""Peak memory per parameter of the target; 15.1 measured on 1.35B in bf16."""


def run_preflight(
    bundle: Bundle,
    *,
    precision: Precision = "bf16",
    seeds: int = 3,
    steps: int = 4,
    progress: Report = quiet,
) -> PreflightResult:
    """Replays the narrowest model of the coordinate check, then trains the target for `steps`.

    The target and the two narrowest widths of the check, at the target's depth, see one batch of
    at most 1 x 64 tokens. In bf16 weights, moments and passes are bf16 and gains fp32: a trainer
    with fp32 weights takes twice the memory. Peak memory is about 7 times the target's weights.

    Args:
        bundle: Verified already.
        precision: The target's.
        seeds: Models per narrow width.
        steps: Optimizer steps under AdamW, at the peak learning rates.
        progress: Takes one line per model.

    Raises:
        UserError: The bundle has no replay, or one that is not of this target; it has not the
            decoder as its target; the target is no wider than two of the checked widths, does
            not fit into memory, or has learning rates that bf16 rounds away.
    """
    target = parse(DecoderConfig, bundle.target.config, "bundle: target.config")
    widths, replay = _evidence(bundle, target)
    if precision == "bf16":
        _require_resolution(bundle)
    _require_memory(target, precision)
    held = _replay(bundle, replay, part(progress, 0.0, _REPLAY_SHARE))
    batch = torch.tensor(replay.tokens)[:SEQUENCES, : TOKENS + 1]

    def factory(width: int, seed: int) -> Trainable:
        config = target.narrow(width)
        table = bundle.table if width == target.d_model else _table(bundle, config)
        return _trainable(config, table, seed, batch, precision=precision)

    found, symbolic, optimizer = hold_target(
        factory, widths, target.d_model, seeds=seeds, steps=steps,
        progress=part(progress, _REPLAY_SHARE, 1.0),
    )  # fmt: skip
    return PreflightResult(
        optimizer=optimizer,
        precision=precision,
        widths=widths,
        target=target.d_model,
        replayed=replay.width,
        seeds=seeds,
        steps=steps,
        held=(*held, *found),
        symbolic=symbolic,
    )


def write_preflight(result: PreflightResult, folder: Path, bundle: Bundle) -> None:
    """Leaves `preflight.json` and `preflight.png`."""
    from mutransfer.preflight_plot import preflight_figure

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "preflight.json", {**result.to_json(), "bundle_sha256": bundle.sha256})
    with atomic_path(folder / "preflight.png") as path:
        preflight_figure(result).savefig(path, format="png")


def _evidence(bundle: Bundle, target: DecoderConfig) -> tuple[tuple[int, int], Replay]:
    """The two narrow widths and the replay, once they are what a check of this target records."""
    where, check = "evidence.coord_check", bundle.evidence and bundle.evidence.coord_check
    if not check or check.replay is None:
        raise UserError(
            "the bundle has no coordinate check at its own hyperparameters to replay",
            where=f"{where}.replay", got="none",
            cure="Run `mutransfer coord-check` after the sweep (without coord_check.lr), and "
            "export again.",
        )  # fmt: skip
    replay, widths = check.replay, sorted(set(check.widths))[:2]
    lengths, ids = {len(row) for row in replay.tokens}, [i for row in replay.tokens for i in row]
    layers = parse(DecoderConfig, bundle.base.config, "bundle: base.config").n_layers
    for what, right, got, expected in (
        ("widths", len(widths) == 2 and widths[-1] < target.d_model, list(check.widths),
         f"two widths at least below the target's {target.d_model}"),
        ("replay.width", [replay.width] == widths[:1], replay.width, f"the narrowest of {widths}"),
        ("replay.n_layers", replay.n_layers == layers, replay.n_layers, f"{layers}, the base's"),
        ("replay.tokens", len(lengths) == 1 and min(lengths) >= 2, f"rows of {sorted(lengths)}",
         "rows of one length of at least 2"),
        ("replay.tokens", max(lengths) <= target.max_seq_len + 1 and len(ids) <= 2**20,
         f"{len(ids)} ids, {max(lengths)} in a row", f"at most {target.max_seq_len + 1} in a row"),
        ("replay.tokens", not ids or 0 <= min(ids) <= max(ids) < target.vocab_size,
         "ids beyond the vocabulary", f"0 … {target.vocab_size - 1}"),
    ):  # fmt: skip
        if not right:
            raise UserError("no check that this target can be held against",
                            where=f"{where}.{what}", got=got, expected=expected,
                            cure="Check narrower widths than the target, and export again."
                            if what == "widths" else None)  # fmt: skip
    return (widths[0], widths[1]), replay


def _require_resolution(bundle: Bundle) -> None:
    """Refuses learning rates that bf16 rounds away: its numbers are 2^-8 apart, relatively."""
    for row in bundle.table.rows:
        lr = row.optimizers.adamw.lr
        if len(row.shape) > 1 and lr < 2**-7 * row.init_std:
            raise UserError("updates would be lost in bf16's rounding", where=row.pattern,
                            got=f"learning rate {lr:.3g} at init std {row.init_std:.3g}",
                            expected="a ratio of at least 1/128",
                            cure="Use --precision fp32.")  # fmt: skip


def _require_memory(target: DecoderConfig, precision: Precision) -> None:
    """Refuses a target that the machine cannot hold, where the system tells (Linux)."""
    needed = target.n_parameters * _BYTES[precision]
    try:
        free = free_memory()
    except UserError:
        return
    if needed > free:
        raise UserError("not enough memory for the target", where=f"{target.n_parameters:,} "
                        f"parameters in {precision}", got=f"{free / 2**30:.1f} GiB",
                        expected=f"{needed / 2**30:.1f} GiB")  # fmt: skip


def _replay(bundle: Bundle, replay: Replay, progress: Report) -> tuple[Held, ...]:
    """The check's narrowest model once more, under each optimizer, in fp32."""
    target = parse(DecoderConfig, bundle.target.config, "bundle: target.config")
    config = target.narrow(replay.width, replay.n_layers)
    tokens, held = torch.tensor(replay.tokens), list[Held]()
    optimizers: tuple[Matrix, ...] = ("adamw", "muon")
    for optimizer in optimizers:
        recorded = {(s.kind, s.name, s.t): s.value for s in replay.sizes
                    if s.optimizer == optimizer}  # fmt: skip
        table = _table(bundle, config)
        trainable = _trainable(config, table, replay.seed, tokens, optimizer=optimizer)
        held += hold_replay(recorded, sizes(trainable, replay.steps, eps=True))
        progress(f"replay of width {replay.width} under {optimizer}")
    return tuple(held)


def _table(bundle: Bundle, config: DecoderConfig) -> Table:
    """The table that the bundle's rules give a model."""
    return decoder_table(
        config,
        parse(DecoderConfig, bundle.base.config, "bundle: base.config"),
        bundle.base_hyperparameters,
        bundle.parametrization.name,
        base_width=bundle.base.base_width,
    )


def _trainable(
    config: DecoderConfig, table: Table, seed: int, tokens: Tensor, *,
    precision: Precision = "fp32", optimizer: Matrix = "adamw",
) -> Trainable:  # fmt: skip
    model = meta_decoder(config)
    if precision == "bf16":
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data = parameter.data.bfloat16()
    model = model.to_empty(device="cpu")
    initialize(model, table, seed=seed)
    return Trainable(
        model=model,
        optimizer=Optimizers(model, table, optimizer),
        loss=lambda: model.loss(tokens),
        table=table,
        tokens=tokens[:, :-1],
    )
