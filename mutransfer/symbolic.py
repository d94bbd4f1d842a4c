"""The symbolic check: optimizer groups, multipliers and initial weights, held against the table.

It sees what no slope can: a base width typed wrong, a weight decay that is not compensated,
a parameter that is frozen or in no group.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from mutransfer.modules import scaled_modules
from mutransfer.roles import pattern_of
from mutransfer.table import AdamWEntry, MuonEntry, Row, Table

STANDARD_ERRORS = 3.0
RELATIVE_SLACK = 0.02
"""An init std may be off by three standard errors of its estimate plus two percent."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One disagreement between what was built and what the table says.

    Attributes:
        name: Pattern of the parameter, or name of the multiplier.
        field: What disagrees, such as `lr` or `init_std`.
        got: The value that was built; `None` where the disagreement is not about a number.
        expected: The value in the table, likewise.
        sentence: The finding in plain words.
        width: Width of the model that it was first seen in, where that is known.
    """

    name: str
    field: str
    got: float | None
    expected: float | None
    sentence: str
    width: int | None = None


def is_muon(group: Mapping[str, Any]) -> bool:
    """Whether a parameter group belongs to Muon."""
    return "adjust_lr_fn" in group or "scale" in group


def optimizer_kind(groups: Iterable[Mapping[str, Any]]) -> str:
    """`muon` where any group is Muon's, else `adamw`."""
    return "muon" if any(is_muon(group) for group in groups) else "adamw"


def check_groups(
    groups: Iterable[Mapping[str, Any]], table: Table, model: nn.Module, *, trained: bool = False
) -> list[Finding]:
    """Every difference between a model with its optimizer, as built, and the table.

    Args:
        groups: All parameter groups, as torch's optimizers hold them.
        table: The model's table.
        model: The model, before the check trains it.
        trained: Whether it was trained before, so that initial values are gone and learning
            rates stand where a schedule has them: peaks are compared in their place.

    Returns:
        One finding per pattern and field; none where all is as the table says.

    Raises:
        UserError: Model and table do not have the same parameters.
    """
    groups, rows = list(groups), table.resolve(model)
    if trained:
        groups = [{**group, "lr": group.get("peak_lr", group["lr"])} for group in groups]
    found = [
        *_membership(groups, rows, model),
        *_settings(groups, rows, model),
        *_multipliers(table, model),
        *([] if trained else _initial(rows, model)),
    ]
    return list({(finding.name, finding.field): finding for finding in reversed(found)}.values())[
        ::-1
    ]


def check_after(
    groups: Iterable[Mapping[str, Any]], table: Table, model: nn.Module
) -> list[Finding]:
    """What must still hold after some steps: shapes of the schedule, multipliers.

    Args:
        groups: All parameter groups, as they stand now.
        table: The model's table.
        model: The model, trained for a few steps.
    """
    changed = [
        replace(finding, sentence=f"after the steps {finding.sentence}")
        for finding in _multipliers(table, model)
    ]
    return [*check_schedule(groups), *changed]


def check_schedule(groups: Iterable[Mapping[str, Any]]) -> list[Finding]:
    """Whether a schedule still multiplies: every group's lr over its peak is one number."""
    factors = [
        float(group["lr"]) / float(group["peak_lr"]) for group in groups if group.get("peak_lr")
    ]
    if not factors or _close(min(factors), max(factors)):
        return []
    return [
        Finding(
            name="schedule",
            field="lr / peak_lr",
            got=max(factors),
            expected=min(factors),
            sentence="after the steps the groups' learning rates stand at different fractions "
            f"of their peaks ({min(factors):.3g} to {max(factors):.3g}): a schedule assigns "
            "learning rates instead of multiplying them",
        )
    ]


def _membership(
    groups: list[Mapping[str, Any]], rows: dict[str, Row], model: nn.Module
) -> list[Finding]:
    counts: dict[int, int] = {}
    for group in groups:
        for parameter in group["params"]:
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    found = []
    for fqn, parameter in model.named_parameters():
        count, name = counts.pop(id(parameter), 0), pattern_of(fqn)
        if count != 1:
            where = "in no optimizer group" if not count else f"in {count} optimizer groups"
            found.append(_finding(name, "groups", count, 1, f"{fqn} is {where}"))
        if not parameter.requires_grad:
            sentence = f"{fqn} is frozen (requires_grad is False)"
            found.append(_finding(name, "requires_grad", 0, 1, sentence))
    if counts:
        sentence = f"the optimizer updates {len(counts)} tensors that the model does not own"
        found.append(_finding("optimizer", "groups", len(counts), 0, sentence))
    return found


def _settings(
    groups: list[Mapping[str, Any]], rows: dict[str, Row], model: nn.Module
) -> list[Finding]:
    names = {id(parameter): fqn for fqn, parameter in model.named_parameters()}
    has_muon = optimizer_kind(groups) == "muon"
    found = []
    for group in groups:
        for parameter in group["params"]:
            if id(parameter) not in names:
                continue
            fqn = names[id(parameter)]
            row, name = rows[fqn], pattern_of(fqn)
            entry = row.optimizers.muon if has_muon else None
            if is_muon(group) != (entry is not None):
                right, wrong = ("Muon", "AdamW") if entry else ("AdamW", "Muon")
                sentence = f"{name} is optimized by {wrong}; the table gives it to {right}"
                found.append(_finding(name, "optimizer", None, None, sentence))
                continue
            wanted = (
                _muon_settings(entry, group, row.shape)
                if entry is not None
                else _adamw_settings(row.optimizers.adamw, group)
            )
            for field, (got, expected) in wanted.items():
                if got is None or not _close(got, expected):
                    sentence = f"{field} of {name} is {_number(got)}; the table says {expected:.4g}"
                    found.append(_finding(name, field, got, expected, sentence))
    return found


