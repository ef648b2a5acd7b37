"""What recoveries are compared: a run of each, and what they gave."""

import itertools
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict

from common.cells import Named
from common.tables import markdown, spread


@dataclass(frozen=True)
class Cell(Named):
    """One run.

    Attributes:
        level: How sparse the model is, as a number or N:M.
        trainable: What is trained, one of `TRAINABLE`.
        teacher: Whether the dense model teaches.
        rate: The learning rate, in units of that of the recipe.
        seed: Seed of the dense model, of the order of the data, and of what is drawn.
    """

    level: str
    trainable: str
    teacher: bool
    rate: float
    seed: int


class Result(TypedDict):
    """What a run gave.

    Keys:
        metric: Name of what follows.
        validation, test: The metric at the end of the run; of adapters, after they were merged.
        pruned_test, dense_test: The metric before the run, and before pruning.
        seconds: Wall-clock time of the training.
        trained: Number of trained parameters.
        peak_mb: Memory that the training took at its highest, beyond what was there.
    """

    metric: str
    validation: float
    test: float
    pruned_test: float
    dense_test: float
    seconds: float
    trained: int
    peak_mb: float


def share(lost: float, found: float, best: float) -> float:
    """What part of the way from `lost` to `best` leads to `found`: 0 at `lost`, 1 at `best`, NaN on no way at all."""
    return (lost - found) / (lost - best) if lost != best else math.nan


def table(level: str, results: Mapping[Cell, Result]) -> str:
    """The ways of a level, a row for each, as Markdown.

    Shares are of what training everything recovers alone, and left out where that loses more than pruning did.
    """
    own = {cell: result for cell, result in results.items() if cell.level == level}
    if not own:
        return f"{level}: all runs have failed."
    full = {
        cell.seed: result["test"] for cell, result in own.items() if (cell.trainable, cell.teacher) == ("full", False)
    }
    rows = {}
    for (trainable, teacher), group in itertools.groupby(own, lambda cell: (cell.trainable, cell.teacher)):
        cells = list(group)
        found = [own[cell] for cell in cells]
        shares = [
            share(result["pruned_test"], result["test"], full[cell.seed])
            for cell, result in zip(cells, found, strict=True)
            if cell.seed in full
        ]
        recovers = all(
            (full[cell.seed] - result["pruned_test"]) * (result["dense_test"] - result["pruned_test"]) > 0
            for cell, result in zip(cells, found, strict=True)
            if cell.seed in full
        )
        rows[f"{trainable}, teacher" if teacher else trainable] = [
            spread([result["test"] for result in found]),
            f"{statistics.mean(shares):.3f}" if shares and recovers else "",
            f"{statistics.mean(result['seconds'] for result in found):.1f}",
            f"{found[0]['trained']:,}",
            f"{statistics.median(result['peak_mb'] for result in found):.0f}",
            f"{cells[0].rate:g}",
        ]
    once = {cell.seed: result for cell, result in own.items()}.values()
    dense, pruned = (spread([result[key] for result in once]) for key in ("dense_test", "pruned_test"))
    columns = [f"test {next(iter(once))['metric']}", "share of full", "seconds", "trained", "peak MB", "rate"]
    return "\n".join([f"{level}: {dense} dense, {pruned} pruned.", "", *markdown("trained", columns, rows)])
