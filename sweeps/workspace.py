"""The folder of an experiment: its corpus, its ledger, and one folder per command."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mutransfer.errors import UserError
from mutransfer.files import read_json, write_json
from mutransfer.rules import BaseParams, get_parametrization
from proxies.data import Corpus, prepare
from proxies.decoder import DecoderConfig
from proxies.run import RunSpec
from sweeps.experiment import Experiment, first_difference
from sweeps.ledger import Ledger

SCHEMA_VERSION = 1


class Workspace:
    """Where one experiment keeps everything.

    Args:
        experiment: The experiment.
        out: Its folder; `runs/<experiment name>` by default.
    """

    def __init__(self, experiment: Experiment, out: Path | None = None) -> None:
        self.experiment = experiment
        self.root = out or Path("runs") / experiment.name
        self._corpus: Corpus | None = None

    @property
    def corpus(self) -> Corpus:
        """The text, tokenized at first use.

        Raises:
            UserError: The text cannot be read, or its vocabulary is not the target's.
        """
        if self._corpus is None:
            self._corpus = prepare(self.experiment.data, self.root / "data")
            if self._corpus.vocab_size != self.experiment.target.vocab_size:
                raise UserError(
                    "the tokenizer's vocabulary is not the target's",
                    where="target.vocab_size",
                    got=self.experiment.target.vocab_size,
                    expected=self._corpus.vocab_size,
                )
        return self._corpus

    def ledger(self) -> Ledger:
        """The results so far; holds the experiment's lock while open."""
        return Ledger(self.root / "ledger.jsonl")

    def folder(self, command: str) -> Path:
        """The folder of a command's results."""
        path = self.root / command
        path.mkdir(parents=True, exist_ok=True)
        return path

    def spec(
        self,
        model: DecoderConfig,
        params: BaseParams,
        seed: int,
        parametrization: str | None = None,
    ) -> RunSpec:
        """A run of this experiment."""
        e = self.experiment
        rules = get_parametrization(parametrization or e.parametrization)
        return RunSpec(
            model=model,
            base=e.base,
            base_width=e.base_width,
            parametrization=rules.name,
            rules_version=rules.version,
            params=params,
            train=e.train,
            seed=seed,
            data=self.corpus.fingerprint,
        )

    def save(
        self, command: str, verdict: str, result: Mapping[str, Any], *, suffix: str = ""
    ) -> Path:
        """Writes `<command>/<command><suffix>.json` with the experiment that it belongs to.

        Only what has no suffix is read again, by `load`.
        """
        path = self._path(command).with_name(f"{command}{suffix}.json")
        write_json(
            path,
            {
                "schema_version": SCHEMA_VERSION,
                "verdict": verdict,
                "experiment_sha256": self.experiment.sha256,
                "experiment": self.experiment.canonical,
                "data_fingerprint": self.corpus.fingerprint,
                **{k: v for k, v in result.items() if k not in ("schema_version", "verdict")},
            },
        )
        return path

    def load(self, command: str) -> dict[str, Any]:
        """Reads what `save` wrote, for this very experiment and text.

        Raises:
            UserError: There is none, or it belongs to another experiment or text.
        """
        path, e = self._path(command), self.experiment
        name = command.replace("_", "-")
        again = f"Run `mutransfer {name}` again for this experiment."
        if not path.is_file():
            raise UserError(f"no result of {name} yet", where=str(path), cure=again)
        record = read_json(path)
        if not isinstance(record, dict) or record.get("schema_version") != SCHEMA_VERSION:
            raise UserError("not a result of this version", where=str(path), cure=again)
        if record.get("experiment_sha256") != e.sha256:
            theirs = record.get("experiment")
            odd = first_difference(theirs, e.canonical) if isinstance(theirs, dict) else None
            raise UserError(
                "result belongs to another experiment", where=str(path), got=odd, cure=again
            )
        if record.get("data_fingerprint") != self.corpus.fingerprint:
            raise UserError("result belongs to another text", where=str(path), cure=again)
        return record

    def _path(self, command: str) -> Path:
        return self.folder(command.replace("_", "-")) / f"{command}.json"
