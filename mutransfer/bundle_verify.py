"""Everything that makes a bundle refused, as far as the bundle itself can tell.

Whoever changes a number and recomputes the hash meets the rules: the table is made anew from
the two model configs and the base hyperparameters, these are looked up in the trial that wins
the study, the winner is selected anew, and its losses are averaged anew.

What stays free, because only other files know better, when the hash is recomputed:

- `batch_tokens`, `horizon_tokens` and the models' `max_seq_len`: a trainer compares them
  with its recipe;
- names, fingerprints and versions: a trainer compares the tokenizer's fingerprint and notes
  another text; the experiment and the result files, named by their hashes, hold the rest;
- parameters of trials that did not win, their states, and trials left off the end;
- single lines of the two checks, as long as each number lies inside its interval and no
  verdict is better than the numbers and the other verdicts allow:
  `evidence.coord_check.slopes` with their verdicts, its `lr` (below the bundle's, it is
  noted) and `widths`, and in `evidence.transfer_check` the
  bounds, the regret, the seeds, the widths (each once) and any optimum that the drift does
  not rest on. The result files hold the originals;
- with the table made anew from it, a base hyperparameter that is fixed, the base width, or a
  winner forged in its trial too; and the coordinate check's `replay`, by which `mutransfer
  preflight` measures all of these anew but weight decay, betas and momentum.

A config that has all of the decoder's fields is the decoder's, and its table is made from
nothing else. For a model of your own, shapes and width ratios inside the blocks are the
table's word, unless `rebuild` makes the table from the model; depth and head size come from
the config's `n_layers` and `head_dim`, which are 1 where it has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from mutransfer import rules
from mutransfer.bundle_evidence import check_study, check_verdicts
from mutransfer.errors import UserError
from mutransfer.roles import Role, decoder_role
from mutransfer.rules import BaseParams, Parametrization, Ratios
from mutransfer.table import Table, make_multipliers, make_row

if TYPE_CHECKING:
    from mutransfer.bundle import Bundle, Config

_ROUNDING = 1e-13
_ABSENT = "(absent)"

_PROPORTIONAL = ("n_heads", "n_kv_heads", "d_ff")
_SIZES = ("d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "vocab_size")
DECODER_FIELDS = frozenset({*_SIZES, "max_seq_len", "rope_base", "norm_eps", "tied"})

_Named = tuple[str, tuple[int, ...], Role, float]
"""(pattern, shape, role, width ratio) of one row."""


def verify(
    bundle: Bundle, *, accept_unverified: bool = False, rebuild: Callable[[], Table] | None = None
) -> tuple[str, ...]:
    """Checks a bundle; `Bundle.verify` says what the arguments are.

    Raises:
        UserError: The bundle is refused; one line names the field, got and expected.
    """
    if (found := bundle.digest()) != bundle.sha256:
        raise UserError("the content does not have the hash that it claims", where="sha256",
                        got=bundle.sha256, expected=found,
                        cure="The file was changed after its export; export it again.")  # fmt: skip
    try:
        p = _parametrization(bundle)
        _check_provenance(bundle)
        _check_configs(bundle)
        _compare_tables(bundle.table, expected_table(bundle, p), "the rules do not reproduce this")
        if rebuild is not None:
            _compare_tables(bundle.table, rebuild(), "the model's own table differs")
        return check_verdicts(
            bundle.evidence,
            bundle.base.config,
            accept_unverified,
            lr=bundle.base_hyperparameters.lr,
        )
    except ArithmeticError as error:
        raise UserError(f"a number is out of every range ({error})", where="bundle") from error
    except ValidationError as error:  # the rules make of it what no table may hold
        first = error.errors(include_url=False)[0]
        raise UserError(f"a number is out of every range ({first['msg']})", where="bundle",
                        got=f"{first['loc'][-1]} = {first['input']}") from error  # fmt: skip


def differences(
    left: object, right: object, *, rounding: float = 0.0, path: str = ""
) -> Iterator[tuple[str, object, object]]:
    """The leaves at which two JSON documents differ, as (path, left, right).

    Args:
        left, right: The documents.
        rounding: Relative difference up to which two floats count as equal.
        path: Where both stand.
    """
    if isinstance(left, dict) and isinstance(right, dict):
        for key in [*left, *(key for key in right if key not in left)]:
            inner = f"{path}.{key}" if path else str(key)
            yield from differences(
                left.get(key, _ABSENT), right.get(key, _ABSENT), rounding=rounding, path=inner
            )
    elif isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            yield from differences(a, b, rounding=rounding, path=f"{path}.{index}")
    elif _number(left) and _number(right):
        if left != right and not math.isclose(left, right, rel_tol=rounding):  # type: ignore[arg-type]
            yield path, left, right
    elif type(left) is not type(right) or left != right:
        yield path, left, right


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def expected_table(bundle: Bundle, p: Parametrization) -> Table:
    """The table that the rules make of the configs and the base hyperparameters.

    Raises:
        UserError: A size in a config is not one, or no row has the role embedding or head.
    """
    target, base, params = bundle.target.config, bundle.base.config, bundle.base_hyperparameters
    n_layers = _size(target, "n_layers", "target")
    depth = n_layers / _size(base, "n_layers", "base")
    named = _decoder_rows(bundle) if _is_decoder(target) else _own_rows(bundle)

    def ratios(width: float) -> Ratios:
        return Ratios(
            width=width, depth=depth, n_layers=n_layers, base_width=bundle.base.base_width
        )

    ends = [width for _, _, role, width in named if role in ("embedding", "head")]
    if not ends:
        raise UserError("no row has the role embedding or head", where="table.rows")
    multipliers = make_multipliers(
        ratios(ends[-1]),
        p,
        params,
        _size(target, "head_dim", "target"),
        _size(base, "head_dim", "base"),
    )
    return Table(
        parametrization=p.name,
        version=p.version,
        multipliers=multipliers,
        rows=tuple(
            make_row(pattern, shape, role, ratios(width), p, params, multipliers)
            for pattern, shape, role, width in named
        ),
    )


def _decoder_rows(bundle: Bundle) -> list[_Named]:
    """What the decoder of `target.config` consists of; all its matrices have one width ratio."""
    sizes = (_size(bundle.target.config, key, "target") for key in _SIZES)
    d_model, _, n_heads, n_kv_heads, head_dim, d_ff, vocab_size = sizes
    heads, kv_heads = n_heads * head_dim, n_kv_heads * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "embedding": (vocab_size, d_model),
        "layers.*.attention_norm": (d_model,),
        "layers.*.attention.q": (heads, d_model),
        "layers.*.attention.k": (kv_heads, d_model),
        "layers.*.attention.v": (kv_heads, d_model),
        "layers.*.attention.o": (d_model, heads),
        "layers.*.mlp_norm": (d_model,),
        "layers.*.mlp.gate": (d_ff, d_model),
        "layers.*.mlp.up": (d_ff, d_model),
        "layers.*.mlp.down": (d_model, d_ff),
        "norm": (d_model,),
    }
    if not bundle.target.config["tied"]:
        shapes["head"] = (vocab_size, d_model)
    base_model = _size(bundle.base.config, "d_model", "base")
    width = d_model / base_model * (base_model / bundle.base.base_width)
    return [
        (f"{name}.weight", shape, decoder_role(f"{name}.weight".replace("*", "0"), shape), width)
        for name, shape in shapes.items()
    ]


def _own_rows(bundle: Bundle) -> list[_Named]:
    """What the table says about a model of one's own, where it can be so."""
    named = []
    for row in bundle.table.rows:
        where = f"table.rows.{row.pattern}"
        if not row.shape or min(row.shape) < 1:
            raise UserError("not a shape", where=f"{where}.shape", got=row.shape)
        widths = [side / bundle.base.base_width for side in row.shape]
        if row.role in ("embedding", "head") and not any(
            _close(row.width_ratio, width) for width in widths
        ):
            raise UserError("not the width over the base width", where=f"{where}.width_ratio",
                            got=row.width_ratio, expected=widths[-1])  # fmt: skip
        named.append((row.pattern, row.shape, row.role, row.width_ratio))
    return named


