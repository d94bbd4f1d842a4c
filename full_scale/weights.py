"""The weights of a checkpoint with all that gives them a meaning: where every export begins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from full_scale.checkpoint import State, newest, verify
from full_scale.start import Start
from full_scale.tensors import Tensors, open_tensors
from mutransfer.bundle import Bundle
from mutransfer.errors import UserError
from mutransfer.files import read_json
from mutransfer.progress import Report, quiet
from mutransfer.schema import parse
from mutransfer.table import Multipliers
from proxies.data import ByteTokenizer, Tokenizer, read_tokenizer
from proxies.decoder import DecoderConfig, meta_decoder


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A trained or imported decoder, its tensors read when asked for.

    Attributes:
        config: Its shape.
        multipliers: What it computes with.
        tensors: By the decoder's names.
        parametrization: Name of the rules, or `None` where none are known.
        bundle: Where the rules come from; `None` for weights from elsewhere.
        tokenizer: What its ids mean; `None` where nobody said.
        state: How long it was trained; `None` for weights from elsewhere.
        path: Where it lies.
    """

    config: DecoderConfig
    multipliers: Multipliers
    tensors: Tensors
    parametrization: str | None
    bundle: Bundle | None
    tokenizer: Tokenizer | None
    state: State | None
    path: Path


def read_weights(
    path: Path,
    *,
    bundle: Path | None = None,
    tokenizer: Path | None = None,
    say: Report = quiet,
) -> Weights:
    """Opens a run folder (its newest whole checkpoint), a checkpoint, or an imported model.

    Args:
        path: The folder.
        bundle: The bundle, where the run folder has none.
        tokenizer: A tokenizer.json, where the run folder has none.
        say: Is told of broken checkpoints that are passed over.

    Raises:
        UserError: It is none of these or not whole, or bundle, tokenizer and weights do not
            belong together.
    """
    if (path / "start.json").is_file():
        return _imported(path, tokenizer)
    step = path
    if (path / "checkpoints").is_dir():
        found = newest(path / "checkpoints", say)
        if found is None:
            raise UserError("the run has no checkpoint", where=str(path / "checkpoints"))
        step = found
    elif not (path / "manifest.json").is_file():
        raise UserError(
            "neither a run folder, nor a checkpoint, nor an imported model", where=str(path),
            expected="checkpoints/, manifest.json or start.json in it",
        )  # fmt: skip
    elif problem := verify(step):
        raise UserError(f"the checkpoint is broken: {problem}", where=str(step))
    return _trained(step, bundle, tokenizer)


def _trained(step: Path, bundle_path: Path | None, tokenizer: Path | None) -> Weights:
    run = step.absolute().parent.parent
    path = bundle_path or run / "bundle.json"
    if not path.is_file():
        raise UserError("the run folder does not hold its bundle", where=str(path),
                        cure="Name the bundle with --bundle.")  # fmt: skip
    bundle = Bundle.load(path)
    if bundle.digest() != bundle.sha256:
        raise UserError("the content does not have the hash that it claims",
                        where=f"{path}: sha256", got=bundle.sha256)  # fmt: skip
    state = parse(State, read_json(step / "state.json"), str(step))
    if state.identity.bundle != bundle.sha256:
        raise UserError("the checkpoint belongs to another bundle", where=str(step),
                        got=state.identity.bundle[:12], expected=bundle.sha256[:12],
                        cure="Name its own with --bundle.")  # fmt: skip
    config = parse(DecoderConfig, bundle.target.config, f"{path}: target.config")
    return Weights(
        config=config,
        multipliers=bundle.table.multipliers,
        tensors=checked(open_tensors(step), config, str(step)),
        parametrization=bundle.parametrization.name,
        bundle=bundle,
        tokenizer=_tokenizer(run, tokenizer, bundle.data.tokenizer_fingerprint),
        state=state,
        path=step,
    )


def _imported(path: Path, tokenizer: Path | None) -> Weights:
    start = parse(Start, read_json(path / "start.json"), f"{path}/start.json")
    own = tokenizer or path / "tokenizer.json"
    return Weights(
        config=start.config,
        multipliers=start.multipliers,
        tensors=checked(open_tensors(path), start.config, str(path)),
        parametrization=start.parametrization,
        bundle=None,
        tokenizer=read_tokenizer(own) if own.is_file() else None,
        state=None,
        path=path,
    )


def _tokenizer(run: Path, given: Path | None, fingerprint: str) -> Tokenizer:
    """The tokenizer that the bundle was tuned with."""
    if fingerprint == ByteTokenizer.fingerprint:
        return ByteTokenizer()
    path = given or run / "tokenizer.json"
    if not path.is_file():
        raise UserError("the run folder does not hold its tokenizer", where=str(path),
                        cure="Name the tokenizer.json with --tokenizer.")  # fmt: skip
    found = read_tokenizer(path)
    if found.fingerprint != fingerprint:
        raise UserError("another tokenizer than the bundle's", where=str(path),
                        got=found.fingerprint[:12], expected=fingerprint[:12])  # fmt: skip
    return found


def checked(tensors: Tensors, config: DecoderConfig, where: str) -> Tensors:
    """The same, in the decoder's order, once names and shapes are those of the decoder.

    Raises:
        UserError: They are not.
    """
    expected = {fqn: tuple(p.shape) for fqn, p in meta_decoder(config).named_parameters()}
    if odd := sorted(expected.keys() ^ tensors.shapes.keys()):
        here = "missing" if odd[0] in expected else "unknown"
        raise UserError(f"tensor is {here}", where=f"{where}: {odd[0]}",
                        got=f"{len(odd)} names that differ")  # fmt: skip
    for name, shape in expected.items():
        if tuple(tensors.shapes[name]) != shape:
            raise UserError("tensor has another shape than the model", where=f"{where}: {name}",
                            got=tensors.shapes[name], expected=shape)  # fmt: skip
    return Tensors(shapes=expected, read=tensors.read)
