"""The bundle: all that a sweep hands to a trainer, in one JSON file that proves itself.

It holds the base hyperparameters and where each came from, the table that the rules make of
them for the target, the evidence that they transfer, and a hash over all of it.
`mutransfer.bundle_verify` says what is refused.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import rfc8785
from pydantic import Field
from torch import nn

from mutransfer import bundle_verify
from mutransfer.apply import initialize
from mutransfer.bundle_evidence import Evidence, Record, Sha256
from mutransfer.errors import UserError
from mutransfer.files import read_json, write_json
from mutransfer.rules import BaseParams
from mutransfer.schema import parse
from mutransfer.table import Table

SCHEMA_VERSION = 2

Scalar = bool | int | float | str | None
Config = dict[str, Scalar]


class ExperimentId(Record):
    """The experiment that the bundle comes from."""

    name: str
    sha256: Sha256 = Field(description="of the canonical experiment")


class Base(Record):
    """The model that was tuned."""

    config: Config
    base_width: int = Field(ge=1, description="width at which m = 1")


class Target(Record):
    """The model that the table is for."""

    config: Config


class ParametrizationId(Record):
    """The rules."""

    name: str
    version: int = Field(ge=1)


class FromStudy(Record):
    """A base hyperparameter that a study found."""

    source: Literal["study"] = "study"
    study: str
    trials: tuple[int, ...] = Field(min_length=1)


class Fixed(Record):
    """A base hyperparameter that the experiment set."""

    source: Literal["fixed"] = "fixed"


class Data(Record):
    """The text that it was tuned on."""

    fingerprint: str
    tokenizer_fingerprint: str
    vocab_size: int = Field(ge=2)


class Bundle(Record):
    """Hyperparameters of one target model, with their evidence."""

    schema_version: Literal[2]
    experiment: ExperimentId
    base: Base
    target: Target
    parametrization: ParametrizationId
    base_hyperparameters: BaseParams
    provenance: dict[str, Annotated[FromStudy | Fixed, Field(discriminator="source")]] = Field(
        description="by base hyperparameter"
    )
    table: Table
    evidence: Evidence | None
    batch_tokens: int = Field(ge=1, description="tokens per step that it was tuned for")
    horizon_tokens: int = Field(ge=1, description="tokens per run that it was tuned for")
    data: Data
    versions: dict[str, str]
    sha256: Sha256 = Field(description="over the RFC 8785 form of everything else")

    @classmethod
    def create(cls, **fields: Any) -> Bundle:
        """A bundle of every field but `schema_version` and `sha256`, which are filled in.

        Raises:
            UserError: A field is missing, unknown, of the wrong type, or not finite.
        """
        fields = {"schema_version": SCHEMA_VERSION, **fields, "sha256": "0" * 64}
        draft = parse(cls, fields, "bundle").model_dump(mode="json")
        return parse(cls, {**draft, "sha256": digest(draft)}, "bundle")

    @classmethod
    def load(cls, path: Path | str) -> Bundle:
        """Reads a bundle's form; `verify` and `apply` check what it says, hash included.

        Raises:
            UserError: The file is not strict JSON, is of another schema version, or a field
                is missing, unknown, of the wrong type or out of its range.
        """
        document, where = read_json(path), str(path)
        if not isinstance(document, dict):
            raise UserError("not a bundle", where=where, got=type(document).__name__,
                            expected="a JSON object")  # fmt: skip
        version = document.get("schema_version")
        if type(version) is not int or version != SCHEMA_VERSION:
            older = type(version) is int and version in MIGRATIONS
            cure = (f"Convert it: mutransfer bundle migrate {where} NEW." if older
                    else "Read it with the mutransfer that wrote it.")  # fmt: skip
            raise UserError("unknown schema version", where=f"{where}: schema_version",
                            got=repr(version), expected=SCHEMA_VERSION, cure=cure)  # fmt: skip
        bundle = parse(cls, document, where)
        # nothing was filled in or converted on the way
        for field, got, expected in bundle_verify.differences(
            document, bundle.model_dump(mode="json")
        ):
            raise UserError("field is missing or of another type", where=f"{where}: {field}",
                            got=repr(got), expected=repr(expected))  # fmt: skip
        return bundle

    def save(self, path: Path | str) -> None:
        """Writes indented JSON, whole or not at all; floats survive exactly."""
        write_json(path, self.model_dump(mode="json"))

    def digest(self) -> str:
        """What `sha256` should be."""
        return digest(self.model_dump(mode="json"))

    def verify(
        self, *, accept_unverified: bool = False, rebuild: Callable[[], Table] | None = None
    ) -> tuple[str, ...]:
        """Checks everything that can be checked; see `mutransfer.bundle_verify`.

        Args:
            accept_unverified: Whether a missing or failed verdict is a note, not an error.
            rebuild: Makes the target's table anew from the model itself, to be compared.

        Returns:
            Notes for the user: verdicts that are WARN, or that were accepted unverified.

        Raises:
            UserError: The bundle is refused.
        """
        return bundle_verify.verify(self, accept_unverified=accept_unverified, rebuild=rebuild)

    def apply(
        self,
        model: nn.Module,
        *,
        seed: int = 0,
        accept_unverified: bool = False,
        rebuild: Callable[[], Table] | None = None,
    ) -> Table:
        """Verifies the bundle and initializes `model`; the table's groups train it.

        Args:
            model: The target; it must have `set_multipliers` where multipliers are not one.
            seed: Of the initial weights.
            accept_unverified: See `verify`; notes are logged as warnings.
            rebuild: See `verify`.

        Raises:
            UserError: The bundle is refused, or is not for this model.
        """
        for note in self.verify(accept_unverified=accept_unverified, rebuild=rebuild):
            logging.getLogger(__name__).warning(note)
        initialize(model, self.table, seed=seed)
        return self.table


def migrate(document: dict[str, Any], where: str) -> Bundle:
    """A bundle of an older schema version as one of this version, with a new hash.

    Args:
        document: The older bundle's JSON.
        where: Its name in errors.

    Raises:
        UserError: It is no bundle of a known older version, or its hash does not fit.
    """
    version = document.get("schema_version")
    if type(version) is not int or version not in MIGRATIONS:
        raise UserError("not a bundle of an older schema version",
                        where=f"{where}: schema_version", got=repr(version),
                        expected=f"one of {', '.join(map(str, MIGRATIONS))}")  # fmt: skip
    if (found := digest(document)) != document.get("sha256"):
        raise UserError("the content does not have the hash that it claims",
                        where=f"{where}: sha256", got=repr(document.get("sha256")),
                        expected=found)  # fmt: skip
    try:
        newer = MIGRATIONS[version](copy.deepcopy(document))
        newer["sha256"] = digest(newer)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            "not a bundle of its schema version", where=where, got=str(error)
        ) from error
    return parse(Bundle, newer, where)


def _from_1(document: dict[str, Any]) -> dict[str, Any]:
    """Version 2 has the widths of the coordinate check and what it takes to replay it."""
    check = (document["evidence"] or {}).get("coord_check")
    if check is not None:
        check |= {"widths": [], "replay": None}
    return document | {"schema_version": 2}


MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_1}
"""What converts a bundle of each older schema version."""


def digest(document: Mapping[str, Any]) -> str:
    """SHA-256 over the RFC 8785 form of a bundle's JSON without its `sha256`.

    RFC 8785 writes numbers as ECMAScript does, so 1 and 1.0 are the same number here.

    Raises:
        UserError: A number has no such form: not finite, or a whole number beyond 2**53.
    """
    rest = {key: value for key, value in document.items() if key != "sha256"}
    try:
        return hashlib.sha256(rfc8785.dumps(rest)).hexdigest()
    except ValueError as error:
        raise UserError(f"a value cannot be hashed ({error})", where="bundle",
                        expected="finite numbers, whole ones within 2**53") from error  # fmt: skip
