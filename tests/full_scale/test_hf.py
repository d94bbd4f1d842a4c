"""Exports that stock transformers loads, and imports: parity with our decoder, bit for bit back."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from full_scale.checkpoint import Checkpoint, Identity, State, save
from full_scale.hf_export import export_hf
from full_scale.hf_import import import_hf
from full_scale.refold import refold
from full_scale.start import start_from
from full_scale.tensors import Tensors, open_tensors, write_tensors
from full_scale.weights import Weights, read_weights
from mutransfer.cli import main
from mutransfer.errors import UserError
from mutransfer.rules import BaseParams
from mutransfer.table import Multipliers
from proxies.data import ByteTokenizer, train_bpe
from proxies.decoder import Decoder, DecoderConfig
from proxies.tables import decoder_table

transformers = pytest.importorskip("transformers")

CONFIG = DecoderConfig(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=48,
                       vocab_size=256, max_seq_len=512, rope_base=5e5)  # fmt: skip
MULTIPLIERS = Multipliers(embedding=12.0, output=0.37, residual=0.23, attention=0.091)
TOKENS = torch.arange(600).view(2, 300) * 37 % 256


class Double(TorchFunctionMode):
    """Stock code that would round float64 to float32 on its way (RMSNorm, softmax) does not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.to and args[0].dtype is torch.float64 and torch.float32 in args[1:]:
            return args[0]
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def weights(request: pytest.FixtureRequest, tmp_path: Path) -> Weights:
    """A decoder with all multipliers and uneven gains, as an export begins with it."""
    config = CONFIG.model_copy(update={"tied": request.param})
    draw = torch.Generator().manual_seed(0)
    values = {
        name: torch.randn(p.shape, generator=draw) * 0.3 + (1.0 if p.dim() == 1 else 0.0)
        for name, p in Decoder(config).named_parameters()
    }
    return Weights(
        config=config,
        multipliers=MULTIPLIERS,
        tensors=Tensors(shapes={n: tuple(t.shape) for n, t in values.items()},
                        read=values.__getitem__),
        parametrization="completep-tied",
        bundle=None,
        tokenizer=ByteTokenizer(),
        state=None,
        path=tmp_path,
    )  # fmt: skip


def ours(weights: Weights, dtype: torch.dtype) -> Decoder:
    model = Decoder(weights.config)
    model.load_state_dict({name: weights.tensors.read(name) for name in weights.tensors.shapes})
    model = model.to(dtype)
    model.set_multipliers(weights.multipliers)
    return model


def stock(folder: Path, dtype: torch.dtype) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=False
    )


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["granite", "llama"])
def test_logits_are_those_of_our_decoder(
    weights: Weights, architecture: Any, tmp_path: Path
) -> None:
    export_hf(weights, tmp_path / "out", architecture=architecture, dtype="float64")
    model = stock(tmp_path / "out", torch.float64)
    assert (
        type(model).__name__
        == {"granite": "GraniteForCausalLM", "llama": "LlamaForCausalLM"}[architecture]
    )
    exact = ours(weights, torch.float64)(TOKENS)
    with Double():
        assert distance(model(TOKENS).logits, exact) < 1e-12
    assert distance(model(TOKENS).logits, exact) < 2e-6  # RMSNorm and softmax in float32
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied is weights.config.tied


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["granite", "llama"])
def test_bf16_is_as_close_as_bf16_allows(
    weights: Weights, architecture: Any, tmp_path: Path
) -> None:
    export_hf(weights, tmp_path / "out", architecture=architecture, dtype="bfloat16")
    exact = ours(weights, torch.float64)(TOKENS)
    own = distance(ours(weights, torch.bfloat16)(TOKENS), exact)
    found = distance(stock(tmp_path / "out", torch.bfloat16)(TOKENS).logits, exact)
    print(f"relative distance to float64: ours in bf16 {own:.4f}, {architecture} {found:.4f}")
    assert found < 1.5 * own


@torch.no_grad()
def test_a_wrong_multiplier_would_be_seen(weights: Weights, tmp_path: Path) -> None:
    export_hf(weights, tmp_path / "out", dtype="float64")
    path = tmp_path / "out" / "config.json"
    exact = ours(weights, torch.float64)(TOKENS)
    for field in ("embedding_multiplier", "residual_multiplier", "attention_multiplier",
                  "logits_scaling", "rms_norm_eps"):  # fmt: skip
        content = json.loads(path.read_text())
        good = content[field]
        path.write_text(json.dumps(content | {field: good * 1.01}))
        with Double():
            assert distance(stock(tmp_path / "out", torch.float64)(TOKENS).logits, exact) > 1e-9
        path.write_text(json.dumps(content))


