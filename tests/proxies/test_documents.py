"""Attention within documents: a packed sequence gives what its documents give alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mutransfer.apply import initialize
from mutransfer.rules import BaseParams
from proxies.decoder import Decoder, document_positions, within_documents
from proxies.presets import TINY
from proxies.tables import decoder_table

CONFIG = TINY.narrow(64, n_layers=2).model_copy(update={"vocab_size": 31, "max_seq_len": 32})
LENGTHS = ((7, 1, 12, 4), (24,), (1, 1, 22), (23, 1))


@pytest.fixture
def model() -> Decoder:
    model = Decoder(CONFIG)
    table = decoder_table(CONFIG, CONFIG.narrow(32), BaseParams(init_std=0.3))
    initialize(model, table, seed=0)
    return model.double()


def packed() -> tuple[Tensor, Tensor]:
    """Tokens (4, 25) and the document of each input (4, 24)."""
    tokens = torch.randint(31, (4, 25), generator=torch.Generator().manual_seed(0))
    rows = [torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in LENGTHS]
    return tokens, torch.stack(rows)


def gradients(model: Decoder, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def test_masked_equals_documents_alone(model: Decoder) -> None:
    tokens, documents = packed()
    logits = model(tokens[:, :-1], documents)
    alone = torch.zeros((), dtype=torch.float64)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            part = tokens[row : row + 1, start : start + length + 1]
            single = model(part[:, :-1])
            torch.testing.assert_close(
                logits[row, start : start + length], single[0], rtol=0, atol=1e-12
            )
            alone = alone + F.cross_entropy(single[0], part[0, 1:], reduction="sum")
            start += length
    loss = model.loss(tokens, documents)
    torch.testing.assert_close(loss, alone / 96, rtol=1e-13, atol=0)
    theirs = gradients(model, alone / 96)
    for name, gradient in gradients(model, loss).items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-9, atol=1e-13, msg=name)
    # and the mask is what did it
    assert (model(tokens[:, :-1]) - logits).abs().max() > 1e-3


def test_one_document_is_plain_causal_attention(model: Decoder) -> None:
    tokens, _ = packed()
    whole = torch.zeros(4, 24, dtype=torch.int32)
    torch.testing.assert_close(model(tokens[:, :-1], whole), model(tokens[:, :-1]), rtol=0,
                               atol=1e-12)  # fmt: skip


def test_the_mask_looks_back_and_within() -> None:
    mask = within_documents(torch.tensor([[0, 0, 1]]))
    assert mask.shape == (1, 1, 3, 3)
    assert mask[0, 0].tolist() == [[True, False, False], [True, True, False], [False, False, True]]


def test_positions_begin_anew_in_each_document() -> None:
    documents = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 2, 3, 3, 3]])
    assert document_positions(documents).tolist() == [[0, 1, 0, 1, 2, 0], [0, 0, 0, 0, 1, 2]]
