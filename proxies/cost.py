"""What a step of a decoder costs in arithmetic."""

from __future__ import annotations

from proxies.decoder import DecoderConfig
from proxies.memory import Memory


def flops_per_token(config: DecoderConfig, seq_len: int) -> int:
    """Floating-point operations per trained token: forward 2 and backward 4 per weight, 6 N.

    N counts what multiplies: everything but an embedding that is only looked up. Attention adds
    6 * layers * seq_len * (heads * head_dim): twelve for scores and mixing, forward and backward,
    half of it because a token does not see what follows (PaLM, 2204.02311, App. B, without that
    half). Products computed again to save memory do not count: they are no progress.
    """
    multiplied = config.n_nonembedding + config.vocab_size * config.d_model
    attention = config.n_layers * seq_len * config.n_heads * config.head_dim
    return 6 * multiplied + 6 * attention


def flops_again(config: DecoderConfig, seq_len: int, memory: Memory) -> int:
    """Operations per token that saving memory adds: blocks and head forward, once more."""
    again = 0
    if memory.recompute:
        blocks = config.n_nonembedding - config.d_model
        again += 2 * blocks + 2 * config.n_layers * seq_len * config.n_heads * config.head_dim
    if memory.loss_chunk is not None:
        again += 2 * config.vocab_size * config.d_model
    return again