def _adamw_settings(
    entry: AdamWEntry, group: Mapping[str, Any]
) -> dict[str, tuple[float | None, float]]:
    """(got, expected) per field; the keys are torch's, in words that a user knows."""
    betas = group.get("betas", (None, None))
    return {
        "learning rate": (_float(group.get("lr")), entry.lr),
        "peak learning rate": (_float(group.get("peak_lr", group.get("lr"))), entry.lr),
        "eps": (_float(group.get("eps")), entry.eps),
        "weight decay": (_float(group.get("weight_decay")), entry.weight_decay),
        "beta1": (_float(betas[0]), entry.betas[0]),
        "beta2": (_float(betas[1]), entry.betas[1]),
    }


def _muon_settings(
    entry: MuonEntry, group: Mapping[str, Any], shape: tuple[int, ...]
) -> dict[str, tuple[float | None, float]]:
    """(got, expected) per field, for the effective step lr * factor and shrinkage lr * wd."""
    factor = muon_factor(group, shape)
    lr, decay = _float(group.get("lr")), _float(group.get("weight_decay"))
    peak = _float(group.get("peak_lr", lr))
    step = entry.lr * entry.scale
    return {
        "learning rate times update scale": (None if lr is None else lr * factor, step),
        "peak learning rate times update scale": (None if peak is None else peak * factor, step),
        "learning rate times weight decay": (
            None if lr is None or decay is None else lr * decay,
            entry.lr_times_weight_decay,
        ),
        "momentum": (_float(group.get("momentum")), entry.momentum),
    }


def muon_factor(group: Mapping[str, Any], shape: tuple[int, ...]) -> float:
    """What a Muon group multiplies lr * O with, for a (fan_out, fan_in) matrix.

    `torch.optim.Muon`'s two modes, or a factor of its own that the group names `scale`.
    """
    if group.get("scale") is not None:
        return float(group["scale"])
    fan_out, fan_in = shape
    if group.get("adjust_lr_fn") == "match_rms_adamw":
        return 0.2 * math.sqrt(max(fan_out, fan_in))
    return math.sqrt(max(1.0, fan_out / fan_in))


def _multipliers(table: Table, model: nn.Module) -> list[Finding]:
    """Buffers `<name>_multiplier`, the model's own or those that `carry_multipliers` gave it."""
    found = []
    for name, expected in table.multipliers:
        values = [
            float(buffer)
            for fqn, buffer in model.named_buffers()
            if fqn.rpartition(".")[2] == f"{name}_multiplier"
        ]
        if name == "attention" and hasattr(model, "carried"):
            values += [float(module.scaling) for module in scaled_modules(model)]  # type: ignore[arg-type]
        got = next((value for value in values if not _close(value, expected)), None)
        if got is not None:
            sentence = f"the {name} multiplier is {got:.4g}; the table says {expected:.4g}"
            found.append(_finding(f"{name}_multiplier", "multiplier", got, expected, sentence))
    return found


@torch.no_grad()
def _initial(rows: dict[str, Row], model: nn.Module) -> list[Finding]:
    """Init std per pattern, layers pooled; gains are one and biases zero, exactly."""
    pooled: dict[str, list[torch.Tensor]] = {}
    by_pattern = {row.pattern: row for row in rows.values()}
    for fqn, parameter in model.named_parameters():
        pooled.setdefault(rows[fqn].pattern, []).append(parameter)
    found = []
    for name, parameters in pooled.items():
        row = by_pattern[name]
        if row.role in ("gain", "final_gain", "bias"):
            value = 0.0 if row.role == "bias" else 1.0
            off = next((p for p in parameters if not bool((p == value).all())), None)
            if off is not None:
                got = float(off.float().mean())
                sentence = f"{name} starts at {got:.4g} on average; it should start at {value:g}"
                found.append(_finding(name, "init", got, value, sentence))
            continue
        count = sum(p.numel() for p in parameters)
        got = math.sqrt(sum(float(p.double().square().sum()) for p in parameters) / count)
        slack = STANDARD_ERRORS / math.sqrt(2 * count) + RELATIVE_SLACK
        if not abs(got - row.init_std) <= slack * row.init_std:
            sentence = f"init std of {name} is {got:.4g}; the table says {row.init_std:.4g}"
            found.append(_finding(name, "init_std", got, row.init_std, sentence))
    return found


def _finding(
    name: str, field: str, got: float | None, expected: float | None, sentence: str
) -> Finding:
    return Finding(name=name, field=field, got=got, expected=expected, sentence=sentence)


def _float(value: Any) -> float | None:
    return None if value is None else float(value)


def _number(value: float | None) -> str:
    return "missing" if value is None else f"{value:.4g}"


def _close(a: float, b: float) -> bool:
    """Equal to six digits: multipliers live in fp32."""
    return abs(a - b) <= 1e-6 * max(abs(a), abs(b))
