"""A stack of decoders computes what each of them computes alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mutransfer.apply import initialize
from mutransfer.rules import BaseParams
from proxies.decoder import Attend, Decoder, DecoderConfig
from proxies.layers import RMSNorm
from proxies.stacked import Stacked, StackedEmbedding, StackedLinear, StackedRMSNorm
from proxies.tables import decoder_table

TIED = DecoderConfig(
    d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=40, vocab_size=50
)
UNTIED = TIED.model_copy(update={"tied": False})
MEMBERS = 3


def singles(config: DecoderConfig, dtype: torch.dtype = torch.float64) -> list[Decoder]:
    """Models with different weights and multipliers."""
    models = []
    for i in range(MEMBERS):
        params = BaseParams(
            init_std=0.1 * (1 + i), embedding_multiplier=2.0 + i, output_multiplier=1.0 + i,
            residual_multiplier=0.5 + i, attention_multiplier=1.5 + i,
        )  # fmt: skip
        model = Decoder(config).to(dtype)
        initialize(model, decoder_table(config, config.narrow(12, 1), params), seed=i)
        with torch.no_grad():  # gains too
            for name, p in model.named_parameters():
                if name.endswith("norm.weight"):
                    p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        models.append(model)
    return models


@torch.no_grad()
def stack(models: list[Decoder]) -> Decoder:
    """The same models in one."""
    dtype = next(models[0].parameters()).dtype
    stacked = Decoder(models[0].config, Stacked(len(models))).to(dtype)
    for source in ("named_parameters", "named_buffers"):
        targets = dict(getattr(stacked, source)())
        for i, model in enumerate(models):
            for name, tensor in getattr(model, source)():
                targets[name][i].copy_(tensor)
    return stacked


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("shared", [True, False])
def test_logits_losses_and_gradients_are_those_of_each_model(
    config: DecoderConfig, shared: bool
) -> None:
    models, ids = singles(config), tokens(MEMBERS, 4, 9)
    stacked = stack(models)
    batch = ids[0] if shared else ids
    logits = stacked(batch[..., :-1])
    losses = stacked.losses(batch)
    losses.sum().backward()
    assert losses.shape == (MEMBERS,)
    for i, model in enumerate(models):
        own = ids[0] if shared else ids[i]
        loss = model.loss(own)
        loss.backward()
        torch.testing.assert_close(logits[i], model(own[:, :-1]), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(losses[i], loss, rtol=1e-12, atol=0)
        for name, p in model.named_parameters():
            gradient = stacked.get_parameter(name).grad
            assert gradient is not None
            torch.testing.assert_close(gradient[i], p.grad, rtol=1e-10, atol=1e-14)
    assert losses.unique().numel() == MEMBERS, "the members differ"


def test_the_loss_of_a_float64_model_is_computed_in_float64() -> None:
    model, ids = singles(TIED)[0], tokens(2, 9)
    expected = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    assert model.loss(ids).dtype == torch.float64
    assert torch.equal(model.loss(ids), expected)


def test_a_member_that_is_not_finite_leaves_the_others_bits() -> None:
    models, ids = singles(TIED, torch.float32), tokens(MEMBERS, 4, 9)
    well, ill = stack(models), stack(models)
    with torch.no_grad():
        ill.get_parameter("embedding.weight")[1, 7] = torch.nan
        ill.get_parameter("layers.1.mlp.down.weight")[1] = torch.inf
    losses = [model.losses(ids) for model in (well, ill)]
    for each in losses:
        each.sum().backward()
    assert not losses[1][1].isfinite()
    for name, p in well.named_parameters():
        other = ill.get_parameter(name).grad
        assert p.grad is not None
        assert other is not None
        for i in (0, 2):
            assert torch.equal(losses[0][i], losses[1][i])
            assert torch.equal(p.grad[i], other[i]), name
        assert not other[1].isfinite().all(), name


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_attention_folds_leading_dimensions(n_kv_heads: int) -> None:
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(3, 2, 4, 7, 6, generator=draw)
    k, v = torch.randn(2, 3, 2, n_kv_heads, 7, 6, generator=draw)
    folded = Attend()(q, k, v)
    assert folded.shape == q.shape
    for i in range(3):
        torch.testing.assert_close(folded[i], Attend()(q[i], k[i], v[i]))


def test_each_layer_against_its_formula() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 5, 8, generator=draw, dtype=torch.float64)
    linear, norm = StackedLinear(3, 8, 6).double(), StackedRMSNorm(3, 8, 1e-3).double()
    table = StackedEmbedding(3, 11, 8).double()
    with torch.no_grad():
        for layer in (linear, norm, table):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=draw))
        single = RMSNorm(8, 1e-3).double()
        ids = torch.tensor([[0, 10, 3], [4, 4, 9]])
        for i in range(3):
            torch.testing.assert_close(linear(x)[i], x[i] @ linear.weight[i].T)
            torch.testing.assert_close(table.logits(x)[i], x[i] @ table.weight[i].T)
            single.weight.copy_(norm.weight[i])
            torch.testing.assert_close(norm(x)[i], single(x[i]))
            assert torch.equal(table(ids)[i], table.weight[i][ids])
            assert torch.equal(table(torch.stack([ids, ids - ids, ids]))[i],
                               table.weight[i][ids if i != 1 else ids - ids])  # fmt: skip


def test_the_number_of_members_is_read_off_the_weights() -> None:
    models, ids = singles(TIED), tokens(2, 9)
    stacked = stack(models)
    whole = stacked.losses(ids)
    for p in stacked.parameters():
        p.data = p.data[1:]
    for name, buffer in stacked.named_buffers():
        setattr(stacked, name, buffer[1:])
    torch.testing.assert_close(stacked.losses(ids), whole[1:])


def test_autocast_leaves_the_precision_of_the_stream_alone() -> None:
    """A multiplier per member promotes nothing, as one of no dimension promotes nothing."""
    models, ids = singles(TIED, torch.float32), tokens(MEMBERS, 4, 9)
    stacked = stack(models)
    with torch.autocast("cpu", torch.bfloat16):
        losses = stacked.losses(ids)
        alone = torch.stack([model.loss(ids[i]) for i, model in enumerate(models)])
    exact = stacked.losses(ids)
    assert not torch.equal(losses, exact)
    assert (losses - alone).abs().max() <= 1e-2 * (losses - exact).abs().max()
