"""Train and held-out text never overlap."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from pydantic import ValidationError

from mutransfer.errors import UserError
from proxies.data import DataConfig
from proxies.data import split as split_module
from proxies.data.split import MIN_DOCUMENTS, plan

WINDOW = 16


def sides(config: DataConfig) -> tuple[list[str], list[str]]:
    train, heldout = plan(config)
    return list(train.texts(config)), list(heldout.texts(config))


def jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def random_texts(count: int, seed: int = 0) -> list[str]:
    source = random.Random(seed)
    letters = "abcdefghij \n"
    return ["".join(source.choices(letters, k=source.randint(200, 2000))) for _ in range(count)]


def windows(texts: list[str]) -> set[str]:
    return {text[i : i + WINDOW] for text in texts for i in range(len(text) - WINDOW + 1)}


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.5])
def test_by_document_no_window_is_on_both_sides(tmp_path: Path, fraction: float) -> None:
    texts = random_texts(200)
    source = jsonl(tmp_path / "a.jsonl", texts + texts[::3])  # with copies
    train, heldout = sides(DataConfig(train=(source,), heldout_fraction=fraction))
    assert windows(train).isdisjoint(windows(heldout))
    assert sorted(train + heldout) == sorted(texts + texts[::3])
    held = sum(map(len, heldout))
    largest = 2 * max(map(len, texts))  # a document and its copy
    assert abs(held - fraction * (held + sum(map(len, train)))) <= largest / 2


def test_split_is_of_content_and_seed_alone(tmp_path: Path) -> None:
    texts = random_texts(100)
    one = DataConfig(train=(jsonl(tmp_path / "a.jsonl", texts),))
    other = DataConfig(train=(jsonl(tmp_path / "b.jsonl", texts[::-1]),))
    assert sides(one)[1] == sides(one)[1]
    assert sorted(sides(one)[1]) == sorted(sides(other)[1])
    assert sides(one)[1] != sides(one.model_copy(update={"seed": 1}))[1]


def test_something_is_held_out_however_large_the_documents(tmp_path: Path) -> None:
    texts = [f"{i:02d}" * 100 for i in range(MIN_DOCUMENTS)]
    train, heldout = sides(
        DataConfig(train=(jsonl(tmp_path / "a.jsonl", texts),), heldout_fraction=0.001)
    )
    assert (len(train), len(heldout)) == (MIN_DOCUMENTS - 1, 1)


def test_few_documents_lose_their_tails(tmp_path: Path) -> None:
    lines = [f"line {i} of the text\n" for i in range(1000)]
    path = tmp_path / "a.txt"
    path.write_text("".join(lines))
    [train], [heldout] = sides(DataConfig(train=(str(path),)))
    assert train + heldout == path.read_text()
    assert train.endswith("\n")
    assert len(heldout) / len(train + heldout) == pytest.approx(0.1, abs=0.002)


@pytest.mark.parametrize("head", ["", "title\n"])
def test_text_without_near_line_border_is_cut_at_a_character(tmp_path: Path, head: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text(head + "€" * 1000)
    [train], [heldout] = sides(DataConfig(train=(str(path),)))
    assert train + heldout == head + "€" * 1000
    assert len(heldout) == pytest.approx(100, abs=1)


def test_tails_of_copies_are_equal_even_where_the_last_is_cut_short(tmp_path: Path) -> None:
    [text] = random_texts(1)
    source = jsonl(tmp_path / "a.jsonl", [text, text])
    config = DataConfig(train=(source,), max_bytes=2 * len(text) - len(text) // 20)
    train, heldout = sides(config)
    assert len(train) == len(heldout) == 2
    assert windows(train).isdisjoint(windows(heldout))


def test_max_bytes_ends_the_text_and_says_so(tmp_path: Path) -> None:
    texts = random_texts(50)
    total = sum(map(len, texts))
    source = jsonl(tmp_path / "a.jsonl", texts)
    for max_bytes, cut in ((total - 1, True), (total, False), (None, False)):
        train, heldout = plan(DataConfig(train=(source,), max_bytes=max_bytes))
        assert train.n_bytes + heldout.n_bytes == min(max_bytes or total, total)
        assert train.cut is heldout.cut is cut
    (tmp_path / "long.txt").write_text(texts[0])
    for max_bytes, cut in ((len(texts[0]) - 1, True), (len(texts[0]), False)):
        config = DataConfig(train=(str(tmp_path / "long.txt"),), max_bytes=max_bytes)
        assert plan(config)[0].cut is cut


def test_heldout_sources_may_share_neither_file_nor_document(tmp_path: Path) -> None:
    texts = random_texts(3)
    for name, text in zip("abc", texts, strict=True):
        (tmp_path / f"{name}.txt").write_text(text)
    a, b, c = (str(tmp_path / f"{name}.txt") for name in "abc")
    train, heldout = sides(DataConfig(train=(a, b), heldout=(c,)))
    assert (train, heldout) == (texts[:2], texts[2:])
    with pytest.raises(UserError, match=r"b\.txt: held-out text is also .*the file in both"):
        plan(DataConfig(train=(a, b), heldout=(c, b)))
    copies = jsonl(tmp_path / "copies.jsonl", [texts[2], texts[0]])
    with pytest.raises(UserError, match=r"copies\.jsonl:2: held-out.*a copy of .*a\.txt"):
        plan(DataConfig(train=(a, b), heldout=(copies,)))
    (tmp_path / "link.txt").symlink_to(b)
    with pytest.raises(UserError, match="the file in both"):
        plan(DataConfig(train=(a, b), heldout=(str(tmp_path / "link.txt"),)))


def test_copy_is_found_where_max_bytes_cuts_both(tmp_path: Path) -> None:
    short, long = random_texts(2)
    (tmp_path / "a.txt").write_text(long)
    (tmp_path / "b.txt").write_text(short)
    (tmp_path / "c.txt").write_text(long)
    a, b, c = (str(tmp_path / f"{name}.txt") for name in "abc")
    with pytest.raises(UserError, match=r"c\.txt: held-out"):
        plan(DataConfig(train=(a,), heldout=(b, c), max_bytes=len(short) + 50))


def test_one_character_cannot_be_split(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("€")
    with pytest.raises(UserError, match="too little text to split; got 3 bytes"):
        plan(DataConfig(train=(str(tmp_path / "a.txt"),)))


@pytest.mark.parametrize("change", ["edited", "gone"])
def test_change_between_plan_and_reading_is_an_error(tmp_path: Path, change: str) -> None:
    texts = random_texts(3)
    config = DataConfig(train=(jsonl(tmp_path / "a.jsonl", texts),))
    train, _ = split_module.plan(config)
    jsonl(tmp_path / "a.jsonl", texts[:2] + ([texts[2] + "x"] if change == "edited" else []))
    with pytest.raises(UserError, match=r"a\.jsonl: changed while it was being read"):
        list(train.texts(config))


@pytest.mark.parametrize(
    "fields",
    [
        {"vocab_size": 257},
        {"tokenizer": "bpe", "vocab_size": 256},
        {"tokenizer": "gpt2", "vocab_size": 50257},
        {"heldout_fraction": 0.0},
        {"heldout_fraction": 0.51},
        {"max_bytes": 0},
        {"train": ()},
        {"train": ("",)},
        {"seed": -1},
        {"bogus": 1},
    ],
    ids=str,
)
def test_config_refuses(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(fields))):
        DataConfig.model_validate(fields)


def test_config_borders_and_dtype() -> None:
    assert DataConfig(heldout_fraction=0.5, max_bytes=1).dtype == "<u2"
    assert DataConfig(tokenizer="bpe", vocab_size=257).dtype == "<u2"
    assert DataConfig(tokenizer="t.json", vocab_size=65536).dtype == "<u2"
    assert DataConfig(tokenizer="t.json", vocab_size=65537).dtype == "<u4"
