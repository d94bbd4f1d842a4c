"""The same function under other multipliers: what they lose, the weights gain.

With embedding a, residual r, softmax scale s and output factor b, the decoder computes
x0 = a E[t], x += r o(softmax(s q k) v), x += r down(...), logits = E (b g norm(x)).
The residual stream itself stays as it is, so every RMSNorm sees what it saw and its epsilon
keeps its meaning. E takes a/a', q takes s/s' (RoPE is linear), o and down take r/r'. A tied head
is E too: there the last gain g gives back a/a' beside taking b/b', so tying survives.
"""

from __future__ import annotations

from torch import Tensor

from full_scale.tensors import Tensors
from mutransfer.table import Multipliers


def refold(tensors: Tensors, old: Multipliers, new: Multipliers, *, tied: bool) -> Tensors:
    """The tensors of a decoder with multipliers `old`, for the same decoder with `new`.

    Args:
        tensors: By the decoder's names.
        old: What the decoder has.
        new: What it shall have.
        tied: Whether the head is the embedding.

    Returns:
        Tensors that are multiplied in float64 as they are read; those that do not change are
        as they were.
    """

    def read(name: str) -> Tensor:
        tensor, factor = tensors.read(name), refold_factor(name, old, new, tied=tied)
        return tensor if factor == 1.0 else tensor.double() * factor

    return Tensors(shapes=tensors.shapes, read=read)


def refold_factor(name: str, old: Multipliers, new: Multipliers, *, tied: bool) -> float:
    """What one parameter of the decoder is multiplied by."""
    embedding = old.embedding / new.embedding
    if name == "embedding.weight":
        return embedding
    if name == "norm.weight":
        return old.output / new.output / (embedding if tied else 1.0)
    if name.endswith("attention.q.weight"):
        return old.attention / new.attention
    if name.endswith(("attention.o.weight", "mlp.down.weight")):
        return old.residual / new.residual
    return 1.0
