"""Models of Hugging Face's `transformers`, without a change to their code."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mutransfer.apply import Geometry, parametrize
from mutransfer.errors import UserError
from mutransfer.modules import carry_multipliers, scaled_modules
from mutransfer.roles import Role, RoleFunction, role_by_name
from mutransfer.rules import DEFAULT, BaseParams, Parametrization
from mutransfer.table import Table

_ROLES: tuple[tuple[str, Role], ...] = (
    (r"(.*\.)?embed_tokens\.weight", "embedding"),
    (r"lm_head\.weight", "head"),
    (r".*\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|gate|up)_proj\.weight", "hidden"),
    (r".*\.layers\.\d+\.(self_attn|mlp)\.(o|down)_proj\.weight", "hidden_out"),
    (r".*\.layers\.\d+\..*norm\.weight", "gain"),
    (r"(.*\.)?norm\.weight", "final_gain"),
    (r".*\.bias", "bias"),
)
_ATTENTION = "mutransfer"


def llama_role(fqn: str, shape: tuple[int, ...]) -> Role:
    """The role of a parameter of Llama and of what shares its names: Qwen, Mistral, OLMo, ….

    Raises:
        UserError: The name is none of these, as an expert's or a router's.
    """
    return role_by_name(_ROLES, fqn, shape)


class AttentionCore(nn.Module):
    """Sees scaled queries and keys on their way to the softmax, and leaves them as they are."""

    is_attention_core = True

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        """Shapes: q (batch, n_heads, seq, head_dim), k (batch, n_kv_heads, seq, head_dim)."""
        return q


def adopt(
    model: Any,
    base: Any,
    params: BaseParams,
    parametrization: str | Parametrization = DEFAULT,
    *,
    role: RoleFunction = llama_role,
) -> Table:
    """Makes a `PreTrainedModel` one that can be parametrized, and its table.

    The model carries the table's multipliers by hooks (`carry_multipliers`), and the coordinate
    check sees its attention, which runs through torch's SDPA as by default. Depth and head size
    are read off the configurations. `initialize` comes next; it draws all weights.

    Args:
        model: The model.
        base: The same at the base width.
        params: The base hyperparameters.
        parametrization: A name, or a record of rules of your own.
        role: (name, shape) -> role, where names are not Llama's.

    Raises:
        UserError: As from `parametrize` and `carry_multipliers`, or the model's attention does
            not come from transformers' registry of attention functions.
    """
    head_dim, base_head_dim = (_head_dim(each.config) for each in (model, base))
    geometry = Geometry(
        n_layers=model.config.num_hidden_layers,
        base_n_layers=base.config.num_hidden_layers,
        head_dim=head_dim,
        base_head_dim=base_head_dim,
    )
    table = parametrize(model, base, params, parametrization, geometry=geometry, role=role)
    carry_multipliers(model, table)
    _show_attention(model)
    return table


def _head_dim(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _show_attention(model: Any) -> None:
    """Sends the attention of `model` past an `AttentionCore` in each of its layers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_ATTENTION, _attend)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
    model.set_attn_implementation(_ATTENTION)
    layers = scaled_modules(model)
    if not layers or model.config._attn_implementation != _ATTENTION:
        raise UserError(
            "this model's attention cannot be seen",
            where=type(model).__name__,
            expected="a model that takes it from transformers' AttentionInterface",
            cure="Use parametrize and carry_multipliers themselves.",
        )
    for layer in layers:
        layer.core = AttentionCore()


def _attend(
    module: Any, query: Tensor, key: Tensor, *args: Any, scaling: float, **options: Any
) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    module.core(query * scaling, key)
    return sdpa_attention_forward(module, query, key, *args, scaling=scaling, **options)
