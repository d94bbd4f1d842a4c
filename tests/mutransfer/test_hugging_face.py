"""Hugging Face models, adopted: our own decoder is the oracle for Llama's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mutransfer.apply import initialize
from mutransfer.coord_measure import Recorder
from mutransfer.errors import UserError
from mutransfer.hugging_face import adopt, llama_role
from mutransfer.rules import BaseParams
from mutransfer.table import Table
from proxies.decoder import Decoder, DecoderConfig
from proxies.tables import decoder_table

transformers = pytest.importorskip("transformers")

PARAMS = BaseParams(init_std=0.2, embedding_multiplier=3.0, output_multiplier=0.7,
                    residual_multiplier=0.6, attention_multiplier=1.5)  # fmt: skip
TOKENS = torch.arange(36).view(2, 18) * 7 % 31
NAMES = {
    "model.": "", "embed_tokens": "embedding", "lm_head": "head", "self_attn.": "attention.",
    "_proj": "", "input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm",
    "attention.core": "attention.attend",
}  # fmt: skip
"""What Llama calls things -> what our decoder does."""


def ours(name: str) -> str:
    for theirs, own in NAMES.items():
        name = name.replace(theirs, own)
    return name


def llama(width: int, *, tied: bool = True) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=31, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=2,
        num_attention_heads=width // 4, num_key_value_heads=width // 8, rms_norm_eps=1e-5,
        tie_word_embeddings=tied))  # fmt: skip


def decoder(width: int, *, tied: bool = True) -> DecoderConfig:
    return DecoderConfig(d_model=width, n_layers=2, n_heads=width // 4, n_kv_heads=width // 8,
                         head_dim=4, d_ff=3 * width, vocab_size=31, tied=tied)  # fmt: skip


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Table, Decoder, Table]:
    """Llama and our decoder, with equal weights."""
    tied = request.param
    theirs, own = llama(32, tied=tied), Decoder(decoder(32, tied=tied))
    table = adopt(theirs, llama(16, tied=tied), PARAMS)
    own_table = decoder_table(decoder(32, tied=tied), decoder(16, tied=tied), PARAMS)
    initialize(theirs, table, seed=0)
    initialize(own, own_table, seed=0)
    weights = dict(theirs.named_parameters())
    own.load_state_dict({ours(name): weight for name, weight in weights.items()})
    return theirs, table, own, own_table


def test_the_tables_are_equal(pair: tuple[Any, Table, Decoder, Table]) -> None:
    _, table, _, own_table = pair
    assert table.multipliers == own_table.multipliers
    rows = {ours(row.pattern): row for row in table.rows}
    assert rows.keys() == {row.pattern for row in own_table.rows}
    for row in own_table.rows:
        assert rows[row.pattern].model_copy(update={"pattern": row.pattern}) == row


@torch.no_grad()
def test_outputs_and_everything_on_the_way_are_those_of_our_decoder(
    pair: tuple[Any, Table, Decoder, Table],
) -> None:
    theirs, table, own, own_table = pair
    with Recorder(theirs, table, TOKENS).watch() as values:
        logits = theirs(TOKENS).logits
    with Recorder(own, own_table, TOKENS).watch() as expected:
        torch.testing.assert_close(logits, own(TOKENS), rtol=1e-4, atol=1e-4)
    found = {(kind, ours(name)): value for (kind, name), value in values.items()}
    assert found.keys() == expected.keys()
    m = table.multipliers
    for (kind, name), value in found.items():
        by_hook = 1.0  # where the hook multiplies before the recorder looks
        if kind == "activation" and name == "embedding":
            by_hook = m.embedding
        if kind == "activation" and name.endswith((".o", ".down")):
            by_hook = m.residual
        assert value == pytest.approx(by_hook * expected[kind, name], rel=1e-4), (kind, name)
    assert ("attention_logits", "layers.*.attention.attend") in found


@torch.no_grad()
def test_seeing_the_attention_changes_nothing() -> None:
    torch.manual_seed(0)
    model = llama(32)
    plain = model(TOKENS).logits
    table = adopt(model, llama(32), BaseParams(init_std=0.2))
    assert table.multipliers.attention == 0.5
    model.set_attn_implementation("sdpa")
    unseen = model(TOKENS).logits
    model.set_attn_implementation("mutransfer")
    torch.testing.assert_close(model(TOKENS).logits, unseen, rtol=0, atol=0)
    assert not torch.equal(unseen, plain), "the residual multiplier is at work"


def test_gains_of_qk_norm_have_a_role_and_a_row() -> None:
    def qwen(width: int) -> Any:
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
            vocab_size=31, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=2,
            head_dim=8, num_attention_heads=width // 8, num_key_value_heads=width // 8,
        ))  # fmt: skip

    table = adopt(qwen(32), qwen(16), PARAMS)
    rows = {row.pattern: row for row in table.rows}
    for name in ("q_norm", "k_norm"):
        row = rows[f"model.layers.*.self_attn.{name}.weight"]
        assert (row.role, row.shape) == ("gain", (8,))
    assert rows["lm_head.weight"].role == "head"
    assert table.multipliers.attention == pytest.approx(1.5 / 8**0.5)


def test_a_name_that_is_not_llama_s_is_refused() -> None:
    with pytest.raises(UserError, match=r"^model\.layers\.0\.mlp\.router\.weight: no role .*role="):
        llama_role("model.layers.0.mlp.router.weight", (4, 8))


def test_attention_that_cannot_be_seen_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(32)
    monkeypatch.setattr(type(model), "set_attn_implementation", lambda self, name: None)
    with pytest.raises(UserError, match=r"^LlamaForCausalLM: this model's attention cannot be"):
        adopt(model, llama(16), BaseParams())
    assert isinstance(model, nn.Module)
