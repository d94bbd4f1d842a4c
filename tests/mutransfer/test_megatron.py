"""Bundles in Megatron's words: what they say, and that they refuse what has none.

That upstream's own classes do what `mutransfer.megatron` says they do is tested in
tests/full_scale/test_megatron.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mutransfer.bundle import Bundle
from mutransfer.cli import main
from mutransfer.megatron import arguments, cannot_be_expressed, differences
from mutransfer.rules import BaseParams, get_parametrization
from proxies.decoder import DecoderConfig
from proxies.tables import decoder_table

TARGET = DecoderConfig(d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=160,
                       vocab_size=256)  # fmt: skip
PARAMS = BaseParams(lr=0.02, init_std=0.1, weight_decay=0.1, embedding_multiplier=3.0,
                    output_multiplier=0.7, attention_multiplier=1.2)  # fmt: skip


def bundle(name: str = "megatron", tied: bool = True, **change: Any) -> Bundle:
    target = TARGET.model_copy(update={"tied": tied})
    params = PARAMS.model_copy(update=change)
    base = target.narrow(32)
    return Bundle.create(
        experiment={"name": "test", "sha256": "0" * 64},
        base={"config": base.model_dump(), "base_width": 32},
        target={"config": target.model_dump()},
        parametrization={"name": name, "version": get_parametrization(name).version},
        base_hyperparameters=params,
        provenance={name: {"source": "fixed"} for name in BaseParams.model_fields},
        table=decoder_table(target, base, params, name),
        evidence=None,
        batch_tokens=64, horizon_tokens=640,
        data={"fingerprint": "a" * 64, "tokenizer_fingerprint": "b" * 64, "vocab_size": 256},
        versions={},
    )  # fmt: skip


def value(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


@pytest.mark.parametrize("tied", [True, False])
def test_a_bundle_of_megatron_s_rules_differs_in_nothing(tied: bool) -> None:
    made = bundle(tied=tied, embedding_lr_ratio=4.0)
    assert differences(made) == []
    words = arguments(made)
    assert "--use-mup" in words
    assert value(words, "--mup-base-hidden-size") == "32"
    assert float(value(words, "--decoupled-lr")) == pytest.approx(0.08)
    assert float(value(words, "--mup-output-mult")) == 0.7
    assert float(value(words, "--mup-base-head-dim")) ** 0.5 / 16 == pytest.approx(1.2 / 4)
    assert ("--untie-embeddings-and-output-weights" in words) is not tied


def test_an_output_multiplier_of_one_is_upstream_s_1_over_m() -> None:
    made = bundle(output_multiplier=1.0)
    assert made.table.multipliers.output == 0.5
    assert differences(made) == []


@pytest.mark.parametrize(
    ("name", "change", "settings"),
    [
        ("completep-tied", {}, {"multiplier", "init std", "eps", "weight decay"}),
        ("mup", {}, {"init std", "eps", "weight decay"}),
        ("sp", {}, {"multiplier", "lr", "init std", "eps", "weight decay"}),
        ("megatron", {"residual_multiplier": 0.5}, {"multiplier"}),
        ("xmodel", {}, {"multiplier", "init std", "eps", "lr"}),
        ("mup", {"output_multiplier": 2.0}, {"multiplier", "init std", "eps", "weight decay"}),
    ],
)
def test_what_differs_is_named(name: str, change: dict[str, Any], settings: set[str]) -> None:
    assert {each.setting for each in differences(bundle(name, **change))} == settings


def test_what_changes_the_function_or_the_update_cannot_be_expressed() -> None:
    (first, second) = cannot_be_expressed(differences(bundle(residual_multiplier=0.5)))
    assert str(first) == ("layers.*.attention.o.weight: multiplier is 0.5 in the bundle, 1 in "
                          "Megatron")  # fmt: skip
    assert second.parameters == "layers.*.mlp.down.weight"
    assert cannot_be_expressed(differences(bundle("mup"))) == []


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(made: Bundle, *options: str) -> tuple[int, str, str]:
        made.save(tmp_path / "bundle.json")
        code = main(["bundle", "megatron", str(tmp_path / "bundle.json"), *options])
        said = capsys.readouterr()
        return code, said.out, said.err

    code, out, _ = run(bundle())
    assert code == 0
    assert out.replace(" \\\n", " ").split() == arguments(bundle())
    code, out, err = run(bundle("mup"))
    assert (code, out) == (2, "")
    assert (
        "differs: layers.*.mlp.down.weight: init std is 0.0707107 in the bundle, 0.0353553" in err
    )
    assert "--accept-differences" in err
    code, out, err = run(bundle("mup"), "--accept-differences")
    assert code == 0
    assert "--use-mup" in out
    code, out, err = run(bundle(residual_multiplier=0.5), "--accept-differences")
    assert (code, out) == (2, "")
    assert "cannot express this bundle" in err
