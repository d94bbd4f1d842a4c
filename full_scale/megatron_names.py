"""Our decoder's tensors in the layout of Megatron's GPTModel, and back; both bit for bit.

Megatron fuses q, k and v per query group, [q heads of the group, k, v] group after group, and
gate and up as [gate; up]. With transformer-engine layers, the norms live in the matrix behind them.
"""

from __future__ import annotations

import re
from typing import Literal

import torch
from torch import Tensor

from full_scale.tensors import Shape, Tensors
from mutransfer.errors import UserError
from proxies.decoder import DecoderConfig

Layers = Literal["transformer_engine", "local"]

_OUTSIDE = {
    "embedding.word_embeddings.weight": "embedding.weight",
    "decoder.final_layernorm.weight": "norm.weight",
    "output_layer.weight": "head.weight",
}
_SAME = {
    "self_attention.linear_proj.weight": "attention.o.weight",
    "mlp.linear_fc2.weight": "mlp.down.weight",
}
_NORMS: dict[Layers, dict[str, str]] = {
    "transformer_engine": {
        "self_attention.linear_qkv.layer_norm_weight": "attention_norm.weight",
        "mlp.linear_fc1.layer_norm_weight": "mlp_norm.weight",
    },
    "local": {
        "input_layernorm.weight": "attention_norm.weight",
        "pre_mlp_layernorm.weight": "mlp_norm.weight",
    },
}
_QKV, _FC1 = "self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"


def to_megatron(tensors: Tensors, config: DecoderConfig, layers: Layers) -> Tensors:
    """Our tensors under Megatron's names, fused as they are read."""
    c = config
    inside = {**_SAME, **_NORMS[layers]}
    shapes: dict[str, Shape] = {}
    for theirs, ours in _OUTSIDE.items():
        if ours in tensors.shapes:
            shapes[theirs] = tensors.shapes[ours]
    for layer in range(c.n_layers):
        for theirs, ours in inside.items():
            shapes[f"decoder.layers.{layer}.{theirs}"] = tensors.shapes[f"layers.{layer}.{ours}"]
        heads = (c.n_heads + 2 * c.n_kv_heads) * c.head_dim
        shapes[f"decoder.layers.{layer}.{_QKV}"] = (heads, c.d_model)
        shapes[f"decoder.layers.{layer}.{_FC1}"] = (2 * c.d_ff, c.d_model)

    def read(name: str) -> Tensor:
        if name in _OUTSIDE:
            return tensors.read(_OUTSIDE[name])
        layer, rest = _split(name)
        if rest == _QKV:
            q, k, v = (tensors.read(f"layers.{layer}.attention.{x}.weight") for x in "qkv")
            wide = torch.promote_types(q.dtype, k.dtype)
            parts = [t.to(wide).view(c.n_kv_heads, -1, c.head_dim, c.d_model) for t in (q, k, v)]
            return torch.cat(parts, dim=1).reshape(-1, c.d_model)
        if rest == _FC1:
            return torch.cat([tensors.read(f"layers.{layer}.mlp.{x}.weight")
                              for x in ("gate", "up")])  # fmt: skip
        return tensors.read(f"layers.{layer}.{inside[rest]}")

    return Tensors(shapes=shapes, read=read)


def from_megatron(tensors: Tensors, config: DecoderConfig) -> Tensors:
    """Megatron's tensors under our names, split as they are read.

    Raises:
        UserError: A name or a shape is not one of Megatron's GPTModel.
    """
    c = config
    inside = {**_SAME, **_NORMS["transformer_engine"], **_NORMS["local"]}
    sources: dict[str, str] = {}
    for name in tensors.shapes:
        if name in _OUTSIDE:
            sources[_OUTSIDE[name]] = name
            continue
        layer, rest = _split(name)
        if rest == _QKV:
            sources |= {f"layers.{layer}.attention.{x}.weight": name for x in "qkv"}
        elif rest == _FC1:
            sources |= {f"layers.{layer}.mlp.{x}.weight": name for x in ("gate", "up")}
        elif rest in inside:
            sources[f"layers.{layer}.{inside[rest]}"] = name
        else:
            raise UserError("not a tensor of Megatron's GPTModel", where=name)
    rows = {"q": c.n_heads, "k": c.n_kv_heads, "v": c.n_kv_heads}
    fused = {_QKV: ((c.n_heads + 2 * c.n_kv_heads) * c.head_dim, c.d_model),
             _FC1: (2 * c.d_ff, c.d_model)}  # fmt: skip
    shapes: dict[str, Shape] = {}
    for ours, name in sources.items():
        part = ours.split(".")[-2]
        rest = name.split(".", 3)[-1]
        if rest in fused:
            if tuple(tensors.shapes[name]) != fused[rest]:
                raise UserError("tensor has another shape than the model", where=name,
                                got=tensors.shapes[name], expected=fused[rest])  # fmt: skip
            shapes[ours] = (rows[part] * c.head_dim if part in rows else c.d_ff, c.d_model)
        else:
            shapes[ours] = tensors.shapes[name]

    def read(ours: str) -> Tensor:
        tensor, part = tensors.read(sources[ours]), ours.split(".")[-2]
        if sources[ours].endswith(_FC1):
            return tensor.chunk(2)[part == "up"]
        if not sources[ours].endswith(_QKV):
            return tensor
        groups = tensor.view(c.n_kv_heads, -1, c.head_dim, c.d_model)
        own = {"q": groups[:, :-2], "k": groups[:, -2:-1], "v": groups[:, -1:]}[part]
        return own.reshape(-1, c.d_model)

    return Tensors(shapes=shapes, read=read)


def _split(name: str) -> tuple[str, str]:
    """Layer and the rest of a name inside a layer."""
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if match is None:
        raise UserError("not a tensor of Megatron's GPTModel", where=name)
    return match[1], match[2]
