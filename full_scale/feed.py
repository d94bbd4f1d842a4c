"""What a run trains on at each step: one text, or a mixture of sources that changes with phases."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from full_scale.recipe import Phase, Recipe
from mutransfer.errors import UserError
from mutransfer.progress import Report, quiet
from proxies.data import (
    Batches,
    Corpus,
    DataConfig,
    Mixture,
    Sequences,
    Source,
    SourceConfig,
    Stretch,
    open_corpus,
    open_megatron,
    prepare,
)
from proxies.data.mixture import normalize
from proxies.data.scan import scan
from proxies.data.stream import document_numbers, document_starts


def open_sources(
    recipe: Recipe, corpus: Corpus, folder: Path, say: Report = quiet
) -> dict[str, Source]:
    """Opens all that the recipe's mixtures name, and looks at every id once.

    Args:
        recipe: The run.
        corpus: The text of its `[data]`.
        folder: Where tokenized text and what was found in the files is kept.
        say: Takes the progress.

    Returns:
        Sources by name; none where the recipe has no mixture.

    Raises:
        UserError: A source cannot be read, is damaged or empty, was made with another tokenizer
            or vocabulary, or holds an id outside of it.
    """
    if not recipe.mixed:
        return {}
    found = {}
    for name, config in recipe.sources.items():
        say(f"opening the source {name}")
        if config.megatron is not None:
            file = open_megatron(config.megatron)
            sha256 = scan(file.tokens, file.path, vocab_size=corpus.vocab_size, records=folder,
                          say=say)  # fmt: skip
            digest = hashlib.sha256(f"{sha256} {file.tokens.dtype.str}\n".encode())
            digest.update(np.ascontiguousarray(file.starts, dtype="<i8").data)
            found[name] = Source(name=name, tokens=file.tokens, starts=file.starts,
                                 fingerprint=digest.hexdigest())  # fmt: skip
        else:
            found[name] = _from_corpus(name, _tokenized(name, config, corpus, folder, say))
    return {**found, "data": _from_corpus("data", corpus)}


def _tokenized(
    name: str, config: SourceConfig, corpus: Corpus, folder: Path, say: Report
) -> Corpus:
    """The corpus of a source, with the run's tokenizer."""
    if config.corpus is None:
        return prepare(_like(corpus.config, config, corpus.folder), folder)
    source = open_corpus(config.corpus)
    if (source.tokenizer_fingerprint, source.vocab_size) != (
        corpus.tokenizer_fingerprint, corpus.vocab_size,
    ):  # fmt: skip
        raise UserError(
            "another tokenizer or vocabulary than that of [data]", where=f"source {name!r}",
            got=f"{source.tokenizer_fingerprint[:12]}, {source.vocab_size} ids",
            expected=f"{corpus.tokenizer_fingerprint[:12]}, {corpus.vocab_size} ids",
            cure="Token ids must mean the same; tokenize it again.",
        )  # fmt: skip
    scan(source.train, source.folder / "train.bin", vocab_size=corpus.vocab_size, records=folder,
         say=say)  # fmt: skip
    return source


def _like(data: DataConfig, source: SourceConfig, folder: Path) -> DataConfig:
    """The config that tokenizes a source as `data` was; one trained BPE serves all sources."""
    tokenizer = str(folder / "tokenizer.json") if data.tokenizer == "bpe" else data.tokenizer
    return data.model_copy(
        update={"train": source.text, "max_bytes": source.max_bytes, "tokenizer": tokenizer}
    )  # fmt: skip


def _from_corpus(name: str, corpus: Corpus) -> Source:
    starts = document_starts(corpus.train, corpus.separator)
    return Source(name=name, tokens=corpus.train, starts=starts, fingerprint=corpus.fingerprint)


