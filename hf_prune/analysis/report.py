"""What a sensitivity analysis has found: a table, a heat map and a file."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..reporting.plots import Drawn, figure_of_modules
from ..reporting.tables import number, table
from ..selection.layer_sparsity import require_sensitivity

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Sensitivity:
    """One row of a `SensitivityReport`: what one place costs, or all of a kind.

    Attributes:
        name: The module, or "all heads", "all q_proj" and the like.
        total: Number of its weights or structures.
        values: The metric if it alone is pruned, at each level; None where so much of it cannot go.
        is_kind: Whether it is all of a kind, and not a place.
    """

    name: str
    total: int
    values: tuple[float | None, ...]
    is_kind: bool = False


@dataclass(frozen=True)
class SensitivityReport(Drawn):
    """What each place of a model costs if it alone is pruned. Prints as a table of changes of the metric.

    Attributes:
        metric: Name of the metric.
        greater_is_better: Which way it improves.
        dense: The metric of the dense model.
        levels: The sparsities that each place was pruned to, rising.
        rows: The places, then the kinds.
        granularity: What was removed together.
        criterion: Name of what scored it.
    """

    metric: str
    greater_is_better: bool
    dense: float
    levels: tuple[float, ...]
    rows: tuple[Sensitivity, ...]
    granularity: str
    criterion: str

    def harm(self, row: Sensitivity) -> list[float | None]:
        """By how much the metric gets worse at each level; below 0 where it gets better."""
        sign = -1 if self.greater_is_better else 1
        return [None if value is None else sign * (value - self.dense) for value in row.values]

    def __str__(self) -> str:
        head = ["place", "total", *(f"{level:g}" for level in self.levels)]
        cells = [[row.name, f"{row.total:,}", *self._changes(row)] for row in self.rows]
        places = sum(not row.is_kind for row in self.rows)
        rules = [1, *([1 + places] if 0 < places < len(self.rows) else [])]
        return f"{table([head, *cells], rules)}\n\nChange of {self.metric}; dense: {number(self.dense)}."

    def _changes(self, row: Sensitivity) -> list[str]:
        return ["" if value is None else f"{value - self.dense:+.4f}" for value in row.values]

    def figure(self) -> "Figure":
        """The harm of each place: a column for each layer of the model, a row for each level of a module."""
        harms = {
            f"{row.name} at {level:g}": harm
            for row in self.rows
            if not row.is_kind
            for level, harm in zip(self.levels, self.harm(row), strict=True)
            if harm is not None
        }
        harms = harms or {row.name: self.harm(row)[0] or 0.0 for row in self.rows}
        # Colours end where a twentieth is darker: a single place can cost more than all others together.
        finite = sorted(harm for harm in harms.values() if math.isfinite(harm))
        most = finite[int(0.95 * (len(finite) - 1))] if finite else 1.0
        title = f"{self.metric}: how much worse if one place is pruned"
        return figure_of_modules(harms, highest=max(most, 1e-12), title=title)

    def to_dict(self) -> dict[str, object]:
        """The report as JSON primitives."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SensitivityReport":
        """The inverse of `to_dict`.

        Raises:
            ValueError: if it is not that of a report.
        """
        require_sensitivity(values)
        try:
            rows = tuple(Sensitivity(**{**row, "values": tuple(row["values"])}) for row in values["rows"])
            return cls(**{**values, "levels": tuple(values["levels"]), "rows": rows})
        except TypeError as error:
            raise ValueError(f"this is not a sensitivity report ({error}).") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the report as JSON, which `layer_sparsity="@FILE"` of a config reads."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "SensitivityReport":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not a report.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (RecursionError, ValueError) as error:
            raise ValueError(f"{path} is not a sensitivity report ({error}).") from error
