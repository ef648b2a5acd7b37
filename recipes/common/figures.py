"""The pictures of a study: metric against sparsity, metric against budget, and the trajectory of a run."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from common.cells import Cell
from common.findings import Findings
from hf_prune import PruningHistory

MARKERS = "osD^vP*X"


def draw(findings: Findings, sparsity: float, folder: Path) -> None:
    """Draws all pictures of a study into a folder.

    Args:
        findings: What was found.
        sparsity: The one at which the budget was varied.
        folder: Where to.
    """
    for kind in findings.kinds():
        cells = findings.of_kind(kind)
        name = "-".join(kind).replace(":", "_")
        _against_sparsity(findings, cells).savefig(folder / f"sparsity-{name}.png", dpi=200)
        at_sparsity = {schedule: cell for (schedule, level), cell in cells.items() if level == sparsity}
        if at_sparsity:
            _against_budget(findings, at_sparsity, sparsity).savefig(folder / f"budget-{name}.png", dpi=200)
            history = findings.results[findings.best(cells, sparsity)]["history"]
            PruningHistory.from_dict(history or {}).plot(folder / f"trajectory-{name}.png")


def _against_sparsity(findings: Findings, cells: Mapping[tuple[str, float], Cell]) -> Figure:
    figure, axes = _figure(findings, "sparsity")
    if findings.trained_on is not None:
        axes.axhline(findings.mean(findings.trained_on), color="gray", linestyle=":", label="dense, trained on")
    for marker, schedule in zip(itertools.cycle(MARKERS), dict.fromkeys(schedule for schedule, _ in cells)):
        mine = sorted((level, cell) for (other, level), cell in cells.items() if other == schedule)
        _line(axes, findings, [1 - level for level, _ in mine], [cell for _, cell in mine], marker, schedule)
    levels = sorted({level for _, level in cells})
    axes.set_xscale("log")  # of the weights that are kept: equal distances are equal shares of the rest
    axes.invert_xaxis()
    axes.set_xticks([1 - level for level in levels], [f"{level:g}" for level in levels])
    axes.xaxis.set_minor_locator(NullLocator())
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def _against_budget(findings: Findings, cells: Mapping[str, Cell], sparsity: float) -> Figure:
    figure, axes = _figure(findings, f"steps, at sparsity {sparsity:g}")
    lines = dict(cells)
    if findings.trained_on is not None:
        lines["dense, trained on"] = findings.trained_on
    steps: set[int] = set()
    for marker, (label, cell) in zip(itertools.cycle(MARKERS), lines.items()):
        runs = findings.over_budgets(cell)
        steps |= {run.steps for run in runs}
        _line(axes, findings, [run.steps for run in runs], runs, marker, label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(steps), [str(n) for n in sorted(steps)])
    axes.xaxis.set_minor_locator(NullLocator())
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def _figure(findings: Findings, xlabel: str) -> tuple[Figure, Axes]:
    """Axes with the dense model as a line."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    values = [findings.mean(cell) for cell in findings.chosen]
    # Losses of a perplexity grow as powers; accuracies do not.
    scale = "log" if min(values) > 0 and max(values) > 3 * min(values) else "linear"
    axes.set(xlabel=xlabel, ylabel=f"test {findings.metric}", title=findings.task, yscale=scale)
    axes.axhline(findings.mean(findings.chosen[0], "dense_test"), color="gray", linestyle="--", label="dense")
    axes.grid(alpha=0.3)
    return figure, axes


def _line(axes: Axes, findings: Findings, x: Sequence[float], cells: Sequence[Cell], marker: str, label: str) -> None:
    """The mean over the seeds, and their standard deviation as a band."""
    seeds = [findings.over_seeds(cell) for cell in cells]
    means = [statistics.mean(values) for values in seeds]
    spreads = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in seeds]
    (line,) = axes.plot(x, means, marker=marker, markersize=5, label=label)
    low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
