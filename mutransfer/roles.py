"""Roles: what a parameter is for, which decides how every rule treats it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal, get_args

from mutransfer.errors import UserError

Role = Literal["embedding", "head", "hidden", "hidden_out", "gain", "final_gain", "bias"]
"""The classes of parameters that the rules tell apart.

- `embedding`: (vocab, d_model) table; also the output head where the two are tied.
- `head`: untied output matrix (vocab, d_model).
- `hidden`: matrix with both sides growing with width (q, k, v, gate, up).
- `hidden_out`: the same, but its output is added to the residual stream (o, down).
- `gain`, `final_gain`: norm gains inside the blocks, and of the last norm.
- `bias`: any other vector; the rules treat it as a gain that starts at zero.
"""

RoleFunction = Callable[[str, tuple[int, ...]], Role]
"""(fully qualified name, shape) -> role."""

MATRIX_ROLES: frozenset[Role] = frozenset({"hidden", "hidden_out"})
"""The roles that Muon may optimize: both dimensions are widths."""

BLOCK_ROLES: frozenset[Role] = frozenset({"hidden", "hidden_out", "gain", "bias"})
"""The roles whose rules know the depth: everything inside a residual block."""

_DECODER_ROLES: tuple[tuple[str, Role], ...] = (
    (r"embedding\.weight", "embedding"),
    (r"head\.weight", "head"),
    (r"layers\.\d+\.(attention\.[qkv]|mlp\.(gate|up))\.weight", "hidden"),
    (r"layers\.\d+\.(attention\.o|mlp\.down)\.weight", "hidden_out"),
    (r"layers\.\d+\.(attention_norm|mlp_norm)\.weight", "gain"),
    (r"norm\.weight", "final_gain"),
)


def decoder_role(fqn: str, shape: tuple[int, ...]) -> Role:
    """The role of a parameter of mutransfer's own decoder, by its name.

    Raises:
        UserError: No role is known for `fqn`; a model of your own needs a role function.
    """
    return role_by_name(_DECODER_ROLES, fqn, shape)


def role_by_name(roles: tuple[tuple[str, Role], ...], fqn: str, shape: tuple[int, ...]) -> Role:
    """The role of the first pattern, a regular expression, that names all of `fqn`.

    Raises:
        UserError: None does.
    """
    for pattern, role in roles:
        if re.fullmatch(pattern, fqn):
            return role
    raise UserError(
        "no role is known for this parameter",
        where=fqn,
        got=f"shape {tuple(shape)}",
        expected=f"one of {', '.join(get_args(Role))}",
        cure="Pass role=<function (name, shape) -> role> for a model of your own.",
    )


def pattern_of(fqn: str) -> str:
    """`fqn` with every layer index replaced by `*`: one pattern per kind of parameter."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", fqn)


def matches(pattern: str, fqn: str) -> bool:
    """Whether `pattern` (`*` stands for one layer index) names `fqn`."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), fqn) is not None
