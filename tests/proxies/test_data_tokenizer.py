"""Tokenizers: text survives, special tokens in the text are text, equal training is equal."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from mutransfer.errors import UserError
from proxies.data import ByteTokenizer, JsonTokenizer, read_tokenizer, train_bpe
from proxies.data import tokenizer as tokenizer_module

TEXTS = [Path(__file__).read_text(), Path(tokenizer_module.__file__).read_text()]
HARD = "é€😀\r\n\t  <|endoftext|> x </s>\n\n日本語\x01 end"


@pytest.fixture(scope="module")
def bpe() -> JsonTokenizer:
    return train_bpe(TEXTS, 400)


def test_bytes_are_utf8_and_0_is_free() -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(HARD)
    assert ids.tolist() == list(HARD.encode())
    assert tokenizer.separator not in ids
    assert tokenizer.decode(ids) == HARD
    assert tokenizer.decode(ids[1:])[0] == "\ufffd"  # half a character


@pytest.mark.parametrize("text", [HARD, *TEXTS, "<|endoftext|>", "a", ""], ids=range(6))
def test_bpe_round_trips(bpe: JsonTokenizer, text: str) -> None:
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.separator not in ids
    assert len(ids) == 0 or ids.max() < bpe.vocab_size == 400


def test_bpe_compresses_and_its_separator_is_0(bpe: JsonTokenizer) -> None:
    assert len(bpe.encode(TEXTS[1])) < 0.7 * len(TEXTS[1])
    assert bpe.separator == 0
    assert bpe.decode(np.array([0])) == "<|endoftext|>"


def test_equal_training_gives_an_equal_tokenizer(bpe: JsonTokenizer) -> None:
    assert train_bpe(TEXTS, 400).fingerprint == bpe.fingerprint
    assert train_bpe(TEXTS, 401).fingerprint != bpe.fingerprint
    assert train_bpe(TEXTS[:1], 400).fingerprint != bpe.fingerprint


def test_bpe_refuses_too_little_text() -> None:
    # 256 bytes, the separator, "ab" and "abab"
    with pytest.raises(UserError, match="too little text to train the BPE; got 259 tokens"):
        train_bpe(["abab"], 300)


def test_long_text_is_encoded_in_pieces_that_end_with_a_line(
    bpe: JsonTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_module, "_PIECE", 10)
    assert list(tokenizer_module._pieces("12345\n789\nabcdefghijklm")) == [
        "12345\n789\n",
        "abcdefghij",
        "klm",
    ]
    assert bpe.decode(bpe.encode(HARD * 5)) == HARD * 5


def save(path: Path, bpe: JsonTokenizer, **changes: object) -> str:
    assert bpe.json is not None
    path.write_text(json.dumps(json.loads(bpe.json) | changes, indent=2))
    return str(path)


def test_json_neither_truncates_nor_pads_nor_adds(tmp_path: Path, bpe: JsonTokenizer) -> None:
    assert bpe.json is not None
    library = tokenizers.Tokenizer.from_str(bpe.json)
    library.enable_truncation(4)
    library.enable_padding(length=1000)
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    library.save(str(tmp_path / "t.json"))
    assert read_tokenizer(tmp_path / "t.json").encode(HARD).tolist() == bpe.encode(HARD).tolist()


def test_fingerprint_is_of_the_rules_not_of_their_spelling(
    tmp_path: Path, bpe: JsonTokenizer
) -> None:
    assert read_tokenizer(save(tmp_path / "t.json", bpe)).fingerprint == bpe.fingerprint
    assert bpe.json is not None
    backwards = dict(reversed(json.loads(bpe.json).items()))
    assert JsonTokenizer(json.dumps(backwards), "here").fingerprint == bpe.fingerprint
    changed = save(tmp_path / "u.json", bpe, normalizer={"type": "Lowercase"})
    assert read_tokenizer(changed).fingerprint != bpe.fingerprint


def test_bad_tokenizers_are_named(
    tmp_path: Path, bpe: JsonTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"absent\.json: no such file"):
        read_tokenizer(tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text('{"model": {"type": "Nonsense"}}')
    with pytest.raises(UserError, match=r"bad\.json: not a tokenizer"):
        read_tokenizer(tmp_path / "bad.json")
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, "[UNK]"))
    library.save(str(tmp_path / "noend.json"))
    with pytest.raises(UserError, match=r"noend\.json: .*no token that ends a document.*</s>"):
        read_tokenizer(tmp_path / "noend.json")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="pip install tokenizers"):
        train_bpe(TEXTS, 400)
