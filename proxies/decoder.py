"""The one decoder: pre-RMSNorm, SwiGLU, grouped-query attention, RoPE, tied or untied.

Written over (..., batch, seq, d_model): leading dimensions pass through untouched.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from mutransfer.errors import UserError
from mutransfer.table import Multipliers
from proxies.layers import LayerSet, Plain
from proxies.memory import Memory, chunked_loss, twice, wide


class DecoderConfig(BaseModel):
    """The shape of a decoder; nothing in it is a hyperparameter to tune."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    d_model: int = Field(ge=1, le=2**20, description="width of the residual stream")
    n_layers: int = Field(ge=1, le=4096, description="number of blocks")
    n_heads: int = Field(ge=1, le=65536, description="query heads")
    n_kv_heads: int = Field(ge=1, le=65536, description="key and value heads")
    head_dim: int = Field(ge=2, le=4096, multiple_of=2, description="size of one head")
    d_ff: int = Field(ge=1, le=2**22, description="width of the SwiGLU")
    vocab_size: int = Field(ge=2, le=2**22, description="tokens in the vocabulary")
    max_seq_len: int = Field(2048, ge=1, le=2**24, description="positions, in tokens")
    rope_base: float = Field(10000.0, gt=0, description="RoPE's theta")
    norm_eps: float = Field(1e-5, gt=0, lt=1, description="RMSNorm's epsilon")
    tied: bool = Field(True, description="whether the head is the embedding")

    @model_validator(mode="after")
    def _heads(self) -> DecoderConfig:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads must be a multiple of n_kv_heads; got {self.n_heads}, {self.n_kv_heads}"
            )
        return self

    @property
    def n_embedding(self) -> int:
        """Parameters of the embedding and of an untied head."""
        return self.vocab_size * self.d_model * (1 if self.tied else 2)

    @property
    def n_nonembedding(self) -> int:
        """All other parameters: what "size" means throughout."""
        heads = (2 * self.n_heads + 2 * self.n_kv_heads) * self.head_dim
        block = self.d_model * (heads + 3 * self.d_ff + 2)
        return self.n_layers * block + self.d_model

    @property
    def n_parameters(self) -> int:
        """All parameters."""
        return self.n_embedding + self.n_nonembedding

    @property
    def width_step(self) -> int:
        """Widths that are multiples of this keep every ratio exact."""
        return self.d_model // math.gcd(self.d_model, self.n_heads, self.n_kv_heads, self.d_ff)

    def narrow(self, d_model: int, n_layers: int | None = None) -> DecoderConfig:
        """The same model at another width (and depth): equal head_dim and ratios.

        Raises:
            UserError: Heads, KV heads or d_ff would not be whole at this width, or there is
                no layer left.
        """
        step = self.width_step
        if d_model < 1 or d_model % step:
            some = ", ".join(str(step * k) for k in (1, 2, 3, 4)) + f", … ({step} * k)"
            raise UserError(
                "this model cannot be narrowed to that d_model exactly",
                where="d_model",
                got=d_model,
                expected=f"one of {some}",
                cure="Heads, KV heads and d_ff must stay in proportion.",
            )
        if n_layers is not None and n_layers < 1:
            raise UserError("a model needs layers", where="n_layers", got=n_layers,
                            expected="at least 1")  # fmt: skip
        ratio = d_model // step
        share = self.d_model // step
        return self.model_copy(
            update={
                "d_model": d_model,
                "n_layers": n_layers or self.n_layers,
                "n_heads": self.n_heads // share * ratio,
                "n_kv_heads": self.n_kv_heads // share * ratio,
                "d_ff": self.d_ff // share * ratio,
            }
        )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies RoPE (2104.09864, eq. 34) in the half-split layout that Llama's weights use.

    Args:
        x: (..., heads, seq, head_dim).
        cos, sin: (seq, head_dim / 2), or (..., 1, seq, head_dim / 2).
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attend(nn.Module):
    """Causal softmax attention of rotated, scaled queries: softmax(q k^T) v.

    A module of its own so that checks can watch its inputs; it has no parameters.
    Shapes: q (..., n_heads, seq, head_dim), k and v (..., n_kv_heads, seq, head_dim).
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """The scale is in `q` already; a `mask` (..., 1, seq, seq) takes the place of causality."""
        repeat = q.shape[-3] // k.shape[-3]
        if repeat > 1:
            k, v = k.repeat_interleave(repeat, dim=-3), v.repeat_interleave(repeat, dim=-3)
        # torch's fast kernels know one batch dimension
        q4, k4, v4 = (t.flatten(0, -4) if t.dim() > 4 else t for t in (q, k, v))
        if mask is not None:
            mask = mask.flatten(0, -4) if mask.dim() > 4 else mask
            mixed = F.scaled_dot_product_attention(q4, k4, v4, attn_mask=mask, scale=1.0)
        else:
            mixed = F.scaled_dot_product_attention(q4, k4, v4, is_causal=True, scale=1.0)
        return mixed.view(*q.shape[:-1], v.shape[-1]) if q.dim() > 4 else mixed


class Attention(nn.Module):
    """Grouped-query attention (2305.13245). Shapes: (..., batch, seq, d_model)."""

    def __init__(self, config: DecoderConfig, layers: LayerSet) -> None:
        super().__init__()
        c = config
        self.head_dim = c.head_dim
        self.q = layers.linear(c.d_model, c.n_heads * c.head_dim)
        self.k = layers.linear(c.d_model, c.n_kv_heads * c.head_dim)
        self.v = layers.linear(c.d_model, c.n_kv_heads * c.head_dim)
        self.o = layers.linear(c.n_heads * c.head_dim, c.d_model)
        self.attend = Attend()

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, scale: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Attends causally, or by `mask`; `scale` is the whole softmax scale."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(-3, -2)
            for proj in (self.q, self.k, self.v)
        )
        q = rotate(q, cos, sin) * scale
        heads = (q, rotate(k, cos, sin), v)
        mixed = self.attend(*heads) if mask is None else self.attend(*heads, mask)
        out: Tensor = self.o(mixed.transpose(-3, -2).flatten(-2))
        return out


class MLP(nn.Module):
    """SwiGLU (2002.05202). Shapes: (..., d_model) -> (..., d_model)."""

    def __init__(self, config: DecoderConfig, layers: LayerSet) -> None:
        super().__init__()
        self.gate = layers.linear(config.d_model, config.d_ff)
        self.up = layers.linear(config.d_model, config.d_ff)
        self.down = layers.linear(config.d_ff, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        """down(silu(gate x) * up x)."""
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class Block(nn.Module):
    """x + residual * attention(norm(x)), then the same with the MLP."""

    def __init__(self, config: DecoderConfig, layers: LayerSet) -> None:
        super().__init__()
        self.attention_norm = layers.norm(config.d_model, config.norm_eps)
        self.attention = Attention(config, layers)
        self.mlp_norm = layers.norm(config.d_model, config.norm_eps)
        self.mlp = MLP(config, layers)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        residual: Tensor,
        scale: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Shapes: (..., batch, seq, d_model) -> the same."""
        attended = self.attention(self.attention_norm(x), cos, sin, scale, mask)
        x = x + residual.to(attended.dtype) * attended
        fed = self.mlp(self.mlp_norm(x))
        out: Tensor = x + residual.to(fed.dtype) * fed
        return out


