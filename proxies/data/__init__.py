"""Text to batches: sources, split, tokenizer, memory-mapped shards, seekable batches."""

from __future__ import annotations

from proxies.data.batches import Batches, heldout_batches, require_ids_below
from proxies.data.config import DataConfig, SourceConfig
from proxies.data.megatron import open_megatron, write_megatron
from proxies.data.mixture import Mixture, Stretch
from proxies.data.shards import Corpus, SourceFile, open_corpus, prepare
from proxies.data.sources import Document, read_documents
from proxies.data.stream import Sequences, Source
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
    "Mixture",
    "Sequences",
    "Source",
    "SourceConfig",
    "SourceFile",
    "Stretch",
    "Tokenizer",
    "heldout_batches",
    "open_corpus",
    "open_megatron",
    "prepare",
    "read_documents",
    "read_tokenizer",
    "require_ids_below",
    "train_bpe",
    "write_megatron",
]
