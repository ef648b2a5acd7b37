"""The pictures of a study: metric against sparsity, metric against budget, and the trajectory of a run."""

import dataclasses
import statistics
from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from common.cells import TRAINED_ON, Cell
from common.findings import Findings
from hf_prune import PruningHistory

MARKERS = "osD^vP*X"


def draw(findings: Findings, level: float, folder: Path) -> None:
    """Draws all pictures of a study into a folder.

    Args:
        findings: What was found.
        level: The sparsity at which the budget was varied.
        folder: Where to.
    """
    for kind in findings.kinds():
        cells = findings.of_kind(kind)
        name = "-".join(kind).replace(":", "_")
        _save(_against_sparsity(findings, cells), folder / f"sparsity-{name}.png")
        at_level = {schedule: cell for (schedule, sparsity), cell in cells.items() if sparsity == level}
        if at_level:
            _save(_against_budget(findings, at_level, level), folder / f"budget-{name}.png")
            cell = at_level[findings.best_schedule(cells, level)]
            history = PruningHistory.from_dict(findings.results[cell]["history"])
            history.plot(folder / f"trajectory-{name}.png")


def _against_sparsity(findings: Findings, cells: Mapping[tuple[str, float], Cell]) -> Figure:
    figure, axes = _figure(findings, "sparsity")
    for marker, schedule in zip(MARKERS, dict.fromkeys(schedule for schedule, _ in cells), strict=False):
        mine = sorted((level, cell) for (other, level), cell in cells.items() if other == schedule)
        _line(axes, findings, [1 - level for level, _ in mine], [cell for _, cell in mine], marker, schedule)
    levels = sorted({level for _, level in cells})
    axes.set_xscale("log")  # of the weights that are kept: equal distances are equal shares of the rest
    axes.invert_xaxis()
    axes.set_xticks([1 - level for level in levels], [f"{level:g}" for level in levels])
    axes.xaxis.set_minor_locator(NullLocator())
    _legend(figure)
    return figure


def _against_budget(findings: Findings, cells: Mapping[str, Cell], level: float) -> Figure:
    figure, axes = _figure(findings, f"steps after the first cut, at sparsity {level:g}")
    for marker, (schedule, cell) in zip(MARKERS, cells.items(), strict=False):
        alike = {other.steps: dataclasses.replace(other, seed=cell.seed) for other in findings.results
                 if dataclasses.replace(other, steps=cell.steps, seed=cell.seed) == cell}  # fmt: skip
        steps = sorted(alike)
        _line(axes, findings, steps, [alike[n] for n in steps], marker, schedule)
    axes.set_xscale("log", base=2)
    axes.set_xticks(steps, [str(n) for n in steps])
    axes.xaxis.set_minor_locator(NullLocator())
    _legend(figure)
    return figure


def _figure(findings: Findings, xlabel: str) -> tuple[Figure, Axes]:
    """Axes with the dense model and the dense model trained on as lines."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=f"test {findings.metric}", title=findings.task)
    dense = statistics.mean(findings.over_seeds(next(iter(findings.chosen)), "dense_test"))
    axes.axhline(dense, color="gray", linestyle="--", label="dense")
    for cell in findings.chosen:
        if cell.schedule == TRAINED_ON:
            value = statistics.mean(findings.over_seeds(cell))
            axes.axhline(value, color="gray", linestyle=":", label="dense, trained on")
    axes.grid(alpha=0.3)
    return figure, axes


def _line(axes: Axes, findings: Findings, x: list, cells: list[Cell], marker: str, label: str) -> None:
    """The mean over the seeds, and their standard deviation as a band."""
    seeds = [findings.over_seeds(cell) for cell in cells]
    means = [statistics.mean(values) for values in seeds]
    spreads = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in seeds]
    (line,) = axes.plot(x, means, marker=marker, markersize=5, label=label)
    low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def _legend(figure: Figure) -> None:
    figure.legend(loc="outside right upper", frameon=False)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=200)
