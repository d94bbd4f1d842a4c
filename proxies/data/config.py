"""What an experiment says about its text."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mutransfer.schema import MAX_INTEGER

Source = Annotated[str, Field(min_length=1)]


class DataConfig(BaseModel):
    """Where the text comes from, how it is split and which tokenizer reads it.

    Relative paths are taken from the current working directory. Every value that changes the
    tokens is here, so that equal text and an equal config give an equal corpus anywhere.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: tuple[Source, ...] = Field(
        default=("stdlib",),
        min_length=1,
        description="Sources of the training text, read in this order: a file, a folder "
        "(recursive), a glob; '.jsonl' and '.parquet' hold a document per record, any other file "
        "is one document of text. 'stdlib' is the Python standard library's own sources, "
        "'site-packages' the sources and documentation of the installed packages; './stdlib' is "
        "a path.",
    )
    heldout: tuple[Source, ...] = Field(
        default=(), description="Sources of the held-out text; empty: it is split off `train`."
    )
    heldout_fraction: float = Field(
        default=0.1,
        gt=0,
        le=0.5,
        description="Share of the bytes of `train` held out where `heldout` is empty.",
    )
    max_bytes: int | None = Field(
        default=8 * 2**20,
        ge=1,
        description="Bytes of UTF-8 text read from `train`, and as many from `heldout`; what lies "
        "beyond is left out, and the corpus says so. None: all of it.",
    )
    text_field: str = Field(
        default="text",
        min_length=1,
        description="Field (JSONL) or column (Parquet) that holds the text.",
    )
    tokenizer: str = Field(
        default="bytes",
        description="'bytes', 'bpe' (trained on the training text), or the path of a Hugging Face "
        "tokenizer.json.",
    )
    vocab_size: int = Field(
        default=256,
        ge=2,
        le=2**32,
        description="Number of token ids: 256 for bytes, exactly reached by bpe, and at least "
        "the tokenizer's own for a tokenizer.json.",
    )
    seed: int = Field(
        default=0, ge=0, le=MAX_INTEGER, description="Seed of the split into train and held-out."
    )

    @model_validator(mode="after")
    def _vocabulary_fits_tokenizer(self) -> Self:
        if self.tokenizer == "bytes" and self.vocab_size != 256:
            raise ValueError(
                f"vocab_size is {self.vocab_size}, but the tokenizer 'bytes' has 256 ids; set "
                "vocab_size = 256 or another tokenizer"
            )
        if self.tokenizer == "bpe" and self.vocab_size < 257:
            raise ValueError(
                f"vocab_size is {self.vocab_size}, but the tokenizer 'bpe' needs at least 257 "
                "ids: 256 bytes and the document separator"
            )
        if self.tokenizer not in ("bytes", "bpe") and not self.tokenizer.endswith(".json"):
            raise ValueError(
                f"tokenizer is {self.tokenizer!r}; expected 'bytes', 'bpe' or the path of a "
                "tokenizer.json"
            )
        return self

    @property
    def dtype(self) -> str:
        """NumPy type of a stored token, little-endian: 2 bytes where all ids fit, else 4."""
        return "<u2" if self.vocab_size <= 2**16 else "<u4"


class SourceConfig(BaseModel):
    """Where one source of a mixture comes from: exactly one of `megatron`, `corpus` and `text`.

    Relative paths are taken from the current working directory.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    megatron: Source | None = Field(
        default=None, description="Path of Megatron-LM's two token files, without .bin and .idx."
    )
    corpus: Source | None = Field(
        default=None, description="Folder of a corpus that was tokenized here: with meta.json."
    )
    text: tuple[Source, ...] = Field(
        default=(),
        description="Text, JSONL or Parquet: files, folders, globs, as in `data.train`; it is read "
        "and tokenized as `data` is, and no document of `data.heldout` may be in it.",
    )
    max_bytes: int | None = Field(
        default=None, ge=1, description="Bytes read from `text`; None: all of it."
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        kinds = [k for k in ("megatron", "corpus", "text") if getattr(self, k)]
        if len(kinds) != 1:
            got = " and ".join(kinds) or "none"
            raise ValueError(f"a source is one of megatron, corpus and text; got {got}")
        return self