def _check_configs(bundle: Bundle) -> None:
    """The base is the target at other sizes, and nothing else."""
    target, base = bundle.target.config, bundle.base.config
    decoder = _is_decoder(target)
    for key in sorted(target.keys() | base.keys()):
        a, b = base.get(key, _ABSENT), target.get(key, _ABSENT)
        if decoder and key in _PROPORTIONAL:
            d_base, d_target = _size(base, "d_model", "base"), _size(target, "d_model", "target")
            right = _size(base, key, "base") * d_target == _size(target, key, "target") * d_base
        elif decoder:
            right = key in ("d_model", "n_layers", "max_seq_len") or _same(a, b)
        else:
            right = _same(a, b) or (type(a) is int and type(b) is int)
        if not right:
            raise UserError("base and target differ in more than size",
                            where=f"base.config.{key}", got=repr(a),
                            expected=f"in keeping with the target's {b!r}")  # fmt: skip
    vocab_size = target.get("vocab_size", bundle.data.vocab_size)
    if vocab_size != bundle.data.vocab_size:
        raise UserError("model and data differ in vocabulary", where="data.vocab_size",
                        got=bundle.data.vocab_size, expected=vocab_size)  # fmt: skip


def _check_provenance(bundle: Bundle) -> None:
    """Every base hyperparameter is what its source says: the winner of the study, or fixed."""
    params = bundle.base_hyperparameters
    for key in sorted(bundle.provenance.keys() ^ BaseParams.model_fields.keys()):
        got = "none" if key in BaseParams.model_fields else "one for an unknown name"
        raise UserError("every base hyperparameter needs a source", where=f"provenance.{key}",
                        got=got)  # fmt: skip
    if bundle.evidence is None:
        return
    winner, study = check_study(bundle.evidence.study), bundle.evidence.study.name
    for key, source in bundle.provenance.items():
        value, won = getattr(params, key), winner.params.get(key)
        where = f"base_hyperparameters.{key}"
        if source.source == "fixed":
            if won is not None:
                raise UserError("swept by the study, yet said to be fixed",
                                where=f"provenance.{key}", expected=f"study {study!r}")  # fmt: skip
            continue
        if source.study != study or source.trials != (winner.number,):
            raise UserError("not the trial that wins the study", where=f"provenance.{key}",
                            got=f"{source.study!r} {list(source.trials)}",
                            expected=f"{study!r} [{winner.number}]")  # fmt: skip
        if won is None or not _close(value, won):
            raise UserError("the evidence's trials do not yield this", where=where, got=value,
                            expected=f"{won} of trial {winner.number}")  # fmt: skip
    for key in sorted(winner.params.keys() - bundle.provenance.keys()):
        raise UserError("swept, but no base hyperparameter",
                        where=f"evidence.study.trials.{winner.number}.params.{key}")  # fmt: skip


