"""The corpus on disk: tokenized once, whole or absent, the same wherever it is made."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mutransfer.errors import UserError
from proxies.data import Corpus, DataConfig, open_corpus, prepare, shards, train_bpe


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder of 30 documents."""
    source = random.Random(0)
    (tmp_path / "text").mkdir()
    for i in range(30):
        words = ["".join(source.choices("abcdé", k=4)) for _ in range(200)] + ["some\n"]
        (tmp_path / "text" / f"{i}.txt").write_text(" ".join(words))
    return tmp_path / "text"


def documents(corpus: Corpus, tokens: np.ndarray) -> list[str]:
    ends = np.flatnonzero(tokens == corpus.separator)
    assert ends[-1] == len(tokens) - 1
    starts = [0, *(ends[:-1] + 1)]
    tokenizer = corpus.load_tokenizer()
    return [tokenizer.decode(tokens[a:b]) for a, b in zip(starts, ends, strict=True)]


def bpe_file(text: Path) -> str:
    tokenizer = train_bpe((path.read_text() for path in sorted(text.iterdir())), 300)
    assert tokenizer.json is not None
    path = text.parent / "tokenizer.json"
    path.write_text(tokenizer.json)
    return str(path)


@pytest.mark.parametrize(
    ("kind", "vocab_size"), [("bytes", 256), ("bpe", 300), ("json", 300), ("json", 70_000)]
)
def test_every_document_is_there_once(text: Path, kind: str, vocab_size: int) -> None:
    tokenizer = bpe_file(text) if kind == "json" else kind
    config = DataConfig(train=(str(text),), tokenizer=tokenizer, vocab_size=vocab_size)
    corpus = prepare(config, text.parent / "data")
    train, heldout = documents(corpus, corpus.train), documents(corpus, corpus.heldout)
    assert sorted(train + heldout) == sorted(path.read_text() for path in text.iterdir())
    assert set(train).isdisjoint(heldout)
    assert corpus.vocab_size == vocab_size
    assert corpus.train.itemsize == (4 if vocab_size > 65536 else 2)
    assert (corpus.train_tokens, corpus.heldout_tokens) == (len(corpus.train), len(corpus.heldout))
    assert corpus.tokenizer_fingerprint == corpus.load_tokenizer().fingerprint
    assert isinstance(corpus.train, np.memmap)
    assert not corpus.train.flags.writeable
    assert not corpus.cut


def test_bpe_learns_from_the_training_text_alone(text: Path) -> None:
    files = [str(path) for path in sorted(text.iterdir())]
    config = DataConfig(
        train=tuple(files[:20]), heldout=tuple(files[20:]), tokenizer="bpe", vocab_size=300
    )
    corpus = prepare(config, text.parent / "data")
    alone = train_bpe((Path(file).read_text() for file in files[:20]), 300)
    assert corpus.tokenizer_fingerprint == alone.fingerprint


def test_sources_are_listed_with_their_hashes(text: Path) -> None:
    corpus = prepare(DataConfig(train=(str(text),)), text.parent / "data")
    assert sorted(s.file for s in corpus.sources) == sorted(str(p) for p in text.iterdir())
    for source in corpus.sources:
        content = Path(source.file).read_bytes()
        assert source.sha256 == hashlib.sha256(content).hexdigest()
        assert (source.bytes, source.documents) == (len(content), 1)
    held = [source.bytes + 1 for source in corpus.sources if source.side == "heldout"]
    assert sum(held) == corpus.heldout_tokens


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_equal_text_and_config_give_an_equal_fingerprint_elsewhere(
    text: Path, tokenizer: str
) -> None:
    config = DataConfig(
        train=(str(text),), tokenizer=tokenizer, vocab_size=256 if tokenizer == "bytes" else 300
    )
    one, other = (prepare(config, text.parent / name) for name in ("one", "other"))
    assert one.folder.name == other.folder.name
    assert one.fingerprint == other.fingerprint
    for file in one.folder.iterdir():
        assert file.read_bytes() == (other.folder / file.name).read_bytes()


def test_changed_text_gives_another_fingerprint(text: Path) -> None:
    config, folder = DataConfig(train=(str(text),)), text.parent / "data"
    before = prepare(config, folder)
    file = text / "3.txt"
    content, stat = file.read_text(), file.stat()
    file.write_text(content.replace("some", "same"))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same time
    after = prepare(config, folder)
    assert after.fingerprint != before.fingerprint
    assert after.tokenizer_fingerprint == before.tokenizer_fingerprint
    file.write_text(content)
    assert prepare(config, folder).fingerprint == before.fingerprint


