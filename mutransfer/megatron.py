"""A bundle in the words of Megatron-LM's `--use-mup`, and where those words do not reach.

Upstream's rules, read in megatron-core 0.19 (`TransformerConfig.__post_init__`,
`get_standard_config_overrides`, `get_mup_config_overrides`, `LanguageModule._scale_logits`), with
m = hidden size / base hidden size, L layers, and σ, η, ε, λ as given:

| class | init std | AdamW lr | eps | weight decay | multiplier |
|---|---|---|---|---|---|
| embedding, head | σ | η, or the decoupled lr | ε | λ | embedding; logits × output |
| q, k, v, gate, up | σ/√m | η/m | ε/m | λ | |
| o, down | σ/√(2Lm) | η/m | ε/m | λ | 1: residual branches have none |
| gains | – | η | ε | 0 | |

The softmax scale is √(base head dim)/head dim. An output multiplier of exactly 1 becomes 1/m.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from mutransfer.bundle import Bundle
from mutransfer.errors import UserError
from mutransfer.roles import Role
from mutransfer.table import Row

_CLOSE = 1e-9


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One setting that Megatron gives a parameter otherwise than the bundle does."""

    parameters: str
    setting: str
    bundle: float
    megatron: float

    def __str__(self) -> str:
        return (f"{self.parameters}: {self.setting} is {self.bundle:.6g} in the bundle, "
                f"{self.megatron:.6g} in Megatron")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What Megatron gives a class of parameters under AdamW; `eps` and the like are absolute."""

    init_std: float
    lr: float
    eps: float
    weight_decay: float
    multiplier: float


def arguments(bundle: Bundle) -> list[str]:
    """Megatron-LM's command-line arguments for the bundle's target under AdamW.

    Learning rates are peaks; the schedule, the batch and the data are the recipe's.

    Raises:
        UserError: The target's shape has no such words.
    """
    shape, params, table = bundle.target.config, bundle.base_hyperparameters, bundle.table
    rope = shape["rope_base"]
    if not isinstance(rope, int | float) or rope != int(rope):
        raise UserError("Megatron's --rotary-base is a whole number", where="target: rope_base",
                        got=rope)  # fmt: skip
    words: list[object] = [
        "--num-layers", shape["n_layers"],
        "--hidden-size", shape["d_model"],
        "--ffn-hidden-size", shape["d_ff"],
        "--num-attention-heads", shape["n_heads"],
        "--group-query-attention",
        "--num-query-groups", shape["n_kv_heads"],
        "--kv-channels", shape["head_dim"],
        "--max-position-embeddings", shape["max_seq_len"],
        "--position-embedding-type", "rope",
        "--rotary-base", int(rope),
        "--normalization", "RMSNorm",
        "--norm-epsilon", shape["norm_eps"],
        "--swiglu",
        "--disable-bias-linear",
        "--attention-dropout", 0.0,
        "--hidden-dropout", 0.0,
    ]  # fmt: skip
    if not shape["tied"]:
        words.append("--untie-embeddings-and-output-weights")
    words += [
        "--use-mup",
        "--mup-base-hidden-size", bundle.base.base_width,
        "--mup-base-head-dim", _base_head_dim(bundle),
        "--mup-attn-scale-power", 1.0,
        "--mup-embedding-mult", table.multipliers.embedding,
        "--mup-output-mult", table.multipliers.output,
        "--init-method-std", params.init_std,
        "--optimizer", "adam",
        "--lr", params.lr,
        "--adam-beta1", params.beta1,
        "--adam-beta2", params.beta2,
        "--adam-eps", params.eps,
        "--weight-decay", params.weight_decay,
    ]  # fmt: skip
    if params.embedding_lr_ratio != 1.0:
        words += ["--decoupled-lr", params.lr * params.embedding_lr_ratio]
    return [repr(word) if isinstance(word, float) else str(word) for word in words]


def settings(bundle: Bundle) -> dict[Role, Setting]:
    """What Megatron makes of `arguments`, by role."""
    params, multipliers = bundle.base_hyperparameters, bundle.table.multipliers
    m, layers = _width_mult(bundle), bundle.target.config["n_layers"]
    assert isinstance(layers, int)
    output = 1 / m if multipliers.output == 1.0 else multipliers.output
    lr, eps, decay, std = params.lr, params.eps, params.weight_decay, params.init_std
    ends = lr * params.embedding_lr_ratio
    found: dict[Role, Setting] = {
        "embedding": Setting(init_std=std, lr=ends, eps=eps, weight_decay=decay,
                             multiplier=multipliers.embedding),
        "head": Setting(init_std=std, lr=ends, eps=eps, weight_decay=decay, multiplier=output),
        "gain": Setting(init_std=0.0, lr=lr, eps=eps, weight_decay=0.0, multiplier=1.0),
        "hidden": Setting(init_std=std / math.sqrt(m), lr=lr / m, eps=eps / m,
                          weight_decay=decay, multiplier=1.0),
        "hidden_out": Setting(init_std=std / math.sqrt(2 * layers * m), lr=lr / m, eps=eps / m,
                              weight_decay=decay, multiplier=1.0),
    }  # fmt: skip
    return found | {"final_gain": found["gain"]}


def differences(bundle: Bundle) -> list[Difference]:
    """Every setting in which Megatron, given `arguments`, departs from the bundle's table.

    Raises:
        UserError: A parameter has a role that Megatron has no class for.
    """
    theirs, found = settings(bundle), []
    for row in bundle.table.rows:
        if row.role not in theirs:
            raise UserError("Megatron has no class for this", where=row.pattern, got=row.role)
        for name, ours, other in _pairs(row, theirs[row.role]):
            if not math.isclose(ours, other, rel_tol=_CLOSE, abs_tol=0.0):
                found.append(Difference(parameters=row.pattern, setting=name, bundle=ours,
                                        megatron=other))  # fmt: skip
    output = settings(bundle)["head"].multiplier
    if bundle.target.config["tied"] and not math.isclose(
        bundle.table.multipliers.output, output, rel_tol=_CLOSE
    ):
        own = bundle.table.multipliers.output
        found.append(
            Difference(parameters="tied head", setting="multiplier", bundle=own, megatron=output)
        )
    return found


def cannot_be_expressed(found: list[Difference]) -> list[Difference]:
    """Those that change the function itself, or the size of an update."""
    return [each for each in found if each.setting in {"multiplier", "lr"}]


def _pairs(row: Row, theirs: Setting) -> Iterator[tuple[str, float, float]]:
    adamw = row.optimizers.adamw
    yield "multiplier", row.forward_multiplier, theirs.multiplier
    yield "init std", row.init_std, theirs.init_std
    yield "lr", adamw.lr, theirs.lr
    yield "eps", adamw.eps, theirs.eps
    yield "weight decay", adamw.weight_decay, theirs.weight_decay


def _width_mult(bundle: Bundle) -> float:
    width = bundle.target.config["d_model"]
    assert isinstance(width, int)
    return width / bundle.base.base_width


def _base_head_dim(bundle: Bundle) -> float:
    """What gives the bundle's softmax scale: √this / head_dim."""
    head_dim = bundle.target.config["head_dim"]
    assert isinstance(head_dim, int)
    return (bundle.table.multipliers.attention * head_dim) ** 2