class Feed:
    """The sequences of every step, as a pure function of the step's number.

    Without a mixture the text is a row of windows in an order for each `seq_len`, and the position
    in it is counted in tokens. With one, see `proxies.data.mixture`; a phase is a stretch.

    Args:
        recipe: The run.
        corpus: The text of its `[data]`.
        sources: As `open_sources` gives them.

    Raises:
        UserError: A text or source is too short for a phase, or a source is missing.
    """

    def __init__(self, recipe: Recipe, corpus: Corpus, sources: Mapping[str, Source]) -> None:
        self.recipe, self.corpus, self.sources = recipe, corpus, sources
        self._lock = threading.Lock()  # the orders that are kept are shared by all callers
        self._numbers = {phase.name: number for number, phase in enumerate(recipe.phases)}
        self._mixture: Mixture | None = None
        if recipe.mixed:
            self._mixture = Mixture(
                sources,
                [
                    Stretch(
                        seq_len=phase.seq_len,
                        sequences=phase.steps * phase.batch_size,
                        weights=recipe.mixture_of(phase) or {},
                    )
                    for phase in recipe.phases
                ],
                seed=recipe.seed,
                mark_documents=recipe.mask_documents,
            )
            return
        self._batches = {
            phase.name: Batches(
                corpus.train,
                seq_len=phase.seq_len,
                batch_size=phase.batch_size,
                seed=recipe.seed,
            )
            for phase in recipe.phases
        }

    def at(self, step: int, *, rank: int = 0, ranks: int = 1) -> Sequences:
        """The sequences of a step (0-based), or the part of them that is one rank's of several.

        Raises:
            UserError: The ranks cannot share the batch evenly.
        """
        phase, index = self.recipe.at(step)
        if phase.batch_size % ranks:
            raise UserError("the batch cannot be shared evenly", where=f"phase {phase.name!r}",
                            got=f"{phase.batch_size} sequences for {ranks} ranks")  # fmt: skip
        count = phase.batch_size // ranks
        with self._lock:
            if self._mixture is not None:
                position = index * phase.batch_size + rank * count
                return self._mixture.take(self._numbers[phase.name], position, count)
            position = math.ceil(self.recipe.tokens_before(step) / phase.seq_len)
            tokens = self._batches[phase.name].take(position + rank * count, count)
        marked = self.recipe.mask_documents
        return Sequences(
            tokens=tokens,
            documents=document_numbers(tokens[:, :-1], self.corpus.separator) if marked else None,
        )

    def consumed(self, step: int) -> dict[str, int]:
        """Tokens of each source in the first `step` steps."""
        if self._mixture is None:
            return {"data": self.recipe.tokens_before(step)}
        if step == self.recipe.steps:
            phase, index = self.recipe.phases[-1], self.recipe.phases[-1].steps
        else:
            phase, index = self.recipe.at(step)
        with self._lock:
            return self._mixture.consumed(self._numbers[phase.name], index * phase.batch_size)

    @property
    def epochs(self) -> dict[str, float]:
        """Passes of the whole run over each source."""
        sizes = {name: len(source.tokens) for name, source in self.sources.items()}
        sizes = sizes or {"data": self.corpus.train_tokens}
        consumed = self.consumed(self.recipe.steps)
        return {name: tokens / sizes[name] for name, tokens in consumed.items()}

    @property
    def fingerprint(self) -> str:
        """SHA-256 that stands for all that is trained and evaluated on."""
        if self._mixture is None:
            return self.corpus.fingerprint
        names = self.consumed(self.recipe.steps)
        lines = [self.corpus.fingerprint]
        lines += [f"{name} {self.sources[name].fingerprint}" for name in sorted(names)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def record(self) -> dict[str, Any] | None:
        """The mixture for `run.json`, `None` without one."""
        if self._mixture is None:
            return None
        epochs, consumed = self.epochs, self.consumed(self.recipe.steps)
        return {
            "mask_documents": self.recipe.mask_documents,
            "phases": {phase.name: self._weights(phase) for phase in self.recipe.phases},
            "sources": {
                name: {
                    "tokens": len(self.sources[name].tokens),
                    "documents": len(self.sources[name].starts),
                    "fingerprint": self.sources[name].fingerprint,
                    "consumed": tokens,
                    "epochs": epochs[name],
                }
                for name, tokens in consumed.items()
            },
        }

    def _weights(self, phase: Phase) -> dict[str, dict[str, float]]:
        given = self.recipe.mixture_of(phase) or {}
        exact = normalize(given, f"mixture of phase {phase.name!r}")
        return {"given": given, "normalized": {name: float(w) for name, w in exact.items()}}