class Decoder(nn.Module):
    """A decoder-only language model.

    The multipliers are tensors, so that one compiled program serves every trial of a sweep;
    `mutransfer.apply.initialize` sets them together with the weights.

    Args:
        config: Its shape.
        layers: Where its layers come from; plain torch by default.

    Attributes:
        memory: What passes with gradients compute twice; nothing unless a trainer says so.
    """

    memory = Memory()

    def __init__(self, config: DecoderConfig, layers: LayerSet | None = None) -> None:
        super().__init__()
        layers = layers or Plain()
        self.config = config
        self.embedding = layers.embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config, layers) for _ in range(config.n_layers))
        self.norm = layers.norm(config.d_model, config.norm_eps)
        if not config.tied:
            self.head = layers.head(config.d_model, config.vocab_size)
        for name in Multipliers.model_fields:
            dims = 4 if name == "attention" else 3  # (batch, heads, seq, head_dim); else the stream
            self.register_buffer(f"{name}_multiplier", layers.multiplier(dims), persistent=False)

    @torch.no_grad()
    def set_multipliers(self, multipliers: Multipliers) -> None:
        """Takes the table's effective multipliers."""
        for name, value in multipliers:
            self.get_buffer(f"{name}_multiplier").fill_(value)

    def hidden(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """The state that the head reads, multiplier included.

        With `documents`, the number of each token's document, attention stays within each.
        Positions begin at 0 in each. RoPE sees differences alone, but its angles are rounded to
        fp32: so a document is rotated as it would be alone, and more finely than far out.

        Shapes: tokens and documents (..., batch, seq) -> (..., batch, seq, d_model).
        """
        residual, scale = self.residual_multiplier, self.attention_multiplier
        x = self.embedding(tokens) * self.embedding_multiplier
        cos, sin = self._rope(tokens.shape[-1], x)
        mask = None
        if documents is not None:
            mask, places = within_documents(documents), document_positions(documents)
            cos, sin = cos[places].unsqueeze(-3), sin[places].unsqueeze(-3)
        again = self.memory.recompute and torch.is_grad_enabled()
        for block in self.layers:
            given = (x, cos, sin, residual, scale, mask)
            x = twice(block, *given) if again else block(*given)
        state: Tensor = self.norm(x) * self.output_multiplier
        return state

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """Logits. Shapes: tokens (..., batch, seq) -> (..., batch, seq, vocab_size).

        Raises:
            UserError: The sequence is longer than `max_seq_len`.
        """
        return self._head()(self.hidden(tokens, documents))

    def loss(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """Mean next-token cross-entropy in nats; see `hidden` for `documents`.

        The last token of a document is asked for the first of the next one, masked or not.

        Shapes: tokens (..., batch, seq + 1), documents (..., batch, seq) -> scalar.
        """
        if (chunk := self.memory.loss_chunk) is None:
            return next_token_loss(self(tokens[..., :-1], documents), tokens)
        state = self.hidden(tokens[..., :-1], documents)
        return chunked_loss(state, self._head(), tokens[..., 1:], chunk)

    def losses(self, tokens: Tensor) -> Tensor:
        """The loss of each model of a stack (`proxies.stacked`).

        Shapes: tokens (members, batch, seq + 1), or (batch, seq + 1) for all -> (members,).
        """
        return next_token_losses(self(tokens[..., :-1]), tokens)

    def _head(self) -> Callable[[Tensor], Tensor]:
        """State to logits."""
        head: Callable[[Tensor], Tensor] = (
            self.embedding.logits if self.config.tied else self.head  # type: ignore[assignment]
        )
        return head

    def _rope(self, seq_len: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of every position and frequency: (seq, head_dim / 2).

        Angles are float32's, to the last bit those of `transformers`, which runs what we export:
        at position 131,071 the fastest may be off by 0.016, there as here.
        """
        c = self.config
        if seq_len > c.max_seq_len:
            raise UserError("sequence is longer than the model's positions", where="seq_len",
                            got=seq_len, expected=f"at most {c.max_seq_len}")  # fmt: skip
        exponent = torch.arange(0, c.head_dim, 2, device=like.device).float() / c.head_dim
        angle = torch.outer(
            torch.arange(seq_len, device=like.device).float(),
            1.0 / c.rope_base**exponent,
        )
        return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def within_documents(documents: Tensor) -> Tensor:
    """Where attention may look: back, and within a document.

    Shapes: documents (..., batch, seq) -> boolean (..., batch, 1, seq, seq).
    """
    same = documents.unsqueeze(-1) == documents.unsqueeze(-2)
    return same.tril().unsqueeze(-3)


def document_positions(documents: Tensor) -> Tensor:
    """Positions from 0 within each document. Shapes: (..., batch, seq) -> the same."""
    places = torch.arange(documents.shape[-1], device=documents.device).expand(documents.shape)
    begins = torch.zeros_like(documents, dtype=torch.bool)
    begins[..., 1:] = documents[..., 1:] != documents[..., :-1]
    return places - torch.where(begins, places, 0).cummax(dim=-1).values


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy in nats, computed in fp32 at least.

    Shapes: logits (..., batch, seq, vocab_size), tokens (..., batch, seq + 1) -> scalar.
    """
    return F.cross_entropy(_wide(logits.flatten(0, -2)), tokens[..., 1:].flatten())


def next_token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """`next_token_loss` of every stacked model, up to the order of the sum.

    Shapes: logits (members, batch, seq, vocab_size), tokens ([members,] batch, seq + 1) ->
    (members,).
    """
    targets = tokens[..., 1:].expand(logits.shape[:-1])
    each = F.cross_entropy(_wide(logits.flatten(0, -2)), targets.flatten(), reduction="none")
    return each.view(targets.shape).mean(dim=(-2, -1))


def _wide(x: Tensor) -> Tensor:
    """In fp32 at least."""
    return x.to(wide(x.dtype))


def meta_decoder(config: DecoderConfig) -> Decoder:
    """The decoder without memory: shapes only, on the meta device."""
    with torch.device("meta"):
        return Decoder(config)
