"""The experiment file: defaults, shipped files, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from mutransfer.errors import UserError
from sweeps.experiment import SHIPPED, Experiment, first_difference, load_experiment


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.toml")))
def test_shipped_experiments_load(name: str) -> None:
    assert load_experiment(name).name == name


def test_template_is_an_experiment_with_the_documented_defaults(tmp_path: Path) -> None:
    template = load_experiment(str(SHIPPED.parent / "template.toml"))
    assert template.train == Experiment(name="x").train.model_copy(
        update={"steps": 200, "batch_size": 16}
    )
    assert template.search.keys() == Experiment(name="x").search.keys()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stepps = 3", ["stepps", "steps"]),
        ("steps = 'many'", ["train.steps", "many"]),
        ("steps = 1", ["train.steps", "greater than or equal to 2"]),
        ("warmup = 0.9\ndecay = 0.9", ["warmup + decay"]),
        ("warmup = nan", ["train.warmup", "finite"]),
    ],
)
def test_a_bad_field_is_one_line_that_names_it(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(f"[train]\n{text}\n")
    with pytest.raises(UserError) as error:
        load_experiment(str(path))
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "where", "words"),
    [
        ('contrast = ["mup", "completep-tied"]', "contrast", "contrast = []"),
        ('parametrization = "sp"', "contrast", "got sp"),
        ("[train]\nheldout_tokens = 2047", "train.heldout_tokens", "at least 2048"),
        ("[train]\nseq_len = 2049\nheldout_tokens = 99999", "train.seq_len", "at most 2048"),
        ("[coord_check]\nseq_len = 2049", "coord_check.seq_len", "at most 2048"),
        (
            "[search]\nlr = { low = 0.1, high = 10.01 }",
            "search.lr.high",
            "less than or equal to 10",
        ),
        ("[search]\nbeta2 = { low = 0.9, high = 1.0 }", "search.beta2.high", "less than 1"),
        ("[search]\nbeta1 = { low = 1.0, high = 1.5 }", "search.beta1.low", "less than 1"),
        ("[search]\nlrr = { low = 0.1, high = 1.0 }", "search.lrr", "init_std"),
        ("[search]", "search", "nothing to search"),
        (
            '[data]\ntokenizer = "bpe"\nvocab_size = 300',
            "data.vocab_size",
            "256, target.vocab_size",
        ),
        ("[coord_check]\nwidths = [32, 64, 96, 64]", "coord_check.widths", "got 64"),
        ("[transfer_check]\nwidths = [32, 64, 32]", "transfer_check.widths", "got 32"),
        ("[coord_check]\nsteps = 1", "coord_check.steps", "greater than or equal to 2"),
        (f"[sweep]\nseed = {2**53}", "sweep.seed", f"less than or equal to {2**53 - 1}"),
        (f"[data]\nseed = {2**53}", "data.seed", f"less than or equal to {2**53 - 1}"),
    ],
)
def test_what_would_fail_later_is_refused_as_the_file_is_read(
    tmp_path: Path, text: str, where: str, words: str
) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(f"{text}\n")
    with pytest.raises(UserError) as error:
        load_experiment(str(path))
    assert error.value.where == f"{path}: {where}"
    assert words in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        'parametrization = "sp"\ncontrast = []',
        "[train]\nheldout_tokens = 2048",
        "[train]\nbatch_size = 1\nseq_len = 2048\n[coord_check]\nseq_len = 2048",
        "[search]\nlr = { low = 1e-9, high = 10.0 }\nbeta2 = { low = 0.9, high = 0.999 }",
        "[coord_check]\nsteps = 2",
        f"[sweep]\nseed = {2**53 - 1}\n[data]\nseed = {2**53 - 1}",
    ],
)
def test_the_ends_of_what_is_allowed_are_allowed_and_can_be_hashed(
    tmp_path: Path, text: str
) -> None:
    path = tmp_path / "good.toml"
    path.write_text(f"{text}\n")
    assert len(load_experiment(str(path)).sha256) == 64


def test_a_width_that_cannot_be_narrowed_lists_the_widths_that_can(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("[proxy]\nd_model = 40\n")
    with pytest.raises(UserError, match="32, 64, 96, 128"):
        load_experiment(str(path))


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="quickstart, wikitext2"):
        load_experiment("wikitext")
    path = tmp_path / "bad.toml"
    path.write_text('parametrization = "mup2"\n')
    with pytest.raises(UserError, match="completep-tied"):
        load_experiment(str(path))


def test_hash_covers_every_field_and_the_first_difference_is_named() -> None:
    a = Experiment(name="a")
    b = a.model_copy(update={"train": a.train.model_copy(update={"steps": 7})})
    assert a.sha256 == Experiment(name="a").sha256 != b.sha256
    assert first_difference(a.canonical, b.canonical) == "train.steps: 200, not 7"
    assert first_difference(a.canonical, a.canonical) is None


def test_depth_and_base_width() -> None:
    e = Experiment.model_validate(
        {"name": "x", "proxy": {"d_model": 32, "n_layers": 3, "base_width": 48}}
    )
    assert (e.base.n_layers, e.base.d_model, e.base_width) == (3, 32, 48)
    assert Experiment(name="x").base_width == 32
