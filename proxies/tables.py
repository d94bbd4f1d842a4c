"""The table of a decoder, from two shapes and the base hyperparameters."""

from __future__ import annotations

from mutransfer.apply import Geometry, parametrize
from mutransfer.errors import UserError
from mutransfer.rules import DEFAULT, BaseParams, Parametrization
from mutransfer.table import Table
from proxies.decoder import DecoderConfig, meta_decoder


def decoder_table(
    config: DecoderConfig,
    base: DecoderConfig,
    params: BaseParams,
    parametrization: str | Parametrization = DEFAULT,
    *,
    base_width: int | None = None,
) -> Table:
    """Applies the rules to a decoder; allocates nothing.

    Args:
        config: The model to train.
        base: The proxy: its width, depth and head size are what ratios refer to.
        params: The base hyperparameters.
        parametrization: Name of the rules, or a record of rules of your own.
        base_width: Width at which m = 1; the proxy's d_model by default.

    Raises:
        UserError: The rules do not know the name, the models differ in more than width,
            depth and positions, or `base_width` is not positive.
    """
    if base_width is None:
        base_width = base.d_model
    if base_width < 1:
        raise UserError("not a width", where="base_width", got=base_width, expected="at least 1")
    expected = config.narrow(base.d_model, base.n_layers)
    if odd := [
        name
        for name in DecoderConfig.model_fields
        if name != "max_seq_len" and getattr(base, name) != getattr(expected, name)
    ]:
        raise UserError(
            "the base is not this model narrowed",
            where=", ".join(odd),
            got=[getattr(base, name) for name in odd],
            expected=[getattr(expected, name) for name in odd],
            cure="Derive the proxy from its target with narrow(d_model, n_layers).",
        )
    same_depth = base.model_copy(update={"n_layers": config.n_layers})
    return parametrize(
        meta_decoder(config),
        meta_decoder(same_depth),
        params,
        parametrization,
        geometry=Geometry(
            base_width_mult=base.d_model / base_width,
            base_width=base_width,
            n_layers=config.n_layers,
            base_n_layers=base.n_layers,
            head_dim=config.head_dim,
            base_head_dim=base.head_dim,
        ),
    )
