"""From an experiment's results to the bundle."""

from __future__ import annotations

import hashlib
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import rfc8785

from mutransfer.bundle import Bundle
from mutransfer.bundle_evidence import Study
from mutransfer.errors import UserError
from mutransfer.rules import BaseParams, get_parametrization
from proxies.tables import decoder_table
from sweeps.sweep import load_sweep
from sweeps.workspace import Workspace


def run_export(workspace: Workspace) -> tuple[Bundle, Path]:
    """Writes `bundle.json` for the target of an experiment, with its evidence.

    The bundle is verified before it is written, except for failed verdicts: those are in it
    for the trainer to refuse.

    Raises:
        UserError: A result is missing or belongs to another experiment or text, or the
            evidence does not yield the hyperparameters.
    """
    e = workspace.experiment
    params, study = load_sweep(workspace)
    coord, transfer = workspace.load("coord_check"), workspace.load("transfer_check")
    for name, value in transfer["base_hyperparameters"].items():
        if value != getattr(params, name):
            raise UserError(
                "the transfer check is of other hyperparameters than the sweep's winner",
                where=f"transfer_check.json: base_hyperparameters.{name}",
                got=value,
                expected=getattr(params, name),
                cure="Run `mutransfer transfer-check` again.",
            )
    corpus = workspace.corpus
    table = decoder_table(e.target, e.base, params, e.parametrization, base_width=e.base_width)
    bundle = Bundle.create(
        experiment={"name": e.name, "sha256": e.sha256},
        base={"config": e.base.model_dump(), "base_width": e.base_width},
        target={"config": e.target.model_dump()},
        parametrization={
            "name": e.parametrization,
            "version": get_parametrization(e.parametrization).version,
        },
        base_hyperparameters=params,
        provenance=_provenance(e.search, study),
        table=table,
        evidence={
            "study": study,
            "coord_check": _coord_evidence(
                coord, params, e.parametrization, e.coord_check.optimizers
            ),
            "transfer_check": _transfer_evidence(transfer, e.parametrization),
        },
        batch_tokens=e.train.batch_tokens,
        horizon_tokens=e.train.horizon_tokens,
        data={
            "fingerprint": corpus.fingerprint,
            "tokenizer_fingerprint": corpus.tokenizer_fingerprint,
            "vocab_size": corpus.vocab_size,
        },
        versions=versions(),
    )
    bundle.verify(accept_unverified=True)
    path = workspace.folder("export") / "bundle.json"
    bundle.save(path)
    return bundle, path


def versions() -> dict[str, str]:
    """What the results were made with."""
    names = ("mutransfer", "torch", "optuna", "mup", "numpy")
    return {"python": platform.python_version()} | {n: metadata.version(n) for n in names}


def _provenance(search: dict[str, Any], study: Study) -> dict[str, Any]:
    assert study.winner is not None
    swept = {"source": "study", "study": study.name, "trials": [study.winner.number]}
    return {
        name: swept if name in search else {"source": "fixed"} for name in BaseParams.model_fields
    }


def _coord_evidence(
    record: dict[str, Any], params: BaseParams, parametrization: str, optimizers: tuple[str, ...]
) -> dict[str, Any]:
    fields = ("kind", "name", "t", "slope", "low", "high", "expected", "verdict")
    checks = {kind: record["checks"][f"{parametrization} {kind}"] for kind in optimizers}
    replay = record["replay"]
    same = all(getattr(params, k) == v for k, v in record["base_hyperparameters"].items())
    if not same or any(size["value"] is None for size in replay["sizes"]):
        replay = None  # of other hyperparameters, or of a run that broke: it would prove nothing
    return {
        "verdict": record["verdict"],
        "lr": record["base_hyperparameters"]["lr"],
        "symbolic_findings": sum(len(check["symbolic"]) for check in checks.values()),
        "result_sha256": _sha256(record),
        "widths": next(iter(checks.values()))["widths"],
        "replay": replay,
        "slopes": [
            {"optimizer": kind} | {field: quantity[field] for field in fields}
            for kind, check in checks.items()
            for quantity in check["quantities"]
        ],
    }


def _transfer_evidence(record: dict[str, Any], parametrization: str) -> dict[str, Any]:
    arm = next(arm for arm in record["arms"] if arm["arm"] == parametrization)
    figures = ("drift", "drift_low", "drift_high", "regret", "regret_low", "regret_high")
    return {
        "verdict": record["verdict"],
        **{name: arm[name] for name in figures},
        "optima": [
            {name: optimum[name] for name in ("width", "log2_lr", "low", "high")}
            for optimum in arm["optima"]
        ],
        "seeds": record["seeds"],
        "result_sha256": _sha256(record),
    }


def _sha256(record: dict[str, Any]) -> str:
    return hashlib.sha256(rfc8785.dumps(record)).hexdigest()
