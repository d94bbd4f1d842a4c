"""Our decoder in the words of Hugging Face's Granite and Llama: names and configurations."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from mutransfer.errors import UserError
from mutransfer.table import Multipliers
from proxies.decoder import DecoderConfig

Architecture = Literal["granite", "llama"]

_CLASSES = {"granite": "GraniteForCausalLM", "llama": "LlamaForCausalLM"}
_OUTSIDE = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def hf_name(name: str) -> str:
    """What Granite and Llama call a parameter of our decoder."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    _, layer, rest = name.split(".", 2)
    rest = re.sub(r"^attention\.([qkvo])\.", r"self_attn.\1_proj.", rest)
    rest = re.sub(r"^mlp\.(gate|up|down)\.", r"mlp.\1_proj.", rest)
    for ours, theirs in _NORMS.items():
        rest = re.sub(rf"^{ours}\.", f"{theirs}.", rest)
    return f"model.layers.{layer}.{rest}"


def llama_multipliers(config: DecoderConfig) -> Multipliers:
    """What Llama computes with: ones, and 1/sqrt(head_dim) as the softmax scale."""
    return Multipliers(attention=config.head_dim**-0.5)


def to_hf(config: DecoderConfig, multipliers: Multipliers, architecture: Architecture) -> Any:
    """The content of `config.json`.

    Raises:
        UserError: The architecture has no such shape.
    """
    if architecture == "llama" and config.d_model % config.n_heads:
        raise UserError("Llama's d_model is a multiple of its heads", where="d_model",
                        got=config.d_model, expected=f"a multiple of {config.n_heads}",
                        cure="Export it as granite.")  # fmt: skip
    content: dict[str, Any] = {
        "architectures": [_CLASSES[architecture]],
        "model_type": architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "rope_theta": config.rope_base,
        "tie_word_embeddings": config.tied,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
    }
    if architecture == "granite":
        content |= {
            "embedding_multiplier": multipliers.embedding,
            "residual_multiplier": multipliers.residual,
            "attention_multiplier": multipliers.attention,
            "logits_scaling": 1 / multipliers.output,
        }
    return content


def own_record(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """What an export of ours says of itself in `config.json`; stock code takes no notice."""
    own = content.get("mutransfer")
    return own if isinstance(own, Mapping) else {}


def from_hf(content: Mapping[str, Any], where: str) -> tuple[DecoderConfig, Multipliers]:
    """Shape and multipliers of a Granite or Llama `config.json`, of transformers 4 or 5.

    Raises:
        UserError: It is another architecture, or has what our decoder does not compute.
    """
    kind = content.get("model_type")
    if kind not in _CLASSES:
        raise UserError("not an architecture that can be imported", where=f"{where}: model_type",
                        got=kind, expected=" or ".join(_CLASSES))  # fmt: skip
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise UserError("not RoPE's parameters", where=f"{where}: rope_parameters", got=rope)
    for field, value, wanted in (
        ("hidden_act", content.get("hidden_act", "silu"), "silu"),
        ("attention_bias", content.get("attention_bias", False), False),
        ("mlp_bias", content.get("mlp_bias", False), False),
        ("rope_type", rope.get("rope_type", rope.get("type", "default")), "default"),
        ("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), 1.0),
        ("quantization_config", content.get("quantization_config"), None),
        ("auto_map", content.get("auto_map"), None),
    ):
        if value != wanted:
            raise UserError("our decoder does not compute this", where=f"{where}: {field}",
                            got=value, expected=wanted)  # fmt: skip
    try:
        config, multipliers = _read(content, rope)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise UserError(f"not a whole configuration ({error!r})", where=where) from error
    if config.d_model % config.n_heads and kind == "llama":
        raise UserError("Llama's d_model is a multiple of its heads", where=where)
    return config, multipliers


def _read(content: Mapping[str, Any], rope: Mapping[str, Any]) -> tuple[DecoderConfig, Multipliers]:
    """Absent fields have transformers' defaults."""
    heads = content["num_attention_heads"]
    config = DecoderConfig(
        d_model=content["hidden_size"],
        n_layers=content["num_hidden_layers"],
        n_heads=heads,
        n_kv_heads=content.get("num_key_value_heads") or heads,
        head_dim=content.get("head_dim") or content["hidden_size"] // heads,
        d_ff=content["intermediate_size"],
        vocab_size=content["vocab_size"],
        max_seq_len=content.get("max_position_embeddings", 2048),
        rope_base=float(rope.get("rope_theta", content.get("rope_theta", 10000.0))),
        norm_eps=content.get("rms_norm_eps", 1e-6),
        tied=content.get("tie_word_embeddings", False),
    )
    multipliers = llama_multipliers(config)
    if content["model_type"] == "granite":
        multipliers = Multipliers(
            embedding=content.get("embedding_multiplier", 1.0),
            residual=content.get("residual_multiplier", 1.0),
            attention=content.get("attention_multiplier", 1.0),
            output=1 / content.get("logits_scaling", 1.0),
        )
    if exact := own_record(content).get("multipliers"):
        exact = Multipliers.model_validate(exact)
        for (name, a), (_, b) in zip(exact, multipliers, strict=True):
            if not math.isclose(a, b, rel_tol=1e-12):
                raise ValueError(f"mutransfer.multipliers.{name} is {a}, the config's own {b}")
        multipliers = exact
    return config, multipliers
