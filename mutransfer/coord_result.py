"""What a coordinate check found, as data, as JSON and as text."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import pandas as pd

from mutransfer.coord_expect import Axis
from mutransfer.coord_late import Drift, drifts
from mutransfer.coord_text import culprits, drift_table, exceptions_text, table
from mutransfer.coord_verdict import Quantity, Unjudged
from mutransfer.symbolic import Finding
from mutransfer.verdict import Verdict, plain, worst

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class CoordCheckResult:
    """Everything a coordinate check measured and concluded.

    Attributes:
        parametrization: Name of the rules that the tables came from.
        optimizer: `adamw` or `muon`, for the hidden matrices.
        widths, seeds, steps: What was run; depths, where the axis is the depth.
        frame: Long table with the columns kind, name, t, width, seed, value.
        quantities: One verdict per judged quantity.
        exceptions: What is measured and not judged, and why.
        symbolic: Disagreements between what was built and the table.
        axis: What the models differ in.
        trained: Steps that the models were trained for before the check.
        drifts: Of every slope, late from early, where `since` compared them.
    """

    parametrization: str
    optimizer: str
    widths: tuple[int, ...]
    seeds: int
    steps: int
    frame: pd.DataFrame
    quantities: tuple[Quantity, ...]
    exceptions: tuple[Unjudged, ...]
    symbolic: tuple[Finding, ...]
    axis: Axis = "width"
    trained: int = 0
    drifts: tuple[Drift, ...] = ()

    def since(self, early: CoordCheckResult) -> CoordCheckResult:
        """This result with the drift of its slopes from those of an earlier check.

        Args:
            early: The same check of the same models at an earlier step.
        """
        return replace(self, drifts=drifts(early, self))

    @property
    def measured_verdict(self) -> Verdict:
        """The worst verdict of the quantities alone."""
        return worst(q.verdict for q in self.quantities)

    @property
    def verdict(self) -> Verdict:
        """The worst of all; any symbolic finding is a FAIL."""
        return "FAIL" if self.symbolic else self.measured_verdict

    @property
    def culprits(self) -> tuple[str, ...]:
        """What is wrong, in sentences, worst and most direct first."""
        return culprits(self.quantities, self.symbolic)

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON file; a slope or bound that does not exist is null."""
        record = {
            "verdict": self.verdict,
            "schema_version": SCHEMA_VERSION,
            "parametrization": self.parametrization,
            "optimizer": self.optimizer,
            "axis": self.axis,
            "trained": self.trained,
            "widths": list(self.widths),
            "seeds": self.seeds,
            "steps": self.steps,
            "culprits": list(self.culprits),
            "quantities": [asdict(quantity) for quantity in self.quantities],
            "drifts": [asdict(drift) for drift in self.drifts],
            "exceptions": [asdict(exception) for exception in self.exceptions],
            "symbolic": [asdict(finding) for finding in self.symbolic],
        }
        found: dict[str, Any] = plain(record)
        return found

    def summary(self) -> str:
        """A short table and the culprits, for a terminal."""
        late = f" after {self.trained} steps" if self.trained else ""
        head = (
            f"coordinate check of {self.parametrization} under {self.optimizer}{late}: "
            f"{self.verdict}",
            f"  {self.axis}s {', '.join(map(str, self.widths))}; {self.seeds} seeds; "
            f"{self.steps} steps; slopes are exponents of the {self.axis}",
        )
        symbolic = f"{len(self.symbolic)} differences from the table" if self.symbolic else "all"
        built = "multipliers" if self.trained else "multipliers and init"
        groups = f"  optimizer groups, {built} as in the table: {symbolic}"
        told = [f"  - {line}" for line in self.culprits]
        drifted = drift_table(self.drifts) if self.drifts else []
        excepted = exceptions_text(self.exceptions, self.trained > 0)
        return "\n".join((*head, *table(self.quantities), *drifted, groups, *excepted, *told))
