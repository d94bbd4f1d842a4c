"""Text to batches: sources, split, tokenizer, memory-mapped shards, seekable batches."""

from __future__ import annotations

from proxies.data.batches import Batches, heldout_batches, require_ids_below
from proxies.data.config import DataConfig
from proxies.data.shards import Corpus, SourceFile, open_corpus, prepare
from proxies.data.sources import Document, read_documents
from proxies.data.tokenizer import (
    ByteTokenizer,
    JsonTokenizer,
    Tokenizer,
    read_tokenizer,
    train_bpe,
)

__all__ = [
    "Batches",
    "ByteTokenizer",
    "Corpus",
    "DataConfig",
    "Document",
    "JsonTokenizer",
    "SourceFile",
    "Tokenizer",
    "heldout_batches",
    "open_corpus",
    "prepare",
    "read_documents",
    "read_tokenizer",
    "require_ids_below",
    "train_bpe",
]
