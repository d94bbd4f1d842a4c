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
from mutransfer.bundle_evidence import CoordCheck, Replay
from mutransfer.coord_check import Trainable
from mutransfer.errors import UserError
from mutransfer.files import atomic_path, write_json
from mutransfer.optimizers import Matrix, Optimizers
from mutransfer.preflight import hold_replay, hold_target
from mutransfer.preflight_result import Held, PreflightResult
from mutransfer.progress import Report, part, quiet
from mutransfer.schema import parse
from mutransfer.table import Table
from proxies.decoder import DecoderConfig, meta_decoder
from proxies.tables import decoder_table

Precision = Literal["fp32", "bf16"]
SEQUENCES, TOKENS = 1, 64
"""The batch: of the target and of the narrow models that it is held against."""

_REPLAY_SHARE = 0.05


def run_preflight(
    bundle: Bundle,
    *,
    precision: Precision = "bf16",
    seeds: int = 3,
    steps: int = 4,
    progress: Report = quiet,
) -> PreflightResult:
    """Replays the narrowest model of the coordinate check, then trains the target for `steps`.

    The target and the two narrowest widths of the check, at the target's depth, have `precision`
    weights, moments and passes (gains stay fp32: near 1, a bf16 step of 2^-8 is a learning
    rate) and see one batch of 1 x 64 tokens. Peak memory is about 6 times the target's weights.

    Args:
        bundle: Verified already.
        precision: The target's.
        seeds: Models per narrow width.
        steps: Optimizer steps under AdamW, at the peak learning rates.
        progress: Takes one line per model.

    Raises:
        UserError: The bundle has no replay or not the decoder as its target, or the target is
            no wider than two of the checked widths.
    """
    target = parse(DecoderConfig, bundle.target.config, "bundle: target.config")
    check, replay = _evidence(bundle)
    held = _replay(bundle, check, replay, part(progress, 0.0, _REPLAY_SHARE))
    batch = torch.tensor(replay.tokens)[:SEQUENCES, : TOKENS + 1]

    def factory(width: int, seed: int) -> Trainable:
        config = target.narrow(width)
        table = bundle.table if width == target.d_model else _table(bundle, config)
        return _trainable(config, table, seed, batch, precision=precision)

    found, symbolic, optimizer = hold_target(
        factory, sorted(check.widths)[:2], target.d_model, seeds=seeds, steps=steps,
        progress=part(progress, _REPLAY_SHARE, 1.0),
    )  # fmt: skip
    return PreflightResult(
        optimizer=optimizer,
        precision=precision,
        widths=tuple(sorted(check.widths)[:2]),
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


def _evidence(bundle: Bundle) -> tuple[CoordCheck, Replay]:
    check = bundle.evidence.coord_check if bundle.evidence else None
    if check is None or check.replay is None:
        raise UserError(
            "the bundle has no coordinate check at its own hyperparameters",
            where="evidence.coord_check.replay", got="none",
            cure="Run `mutransfer coord-check` after the sweep (without coord_check.lr), and "
            "export again.",
        )  # fmt: skip
    return check, check.replay


def _replay(
    bundle: Bundle, check: CoordCheck, replay: Replay, progress: Report
) -> tuple[Held, ...]:
    """The check's narrowest model once more, under each of its optimizers, in fp32."""
    layers = parse(DecoderConfig, bundle.base.config, "bundle: base.config").n_layers
    config = parse(DecoderConfig, bundle.target.config, "bundle: target.config")
    config = config.narrow(replay.width, layers)
    tokens, held = torch.tensor(replay.tokens), list[Held]()
    optimizers: list[Matrix] = ["adamw", "muon"]
    for optimizer in optimizers:
        lines = [line for line in check.slopes if line.optimizer == optimizer]
        recorded = {(line.kind, line.name, line.t): line.replay for line in lines}
        known = {key: value for key, value in recorded.items() if value is not None}
        if known:
            table = _table(bundle, config)
            trainable = _trainable(config, table, replay.seed, tokens, optimizer=optimizer)
            held += hold_replay(known, trainable, steps=max(t for _, _, t in known))
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
