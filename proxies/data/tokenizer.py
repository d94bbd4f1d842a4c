"""Text to token ids and back: bytes, a BPE trained on the corpus, or any tokenizer.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mutransfer.errors import UserError
from mutransfer.files import read_json

Ids = npt.NDArray[np.uint32]

SEPARATORS = (
    "<|endoftext|>",
    "</s>",
    "<eos>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001 - as DeepSeek's tokenizer spells it
)
"""Tokens taken as the document separator of a tokenizer.json: the first that it knows."""

_PIECE = 2**20  # characters; a longer document is encoded in pieces, so memory stays bounded


class Tokenizer(Protocol):
    """Turns text into ids below `vocab_size`.

    Attributes:
        vocab_size: One more than the largest id.
        separator: The id that ends every document.
        fingerprint: SHA-256 in hexadecimal of all that decides which ids a text gets.
        json: The text of its tokenizer.json, or `None` for bytes.
    """

    vocab_size: int
    separator: int
    fingerprint: str
    json: str | None

    def encode(self, text: str) -> Ids:
        """Ids of `text`, shape `(tokens,)`, without a separator."""
        ...

    def decode(self, ids: npt.NDArray[np.integer[Any]]) -> str:
        """Text of `ids`, shape `(tokens,)`."""
        ...


class ByteTokenizer:
    """The 256 bytes of UTF-8; 0 separates documents, since no accepted text holds a NUL."""

    vocab_size = 256
    separator = 0
    fingerprint = hashlib.sha256(b"UTF-8 bytes, documents end with 0").hexdigest()
    json: str | None = None

    def encode(self, text: str) -> Ids:
        """Ids of `text`, shape `(bytes,)`."""
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)

    def decode(self, ids: npt.NDArray[np.integer[Any]]) -> str:
        """Text of `ids`; a character that is cut in two becomes U+FFFD."""
        return ids.astype(np.uint8).tobytes().decode(errors="replace")


class JsonTokenizer:
    """A tokenizer of the `tokenizers` library, from the text of its tokenizer.json.

    Special tokens in the text are encoded as ordinary text, and nothing is added, truncated or
    padded. A document of more than 2^20 characters is encoded in pieces that end with a line.

    Args:
        text: The content of a tokenizer.json.
        where: What error messages call it.

    Raises:
        UserError: `text` is no tokenizer, or knows no token of `SEPARATORS`.
    """

    def __init__(self, text: str, where: str) -> None:
        library = _library()
        try:
            self._tokenizer = library.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            what, expected = f"not a tokenizer ({error})", "a Hugging Face tokenizer.json"
            raise UserError(what, where=where, expected=expected) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        separator = next((token for token in SEPARATORS if token in vocabulary), None)
        if separator is None:
            raise UserError(
                "the tokenizer has no token that ends a document", where=where,
                expected=f"one of {', '.join(SEPARATORS)}", cure="Add one to its special tokens.",
            )  # fmt: skip
        self.separator: int = vocabulary[separator]
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.json: str | None = text
        rules = {k: v for k, v in json.loads(text).items() if k not in ("truncation", "padding")}
        canonical = json.dumps(rules, sort_keys=True, separators=(",", ":"))
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()

    def encode(self, text: str) -> Ids:
        """Ids of `text`, shape `(tokens,)`."""
        encode = self._tokenizer.encode
        ids = [encode(piece, add_special_tokens=False).ids for piece in _pieces(text)]
        return np.concatenate([np.asarray(piece, dtype=np.uint32) for piece in ids])

    def decode(self, ids: npt.NDArray[np.integer[Any]]) -> str:
        """Text of `ids`, special tokens included."""
        text: str = self._tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        return text


def read_tokenizer(path: Path | str) -> JsonTokenizer:
    """Reads a Hugging Face tokenizer.json.

    Raises:
        UserError: The file is missing, no JSON, no tokenizer, or has no document separator.
    """
    content = read_json(path)
    return JsonTokenizer(json.dumps(content, ensure_ascii=False), str(path))


def train_bpe(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """Trains a byte-level BPE; equal texts give an equal tokenizer.

    Id 0 is `<|endoftext|>`, the document separator; then come the 256 bytes and the merges.

    Raises:
        UserError: The text has too few different pairs to reach `vocab_size`.
    """
    library = _library()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATORS[0]],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((p for text in texts for p in _pieces(text)), trainer=trainer)
    if (reached := tokenizer.get_vocab_size()) != vocab_size:
        raise UserError(
            "too little text to train the BPE", where="vocab_size", got=f"{reached} tokens",
            expected=vocab_size, cure=f"Add text, or set vocab_size to at most {reached}.",
        )  # fmt: skip
    return JsonTokenizer(tokenizer.to_str(), "bpe")


def _pieces(text: str) -> Iterator[str]:
    """`text` in pieces of at most `_PIECE` characters, ended by a line border where there is."""
    start = 0
    while len(text) - start > _PIECE:
        stop = text.rfind("\n", start, start + _PIECE) + 1 or start + _PIECE
        yield text[start:stop]
        start = stop
    yield text[start:]


def _library() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        cure = "Run `pip install tokenizers`."
        raise UserError("this tokenizer needs the `tokenizers` library", cure=cure) from error
    return tokenizers
