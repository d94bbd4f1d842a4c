"""Optimizer groups, read off a table; `peak_lr` is what schedules multiply."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import nn

from mutransfer.errors import UserError
from mutransfer.table import Row, Table

GroupKind = Literal["adamw", "muon", "adamw_aux"]


def param_groups(model: nn.Module, table: Table, optimizer: GroupKind) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimizer, one per distinct setting.

    Args:
        model: The model that the table belongs to.
        table: What `parametrize` or `Bundle.apply` returned.
        optimizer: `adamw` for all parameters under AdamW; `muon` for the hidden matrices,
            ready for `torch.optim.Muon`; `adamw_aux` for what Muon leaves to AdamW.

    Returns:
        Groups with `params` (as (name, parameter) pairs, which torch keeps as
        `param_names`), the optimizer's settings, and `peak_lr` for schedules to multiply.

    Raises:
        UserError: Model and table do not match, or `optimizer` is none of the three.
    """
    if optimizer not in get_args(GroupKind):
        raise UserError("unknown kind of parameter groups", got=optimizer,
                        expected=f"one of {', '.join(get_args(GroupKind))}")  # fmt: skip
    grouped: dict[tuple[Any, ...], dict[str, Any]] = {}
    rows = table.resolve(model)
    for fqn, parameter in model.named_parameters():
        row = rows[fqn]
        muon = row.optimizers.muon
        if optimizer != "adamw" and (muon is not None) != (optimizer == "muon"):
            continue
        settings = _muon_settings(row) if optimizer == "muon" else _adamw_settings(row)
        group = grouped.setdefault(tuple(settings.items()), {"params": [], **settings})
        group["params"].append((fqn, parameter))
    return list(grouped.values())


def _adamw_settings(row: Row) -> dict[str, Any]:
    entry = row.optimizers.adamw
    return {
        "lr": entry.lr,
        "peak_lr": entry.lr,
        "eps": entry.eps,
        "weight_decay": entry.weight_decay,
        "betas": entry.betas,
    }


def _muon_settings(row: Row) -> dict[str, Any]:
    """Settings that make `torch.optim.Muon` take the step lr * scale * O, decay lr * wd.

    torch knows two scales: `match_rms_adamw` is ours where scale = 0.2*sqrt(max(out, in)).
    Any other scale goes into the lr of its `original` mode, whose own factor
    sqrt(max(1, out/in)) is divided out, with lr*wd kept.
    """
    entry = row.optimizers.muon
    assert entry is not None
    fan_out, fan_in = row.shape
    lr, decay, mode = entry.lr, entry.weight_decay, "match_rms_adamw"
    if not _close(entry.scale, 0.2 * max(fan_out, fan_in) ** 0.5):
        mode = "original"
        lr = entry.lr * entry.scale / max(1.0, fan_out / fan_in) ** 0.5
        decay = entry.lr_times_weight_decay / lr if lr else 0.0
    return {
        "lr": lr,
        "peak_lr": lr,
        "weight_decay": decay,
        "momentum": entry.momentum,
        "adjust_lr_fn": mode,
    }


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-12 * max(abs(a), abs(b))
