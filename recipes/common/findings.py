"""What a study found: the choice on validation, tables with what test says, and advice."""

import csv
import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.grid import DENSE, Cell, Result
from common.tables import deviation, markdown, spread

Value = Literal["validation", "test", "dense_validation", "dense_test"]


def choose(results: Mapping[Cell, Result], greater_is_better: bool, *, each_variant: bool = False) -> list[Cell]:
    """The cell with the best validation metric for each schedule, sparsity, criterion and granularity.

    Args:
        results: Cells of one seed and budget.
        greater_is_better: Which way the metric improves.
        each_variant: Whether one is chosen for each variant too.

    Returns:
        The cells, in the order in which the first of each kind came.
    """
    groups: dict[Cell, list[Cell]] = {}
    for cell in results:
        kind = dataclasses.replace(cell, learning_rate=0, variant=cell.variant if each_variant else "")
        groups.setdefault(kind, []).append(cell)
    return [
        max(cells, key=lambda cell: rank(results[cell]["validation"], greater_is_better)) for cells in groups.values()
    ]


def rank(value: float, greater_is_better: bool) -> float:
    """Higher is better; a run that diverged is the worst."""
    return -math.inf if math.isnan(value) else value if greater_is_better else -value


@dataclass
class Findings:
    """Results of a study.

    Attributes:
        task: Name of the task.
        budget: Steps of each run that is compared.
        chosen: The cells of the first seed that were chosen on validation.
        results: All cells that did not fail.
        greater_is_better: Which way the metric improves.
    """

    task: str
    budget: int
    chosen: Sequence[Cell]
    results: Mapping[Cell, Result]
    greater_is_better: bool

    @property
    def metric(self) -> str:
        """Name of the metric."""
        return next(iter(self.results.values()))["metric"]

    @property
    def trained_on(self) -> Cell | None:
        """The chosen cell of the dense model that was trained on; None if all of them failed."""
        return next((cell for cell in self.chosen if cell.schedule == DENSE), None)

    @property
    def seeds(self) -> int:
        """Number of seeds with which each chosen cell was run."""
        return len({cell.seed for cell in self.results})

    def over_seeds(self, cell: Cell, value: Value = "test") -> list[float]:
        """A value of a cell for each seed that it was run with and did not fail."""
        alike = [other for other in self.results if dataclasses.replace(other, seed=cell.seed) == cell]
        return [self.results[other][value] for other in sorted(alike, key=lambda other: other.seed)]

    def mean(self, cell: Cell, value: Value = "test") -> float:
        """The mean over the seeds."""
        return statistics.mean(self.over_seeds(cell, value))

    def lost(self, cell: Cell) -> list[float]:
        """By how much the dense model of each seed is better on test."""
        sign = 1 if self.greater_is_better else -1
        pairs = zip(self.over_seeds(cell, "dense_test"), self.over_seeds(cell), strict=True)
        return [sign * (dense - value) for dense, value in pairs]

    def over_budgets(self, cell: Cell) -> list[Cell]:
        """The same cell for each number of steps that it was run with, fewest first."""
        alike = {dataclasses.replace(other, seed=cell.seed) for other in self.results
                 if dataclasses.replace(other, seed=cell.seed, steps=cell.steps) == cell}  # fmt: skip
        return sorted(alike, key=lambda other: other.steps)

    def kinds(self) -> list[tuple[str, str]]:
        """Criterion and granularity of each table."""
        return list(dict.fromkeys((c.criterion, c.granularity) for c in self.chosen if c.schedule != DENSE))

    def of_kind(self, kind: tuple[str, str]) -> dict[tuple[str, float], Cell]:
        """Schedule and sparsity to the chosen cell."""
        return {(c.schedule, c.sparsity): c for c in self.chosen if (c.criterion, c.granularity) == kind}

    def of_variants(self, kind: tuple[str, str]) -> dict[tuple[str, float], Cell]:
        """Schedule with variant and sparsity to the cell with the learning rate that validation chose."""
        ours = (*kind, self.budget, self.chosen[0].seed)
        first = {c: r for c, r in self.results.items() if (c.criterion, c.granularity, c.steps, c.seed) == ours}
        cells = choose(first, self.greater_is_better, each_variant=True)
        return {(", ".join(filter(None, (c.schedule, c.variant))), c.sparsity): c for c in cells}

    def best(self, cells: Mapping[tuple[str, float], Cell], sparsity: float) -> Cell:
        """The cell with the best mean on validation."""
        at_sparsity = [cell for (_, level), cell in cells.items() if level == sparsity]
        return max(at_sparsity, key=lambda cell: rank(self.mean(cell, "validation"), self.greater_is_better))

    def tables(self) -> str:
        """Markdown: test over the seeds, by schedule and sparsity, for each criterion and granularity."""
        lines = [f"## {self.task}: test {self.metric} after {self.budget} steps", ""]
        lines.append(f"Dense: {spread(self.over_seeds(self.chosen[0], 'dense_test'))}.")
        if self.trained_on is not None:
            lines.append(
                f"Dense, trained on for {self.budget} steps: {spread(self.over_seeds(self.trained_on))} "
                f"(learning rate {self.trained_on.learning_rate:g})."
            )
        for kind in self.kinds():
            cells = self.of_kind(kind)
            lines += ["", f"### {', '.join(kind)}", ""]
            lines += _table(cells, lambda cell: spread(self.over_seeds(cell), self.seeds))
            lines += ["", "Variant and learning rate that validation chose:", ""]
            lines += _table(cells, _choice)
            lines += ["", f"Validation {self.metric} of each variant, with its best learning rate:", ""]
            lines += _table(self.of_variants(kind), lambda cell: spread(self.over_seeds(cell, "validation")))
        return "\n".join(lines)

    def advice(self) -> str:
        """Which schedule to take at each sparsity, and what it gains over one shot."""
        lines = []
        for kind in self.kinds():
            cells = self.of_kind(kind)
            for sparsity in sorted({level for _, level in cells}):
                best, one_shot = self.best(cells, sparsity), cells.get(("one_shot", sparsity))
                line = f"{', '.join(kind)} at {sparsity:g}: {best.schedule} ({_choice(best)})"
                line += f", {spread(self.over_seeds(best))}"
                if one_shot is not None and one_shot != best:
                    line += f"; one_shot {spread(self.over_seeds(one_shot))}, {self._gain(one_shot, best)}"
                lines.append(f"{line}.")
        return "\n".join(lines)

    def _gain(self, one_shot: Cell, best: Cell) -> str:
        """How much of what one shot loses the best cell makes good, where seeds differ less."""
        sign = 1 if self.greater_is_better else -1
        gain = sign * (self.mean(best) - self.mean(one_shot))
        if not math.isfinite(self.mean(one_shot)):
            return "to be left alone"
        if abs(gain) <= max(deviation(self.over_seeds(cell)) for cell in (one_shot, best)):
            return "no further away than one seed from another"
        if gain < 0:
            return "which is ahead on test, though not on validation"
        references = {"dense": self.mean(one_shot, "dense_test")}
        if self.trained_on is not None:
            references["dense trained on"] = self.mean(self.trained_on)
        lost = {name: sign * (value - self.mean(one_shot)) for name, value in references.items()}
        good = [f"{min(gain / loss, 1):.0%} against {name}" for name, loss in lost.items() if loss > 0]
        return f"whose loss it makes good by {' and '.join(good)}" if good else "which has lost nothing"

    def save(self, folder: Path) -> None:
        """Writes results.csv, one row a cell, and tables.md."""
        rows = [{**dataclasses.asdict(cell), **result} for cell, result in self.results.items()]
        names = [name for name in rows[0] if name != "history"]
        with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        (folder / "tables.md").write_text(f"{self.tables()}\n\n{self.advice()}\n", encoding="utf-8")


def _choice(cell: Cell) -> str:
    return f"{cell.variant}, {cell.learning_rate:g}" if cell.variant else f"{cell.learning_rate:g}"


def _table(cells: Mapping[tuple[str, float], Cell], show: Callable[[Cell], str]) -> list[str]:
    """A row for each schedule and a column for each sparsity."""
    levels = sorted({level for _, level in cells})
    rows = {
        schedule: ["" if (cell := cells.get((schedule, level))) is None else show(cell) for level in levels]
        for schedule, _ in cells
    }
    return markdown("sparsity", [str(level) for level in levels], rows)