def test_another_config_is_another_corpus(text: Path) -> None:
    base = DataConfig(train=(str(text),))
    changes: list[dict[str, object]] = [{}, {"seed": 1}, {"max_bytes": 9000},
                                        {"heldout_fraction": 0.3},
                                        {"tokenizer": "bpe", "vocab_size": 300},
                                        {"tokenizer": "bpe", "vocab_size": 301}]  # fmt: skip
    made = [prepare(base.model_copy(update=c), text.parent / "data") for c in changes]
    assert len({corpus.fingerprint for corpus in made}) == len(changes)
    assert [corpus.cut for corpus in made] == [False, False, True, False, False, False]


def test_second_time_nothing_is_tokenized(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(train=(str(text),))
    first = prepare(config, text.parent / "data")
    monkeypatch.setattr(shards, "_write", lambda *_: pytest.fail("tokenized again"))
    second = prepare(config, text.parent / "data")
    assert second.fingerprint == first.fingerprint
    np.testing.assert_array_equal(second.heldout, first.heldout)


@pytest.mark.parametrize("last", ["train.bin", "heldout.bin", "meta.json"])
def test_interrupted_writing_is_never_taken_for_whole(
    text: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    config, folder = DataConfig(train=(str(text),)), text.parent / "data"
    replace = os.replace

    def dies(source: Path, target: Path) -> None:
        home = Path(target).parent
        published = home.parent == folder and not home.name.startswith(".")
        if published and Path(target).name == last:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            prepare(config, folder)
    [torn] = folder.iterdir()  # and no temporary folder
    with pytest.raises(UserError, match=r"meta\.json: no such file"):
        open_corpus(torn)
    (torn / "train.bin").write_bytes(b"torn")
    corpus = prepare(config, folder)
    assert corpus.folder == torn
    assert corpus.fingerprint == prepare(config, text.parent / "other").fingerprint


def test_two_processes_at_once_both_get_it(text: Path) -> None:
    folder = text.parent / "data"
    program = (
        "import sys; from proxies.data import DataConfig, prepare\n"
        "config = DataConfig(train=(sys.argv[1],), tokenizer='bpe', vocab_size=300)\n"
        "c = prepare(config, sys.argv[2])\n"
        "print(c.fingerprint, int(c.train.sum()))"
    )
    command = [sys.executable, "-c", program, str(text), str(folder)]
    root = Path(shards.__file__).parents[2]
    runs = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(3)
    ]
    printed = {run.communicate(timeout=120)[0] for run in runs}
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert len(printed) == 1
    assert len(list(folder.iterdir())) == 1


def test_damaged_corpus_is_refused(text: Path) -> None:
    config, folder = DataConfig(train=(str(text),)), text.parent / "data"
    corpus = prepare(config, folder)
    size = 2 * corpus.heldout_tokens
    shard, meta = corpus.folder / "heldout.bin", corpus.folder / "meta.json"
    content, record = shard.read_bytes(), json.loads(meta.read_text())
    for damaged in (content[:-1], content + b"\0", b""):
        shard.write_bytes(damaged)
        with pytest.raises(
            UserError, match=rf"heldout\.bin: .*got {len(damaged)} bytes; expected {size} .*Delete"
        ):
            prepare(config, folder)
    shard.unlink()
    with pytest.raises(UserError, match=r"heldout\.bin"):
        open_corpus(corpus.folder)
    shard.write_bytes(content)
    for change in ({"schema_version": 2}, {"bogus": 1}, {"train_tokens": 1}, {"key": "x"}):
        meta.write_text(json.dumps(record | change))
        with pytest.raises(UserError, match=rf"meta\.json: not the record.*{next(iter(change))}"):
            open_corpus(corpus.folder)
    meta.write_text(json.dumps(record))
    assert open_corpus(corpus.folder).fingerprint == corpus.fingerprint


def test_tokenizer_larger_than_the_vocabulary_is_refused(text: Path) -> None:
    config = DataConfig(train=(str(text),), tokenizer=bpe_file(text), vocab_size=299)
    with pytest.raises(UserError, match=r"got 299; expected at least 300.*Set vocab_size = 300"):
        prepare(config, text.parent / "data")
    assert list((text.parent / "data").iterdir()) == []


def test_default_corpus_is_on_every_machine(tmp_path: Path) -> None:
    corpus = prepare(DataConfig(max_bytes=2**20), tmp_path)
    assert corpus.cut
    text = sum(source.bytes for source in corpus.sources)
    assert text == 2**20
    assert text + len(corpus.sources) == corpus.train_tokens + corpus.heldout_tokens
    assert corpus.heldout_tokens / text == pytest.approx(0.1, abs=0.03)
    assert all(source.file.startswith("stdlib:") for source in corpus.sources)
