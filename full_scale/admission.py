"""Whether a recipe may run from a bundle, and which named rule converts what differs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from full_scale.recipe import Recipe
from mutransfer.bundle import Bundle
from mutransfer.errors import UserError
from mutransfer.rules import BaseParams
from mutransfer.schema import parse
from mutransfer.table import Table
from proxies.data import Corpus
from proxies.decoder import DecoderConfig, meta_decoder
from proxies.tables import decoder_table


@dataclass(frozen=True, kw_only=True)
class Converted:
    """One quantity in which the run differs from what the bundle was tuned for.

    Attributes:
        quantity: `batch_tokens` or `horizon_tokens`.
        rule: The recipe's rule.
        tuned: The bundle's value, in tokens.
        used: The recipe's value, in tokens.
        lr_factor: What the rule multiplies every peak learning rate by.
    """

    quantity: str
    rule: str
    tuned: int
    used: int
    lr_factor: float

    def __str__(self) -> str:
        return (
            f"{self.quantity}: tuned {self.tuned:,}, used {self.used:,}; rule {self.rule!r} "
            f"multiplies every peak learning rate by {self.lr_factor:.6g}"
        )


@dataclass(frozen=True, kw_only=True)
class Admission:
    """What a run may start with.

    Attributes:
        table: The bundle's table, converted.
        params: The base hyperparameters, converted.
        conversions: What was converted, and how.
        notes: What was accepted but should be known.
    """

    table: Table
    params: BaseParams
    conversions: tuple[Converted, ...]
    notes: tuple[str, ...]


def admit(bundle: Bundle, recipe: Recipe, *, accept_unverified: bool = False) -> Admission:
    """Checks a recipe against a bundle; reads no data and allocates no weights.

    Args:
        bundle: What the proxies found.
        recipe: What the run is.
        accept_unverified: Whether a missing or failed verdict of the evidence is accepted.

    Raises:
        UserError: The models differ, the bundle does not verify, its table does not fit the
            model, or batch or horizon differ and no rule of the recipe converts them.
    """
    _require_same_model(bundle, recipe)
    rules = bundle.parametrization.name
    if recipe.parametrization not in (None, rules):
        raise UserError("the recipe is written for another parametrization than the bundle's",
                        where=f"recipe {recipe.name!r}", got=rules,
                        expected=recipe.parametrization)  # fmt: skip
    notes = bundle.verify(
        accept_unverified=accept_unverified, rebuild=lambda: _table(bundle, recipe)
    )
    notes = (*notes, *_unchecked(bundle, recipe))
    bundle.table.resolve(meta_decoder(recipe.model))
    if all(row.optimizers.muon is None for row in bundle.table.rows) and any(
        phase.optimizer == "muon" for phase in recipe.phases
    ):
        raise UserError("the recipe uses Muon but the bundle has no settings for it",
                        where="table.rows.*.optimizers.muon")  # fmt: skip
    conversions = _convert(bundle, recipe)
    factor = math.prod(conversion.lr_factor for conversion in conversions)
    params, table = bundle.base_hyperparameters, bundle.table
    if factor != 1.0:
        params = params.model_copy(update={"lr": params.lr * factor})
        table = _table(bundle, recipe, params)
    return Admission(table=table, params=params, conversions=conversions, notes=notes)


def _unchecked(bundle: Bundle, recipe: Recipe) -> Iterator[str]:
    """What the evidence is silent about."""
    check = bundle.evidence.coord_check if bundle.evidence else None
    if (
        check is not None
        and any(phase.optimizer == "muon" for phase in recipe.phases)
        and all(line.optimizer != "muon" for line in check.slopes)
    ):
        yield (
            "the run decays with Muon, under which coordinates were not checked: "
            "set coord_check.optimizers = ['adamw', 'muon'] in the experiment"
        )
    layers, base = recipe.model.n_layers, bundle.base.config.get("n_layers")
    if layers != base:
        yield (
            f"the target has {layers} layers, the base {base}: the depth rules were applied, but "
            "the transfer was checked over width only"
        )


def admit_data(bundle: Bundle, corpus: Corpus) -> tuple[str, ...]:
    """Checks a corpus against a bundle; another corpus is noted, another tokenizer refused.

    Raises:
        UserError: Vocabulary or tokenizer are not those the bundle was tuned with.
    """
    cure = "Token ids must mean the same; use the bundle's tokenizer, or tune a bundle for this."
    if corpus.vocab_size != bundle.data.vocab_size:
        raise UserError("another vocabulary than the bundle's", where="data.vocab_size",
                        got=corpus.vocab_size, expected=bundle.data.vocab_size,
                        cure=cure)  # fmt: skip
    if corpus.tokenizer_fingerprint != bundle.data.tokenizer_fingerprint:
        raise UserError("another tokenizer than the bundle's", where="data.tokenizer",
                        got=corpus.tokenizer_fingerprint,
                        expected=bundle.data.tokenizer_fingerprint, cure=cure)  # fmt: skip
    if corpus.fingerprint != bundle.data.fingerprint:
        return (
            f"another corpus than the bundle was tuned on: {corpus.fingerprint[:12]} "
            f"instead of {bundle.data.fingerprint[:12]}",
        )
    return ()


def _table(bundle: Bundle, recipe: Recipe, params: BaseParams | None = None) -> Table:
    """The table that the rules give the recipe's model."""
    return decoder_table(
        recipe.model,
        parse(DecoderConfig, bundle.base.config, "bundle: base.config"),
        params or bundle.base_hyperparameters,
        bundle.parametrization.name,
        base_width=bundle.base.base_width,
    )


def _require_same_model(bundle: Bundle, recipe: Recipe) -> None:
    ours, theirs = recipe.model.model_dump(), dict(bundle.target.config)
    fields = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if fields:
        raise UserError(
            "the recipe's model is not the bundle's target",
            where=f"recipe {recipe.name!r}",
            got=", ".join(f"{name} = {ours.get(name)}" for name in fields),
            expected=", ".join(f"{name} = {theirs.get(name)}" for name in fields),
            cure="Name the bundle's target in the recipe, or export a bundle for this model.",
        )


def _convert(bundle: Bundle, recipe: Recipe) -> tuple[Converted, ...]:
    converted = []
    for quantity, rule in (
        ("batch_tokens", recipe.conversion.batch_rule),
        ("horizon_tokens", recipe.conversion.horizon_rule),
    ):
        tuned, used = getattr(bundle, quantity), getattr(recipe, quantity)
        if used == tuned:
            continue
        key = f"conversion.{quantity.removesuffix('_tokens')}_rule"
        if rule is None:
            raise UserError(
                f"{quantity} is not what the bundle was tuned for",
                where=f"recipe {recipe.name!r}",
                got=used,
                expected=tuned,
                cure=f"Make them equal, or name a rule in {key}.",
            )
        # Adam's noise scale stays put under lr ~ sqrt(batch) (2205.10287, Definition 4.3)
        factor = math.sqrt(used / tuned) if rule == "sqrt" else 1.0
        converted.append(
            Converted(quantity=quantity, rule=rule, tuned=tuned, used=used, lr_factor=factor)
        )
    return tuple(converted)