def _parametrization(bundle: Bundle) -> Parametrization:
    """The rules by the bundle's name and version."""
    if (p := rules.PARAMETRIZATIONS.get(bundle.parametrization.name)) is None:
        raise UserError("unknown parametrization", where="parametrization.name",
                        got=bundle.parametrization.name,
                        expected=f"one of {', '.join(rules.PARAMETRIZATIONS)}")  # fmt: skip
    if p.version != bundle.parametrization.version:
        raise UserError("the rules of this parametrization have another version here",
                        where="parametrization.version", got=bundle.parametrization.version,
                        expected=p.version, cure="Use the mutransfer that wrote it.")  # fmt: skip
    return p


def _compare_tables(table: Table, expected: Table, what: str) -> None:
    """Raises at the first field in which two tables differ by more than rounding."""
    patterns = [row.pattern for row in table.rows]
    for pattern in patterns:
        if patterns.count(pattern) > 1:
            raise UserError("two rows have one pattern", where=f"table.rows.{pattern}")
    found = differences(_by_pattern(table), _by_pattern(expected), rounding=_ROUNDING)
    for field, got, wanted in found:
        raise UserError(what, where=f"table.{field}", got=repr(got), expected=repr(wanted),
                        cure="Export the bundle again from its experiment.")  # fmt: skip


def _by_pattern(table: Table) -> dict[str, Any]:
    document = table.model_dump(mode="json")
    return {**document, "rows": {row["pattern"]: row for row in document["rows"]}}


def _is_decoder(config: Mapping[str, object]) -> bool:
    return config.keys() >= DECODER_FIELDS


def _size(config: Config, key: str, model: str) -> int:
    """A positive whole number of a config; 1 where it has none."""
    value = config.get(key, 1)
    if type(value) is not int or value < 1:
        raise UserError("not a size", where=f"{model}.config.{key}", got=repr(value),
                        expected="a whole number of at least 1")  # fmt: skip
    return value


def _same(a: object, b: object) -> bool:
    return type(a) is type(b) and a == b


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=_ROUNDING)
