"""The table of a decoder, from two shapes and the base hyperparameters."""

from __future__ import annotations

from mutransfer.rules import DEFAULT, BaseParams
from mutransfer.table import Geometry, Table, parametrize
from proxies.decoder import DecoderConfig, meta_decoder


def decoder_table(
    config: DecoderConfig,
    base: DecoderConfig,
    params: BaseParams,
    parametrization: str = DEFAULT,
    *,
    base_width: int | None = None,
) -> Table:
    """Applies the rules to a decoder; allocates nothing.

    Args:
        config: The model to train.
        base: The proxy: its width, depth and head size are what ratios refer to.
        params: The base hyperparameters.
        parametrization: Name of the rules.
        base_width: Width at which m = 1; the proxy's d_model by default.

    Raises:
        UserError: The rules do not know the name, or the models differ in more than size.
    """
    base_width = base_width or base.d_model
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
