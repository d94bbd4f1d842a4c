"""The tokenizer files of an export: what `AutoTokenizer` reads, with the ids of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mutransfer.files import write_json, write_text
from proxies.data import Tokenizer
from proxies.data.tokenizer import SEPARATORS


def write_tokenizer(folder: Path, tokenizer: Tokenizer, max_seq_len: int) -> None:
    """Writes `tokenizer.json`, `tokenizer_config.json` and `generation_config.json`.

    The token that ends documents is both the end and the beginning of a text; nothing is added
    to a text by itself.
    """
    text = byte_tokenizer_json() if tokenizer.json is None else tokenizer.json
    write_text(folder / "tokenizer.json", text)
    end = separator_token(text, tokenizer.separator)
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_seq_len,
    })  # fmt: skip
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.separator)
    write_json(folder / "generation_config.json", ids)


def byte_tokenizer_json() -> str:
    """The byte tokenizer for the `tokenizers` library: every byte of UTF-8 is its own id.

    Byte 0, which no text of a corpus holds and which separates documents, is the special token.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {char: byte for byte, char in enumerate(_byte_level()) if byte}
    vocabulary[SEPARATORS[0]] = 0
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(SEPARATORS[0], special=True, normalized=False)])
    text: str = tokenizer.to_str()
    return text


def separator_token(tokenizer_json: str, separator: int) -> str:
    """The token with that id."""
    content: dict[str, Any] = json.loads(tokenizer_json)
    for added in content.get("added_tokens", ()):
        if added["id"] == separator:
            return str(added["content"])
    vocabulary = content["model"]["vocab"]
    return next(str(token) for token, number in vocabulary.items() if number == separator)


def _byte_level() -> list[str]:
    """The character that stands for each byte in byte-level tokenizers (GPT-2's table).

    Printable Latin-1 stands for itself; the rest, in order, for the characters from 256 on.
    """
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]