@torch.no_grad()
def test_refolding_there_and_back_keeps_the_function(weights: Weights) -> None:
    other = Multipliers(embedding=0.3, output=5.0, residual=0.01, attention=0.5)
    there = refold(weights.tensors, MULTIPLIERS, other, tied=weights.config.tied)
    model = Decoder(weights.config).double()
    model.load_state_dict({name: there.read(name) for name in there.shapes})
    model.set_multipliers(other)
    exact = ours(weights, torch.float64)(TOKENS)
    assert distance(model(TOKENS), exact) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["granite", "llama"])
def test_generation_with_and_without_a_cache(
    weights: Weights, architecture: Any, tmp_path: Path
) -> None:
    export_hf(weights, tmp_path / "out", architecture=architecture)
    model = stock(tmp_path / "out", torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer("Width – and depth", return_tensors="pt")
    made = {
        cache: model.generate(**prompt, max_new_tokens=12, do_sample=False, use_cache=cache)
        for cache in (True, False)
    }
    assert made[True].tolist() == made[False].tolist()
    exact = ours(weights, torch.float32)
    tokens = prompt["input_ids"]
    for _ in range(12):
        tokens = torch.cat((tokens, exact(tokens)[:, -1:].argmax(-1)), dim=-1)
    length = made[True].shape[1]
    assert made[True].tolist() == tokens[:, :length].tolist()
    assert length == tokens.shape[1] or made[True][0, -1] == 0
    assert model.generation_config.eos_token_id == 0


def test_the_byte_tokenizer_has_the_ids_of_the_run(weights: Weights, tmp_path: Path) -> None:
    export_hf(weights, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "".join(map(chr, range(1, 0x250))) + "  tabs\tand\n\nlines – 你好 🙂 "
    ids = tokenizer(text)["input_ids"]
    assert ids == ByteTokenizer().encode(text).tolist()
    assert tokenizer.decode(ids) == text
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 0)
    assert len(tokenizer) == 256


def test_a_trained_tokenizer_goes_along(weights: Weights, tmp_path: Path) -> None:
    own = train_bpe(["the width and the depth of the model " * 20], 260)
    fields = {**vars(weights), "tokenizer": own}
    export_hf(Weights(**fields), tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "the depth – of 你"
    assert tokenizer(text)["input_ids"] == own.encode(text).tolist()
    assert tokenizer.eos_token_id == own.separator


@pytest.mark.parametrize("architecture", ["granite", "llama"])
def test_export_and_import_are_bit_exact(
    weights: Weights, architecture: Any, tmp_path: Path
) -> None:
    export_hf(weights, tmp_path / "out", architecture=architecture)
    start = import_hf(tmp_path / "out", tmp_path / "start")
    again = read_weights(tmp_path / "start")
    assert again.config == weights.config
    assert (start.source, start.parametrization) == (architecture, "completep-tied")
    if architecture == "granite":
        assert again.multipliers == weights.multipliers
        for name in weights.tensors.shapes:
            assert torch.equal(again.tensors.read(name), weights.tensors.read(name)), name
    export_hf(again, tmp_path / "again", architecture=architecture)
    first, second = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("out", "again"))
    assert first == second


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Granite", "Llama"])
def test_a_model_of_transformers_own_is_imported_with_its_function(
    kind: str, tmp_path: Path
) -> None:
    fields = {"embedding_multiplier": 7.0, "logits_scaling": 3.0, "residual_multiplier": 0.4,
              "attention_multiplier": 0.3} if kind == "Granite" else {}  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        tie_word_embeddings=False, rms_norm_eps=1e-4, **fields)  # fmt: skip
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="20kB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file()
    start = import_hf(tmp_path / "hf", tmp_path / "start")
    assert start.parametrization is None
    tokens = TOKENS[:, :100] % 64
    model = ours(read_weights(tmp_path / "start"), torch.float32)
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-5)
    table = decoder_table(start.config, start.config, BaseParams(
        embedding_multiplier=2.0, residual_multiplier=0.7, output_multiplier=0.1))  # fmt: skip
    fresh = Decoder(start.config)
    start_from(fresh, table, tmp_path / "start")
    assert float(fresh.get_buffer("embedding_multiplier")) == 2.0
    torch.testing.assert_close(fresh(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="the imported model is another; got d_ff = 48"):
        start_from(Decoder(start.config.model_copy(update={"d_ff": 50})), table, tmp_path / "start")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtral"}, "model_type: not an architecture .* got mixtral"),
        ({"hidden_act": "gelu"}, "hidden_act: our decoder does not compute this; got gelu"),
        ({"attention_bias": True}, "attention_bias: our decoder"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type: our decoder .* got llama3"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map: our decoder"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: our decoder"),
        ({"num_attention_heads": 3}, "not a whole configuration"),
        ({"hidden_size": 64}, "tensor has another shape"),
        ({"num_hidden_layers": 3}, r"layers\.2.*tensor is missing"),
        ({"embedding_multiplier": 11.0}, "mutransfer.multipliers.embedding is 12.0"),
    ],
)
def test_what_our_decoder_does_not_compute_is_refused(
    weights: Weights, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    export_hf(weights, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        import_hf(tmp_path / "out", tmp_path / "start")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_pickles_are_refused(weights: Weights, tmp_path: Path) -> None:
    export_hf(weights, tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").rename(tmp_path / "out" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no safetensors here; got pytorch_model\.bin.*not read"):
        import_hf(tmp_path / "out", tmp_path / "start")


def test_an_index_cannot_lead_outside_its_folder(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    folder = tmp_path / "hf"
    folder.mkdir()
    index = {"weight_map": {"a": "../other.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="outside its folder; got ../other"):
        open_tensors(folder)


def test_one_shard_at_a_time_is_in_memory(tmp_path: Path) -> None:
    alive, most = 0, 0

    def gone(size: int) -> None:
        nonlocal alive
        alive -= size

    def read(name: str) -> Tensor:
        nonlocal alive, most
        tensor = torch.full((256,), float(name))
        alive += tensor.nbytes
        most = max(most, alive)
        weakref.finalize(tensor, gone, tensor.nbytes)
        return tensor

    shapes = {str(number): (256,) for number in range(32)}
    write_tensors(tmp_path, shapes, read, torch.float32, shard_bytes=4 * 1024)
    assert len(list(tmp_path.glob("*.safetensors"))) == 8
    assert most <= 8 * 1024  # the shard that is written, and the next
    found = open_tensors(tmp_path)
    assert all(torch.equal(found.read(n), torch.full((256,), float(n))) for n in shapes)


def test_values_beyond_the_type_are_refused_and_leave_nothing(
    weights: Weights, tmp_path: Path
) -> None:
    big = Tensors(shapes=weights.tensors.shapes, read=lambda n: weights.tensors.read(n) * 1e6)
    with pytest.raises(UserError, match=r"embed_tokens\.weight: a value is not finite in float16"):
        export_hf(Weights(**{**vars(weights), "tensors": big}), tmp_path / "out", dtype="float16")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def run(files: Callable[..., tuple[Path, Path]], tmp_path: Path) -> Path:
    """A finished run."""
    from full_scale.train import train

    folder = train(*files(), out=tmp_path / "run", accept_unverified=True)
    assert folder is not None
    return folder


@torch.no_grad()
def test_from_a_run_on_the_command_line(run: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "bundle.json").unlink()  # the run keeps its own
    assert main(["export-hf", str(run), str(tmp_path / "hf")]) == 0
    weights = read_weights(run)
    model = stock(tmp_path / "hf", torch.float32)
    tokens = TOKENS[:, :32]
    torch.testing.assert_close(
        model(tokens).logits, ours(weights, torch.float32)(tokens), rtol=1e-4, atol=1e-5
    )
    card = (tmp_path / "hf" / "README.md").read_text()
    assert weights.bundle is not None
    for said in (weights.bundle.sha256, "completep-tied", "accepted unverified", "16 steps"):
        assert said in card
    assert main(["import-hf", str(tmp_path / "hf"), str(tmp_path / "start")]) == 0
    assert "rules: completep-tied" in capsys.readouterr().out
    assert main(["export-hf", str(run), str(tmp_path / "hf")]) == 2
    assert "there is something already" in capsys.readouterr().err


def test_a_checkpoint_of_another_bundle_is_refused(
    run: Path, make_bundle: Callable[..., Any], tmp_path: Path
) -> None:
    make_bundle(versions={"other": "1"}).save(tmp_path / "other.json")
    with pytest.raises(UserError, match="the checkpoint belongs to another bundle"):
        read_weights(run, bundle=tmp_path / "other.json")
    step = sorted((run / "checkpoints").iterdir())[-1]
    assert read_weights(step).state == read_weights(run).state
    (step / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="the checkpoint is broken: model.safetensors has another"):
        read_weights(step)
    shutil.rmtree(step)
    assert read_weights(run).path != step


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a run folder, nor a checkpoint"):
        read_weights(tmp_path)
    identity = Identity(bundle="0" * 64, recipe="0" * 64, data="0" * 64)
    save(tmp_path / "checkpoints", Checkpoint(model={}, optimizer={}, state=State(
        identity=identity, step=1, tokens=1, optimizer="adamw")))  # fmt: skip
    with pytest.raises(UserError, match="does not hold its bundle.* --bundle"):
        read_weights(tmp_path)
