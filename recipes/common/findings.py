"""What a study found: the choice on validation, tables with what test says, and advice."""

import csv
import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.cells import TRAINED_ON, Cell, Result


def choose(results: Mapping[Cell, Result], greater_is_better: bool) -> list[Cell]:
    """For each schedule, sparsity, criterion and granularity, the cell with the best validation metric."""
    best: dict[tuple[object, ...], Cell] = {}
    for cell, result in results.items():
        key = (cell.schedule, cell.sparsity, cell.criterion, cell.granularity)
        value, other = result["validation"], results[best[key]]["validation"] if key in best else None
        if other is None or (value > other if greater_is_better else value < other):
            best[key] = cell
    return list(best.values())


@dataclass
class Findings:
    """Results of a study.

    Attributes:
        task: Its name.
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
        """Its name."""
        return str(next(iter(self.results.values()))["metric"])

    def over_seeds(self, cell: Cell, value: str = "test") -> list[float]:
        """A value of a cell for each seed that it was run with."""
        alike = [other for other in self.results if dataclasses.replace(other, seed=cell.seed) == cell]
        return [float(self.results[other][value]) for other in sorted(alike, key=lambda other: other.seed)]

    def kinds(self) -> list[tuple[str, str]]:
        """Criterion and granularity of each table."""
        return list(dict.fromkeys((c.criterion, c.granularity) for c in self.chosen if c.schedule != TRAINED_ON))

    def of_kind(self, kind: tuple[str, str]) -> dict[tuple[str, float], Cell]:
        """Schedule and sparsity to the chosen cell."""
        return {(c.schedule, c.sparsity): c for c in self.chosen if (c.criterion, c.granularity) == kind}

    def best_schedule(self, cells: Mapping[tuple[str, float], Cell], sparsity: float) -> str:
        """The schedule with the best mean on validation over the seeds."""
        means = {
            schedule: statistics.mean(self.over_seeds(cell, "validation"))
            for (schedule, level), cell in cells.items()
            if level == sparsity
        }
        return (max if self.greater_is_better else min)(means, key=lambda schedule: means[schedule])

    def tables(self) -> str:
        """Markdown: test over the seeds, by schedule and sparsity, for each criterion and granularity."""
        trained_on = [cell for cell in self.chosen if cell.schedule == TRAINED_ON]
        lines = [f"## {self.task}: test {self.metric} after {self.budget} steps", ""]
        any_cell = next(iter(self.chosen))
        lines.append(f"Dense: {_spread(self.over_seeds(any_cell, 'dense_test'))}.")
        for cell in trained_on:
            lines.append(
                f"Dense, trained on for {cell.steps} steps: {_spread(self.over_seeds(cell))} "
                f"(learning rate {cell.learning_rate:g})."
            )
        for kind in self.kinds():
            cells = self.of_kind(kind)
            lines += ["", f"### {', '.join(kind)}", ""]
            lines += _markdown(cells, lambda cell: _spread(self.over_seeds(cell)))
            lines += ["", "Split of the budget and learning rate that validation chose:", ""]
            lines += _markdown(cells, _choice)
        return "\n".join(lines)

    def advice(self) -> str:
        """Which schedule to take at each sparsity, and how firm that is."""
        lines = []
        for kind in self.kinds():
            cells = self.of_kind(kind)
            for sparsity in sorted({level for _, level in cells}):
                schedule = self.best_schedule(cells, sparsity)
                cell, one_shot = cells[schedule, sparsity], cells.get(("one_shot", sparsity))
                line = f"{', '.join(kind)} at {sparsity:g}: {schedule} ({_choice(cell)})"
                line += f", {_spread(self.over_seeds(cell))}"
                if one_shot not in (None, cell):
                    line += (
                        f"; one_shot {_spread(self.over_seeds(one_shot))}, "
                        f"of whose loss it recovers {self._recovered(one_shot, cell):.0%}"
                    )
                lines.append(line + ".")
        return "\n".join(lines)

    def _recovered(self, one_shot: Cell, best: Cell) -> float:
        """The part of what one shot loses against dense that another cell does not lose."""
        dense, shot, other = (
            statistics.mean(values)
            for values in (self.over_seeds(one_shot, "dense_test"), self.over_seeds(one_shot), self.over_seeds(best))
        )
        return (shot - other) / (shot - dense) if shot != dense else 0.0

    def save(self, folder: Path) -> None:
        """Writes results.csv, one row a cell, and tables.md."""
        rows = [{**dataclasses.asdict(cell), **result} for cell, result in self.results.items()]
        names = [name for name in rows[0] if name != "history"]
        with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        (folder / "tables.md").write_text(f"{self.tables()}\n\n{self.advice()}\n", encoding="utf-8")


def _spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def _choice(cell: Cell) -> str:
    return f"{cell.split}, {cell.learning_rate:g}" if cell.split else f"{cell.learning_rate:g}"


def _markdown(cells: Mapping[tuple[str, float], Cell], show: Callable[[Cell], str]) -> list[str]:
    """A table with a row for each schedule and a column for each sparsity."""
    levels = sorted({level for _, level in cells})
    rows = [["sparsity", *map(str, levels)]]
    for schedule in dict.fromkeys(schedule for schedule, _ in cells):
        mine = [cells.get((schedule, level)) for level in levels]
        rows.append([schedule, *("" if cell is None else show(cell) for cell in mine)])
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return [head, "|---" * len(rows[0]) + "|", *body]
