"""The pictures of a study: metric against sparsity, metric against budget, and the trajectory of a run."""

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import cast

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from common.findings import Findings
from common.grid import Cell
from common.tables import deviation
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
        _against_sparsity(findings, cells).savefig(folder / f"sparsity-{name}.png", dpi=150)
        at_sparsity = {schedule: cell for (schedule, level), cell in cells.items() if level == sparsity}
        if at_sparsity:
            _against_budget(findings, at_sparsity, sparsity).savefig(folder / f"budget-{name}.png", dpi=150)
            best = findings.results[findings.best(cells, sparsity)]
            history = PruningHistory.from_dict(cast(dict[str, object], best["history"]))
            history.dense = best["dense_validation"]  # The callback of a cell cannot evaluate, and does not know it.
            history.plot(folder / f"trajectory-{name}.png")


def _against_sparsity(findings: Findings, cells: Mapping[tuple[str, float], Cell]) -> Figure:
    figure, panels = _figure(findings, cells.values(), "sparsity")
    if findings.trained_on is not None:
        trained_on = findings.mean(findings.trained_on)
        panels[0].axhline(trained_on, color="gray", linestyle=":", label=f"dense, {findings.budget} steps more")
    for marker, schedule in zip(itertools.cycle(MARKERS), dict.fromkeys(schedule for schedule, _ in cells)):
        mine = sorted((level, cell) for (other, level), cell in cells.items() if other == schedule)
        _line(panels, findings, [1 - level for level, _ in mine], [cell for _, cell in mine], marker, schedule)
    levels = sorted({level for _, level in cells})
    for axes in panels:
        axes.set_xscale("log")  # of the weights that are kept: equal distances are equal shares of the rest
        axes.invert_xaxis()
        axes.set_xticks([1 - level for level in levels], [f"{level:g}" for level in levels])
        axes.xaxis.set_minor_locator(NullLocator())
    _add_legend(figure, panels)
    return figure


def _against_budget(findings: Findings, cells: Mapping[str, Cell], sparsity: float) -> Figure:
    runs = {schedule: findings.over_budgets(cell) for schedule, cell in cells.items()}
    figure, panels = _figure(findings, itertools.chain(*runs.values()), f"steps, at sparsity {sparsity:g}")
    if findings.trained_on is not None:
        dense = findings.over_budgets(findings.trained_on)
        means = [findings.mean(cell) for cell in dense]
        panels[0].plot([cell.steps for cell in dense], means, color="gray", linestyle=":", label="dense, trained on")
    for marker, (schedule, mine) in zip(itertools.cycle(MARKERS), runs.items()):
        _line(panels, findings, [cell.steps for cell in mine], mine, marker, schedule)
    steps = sorted({cell.steps for mine in runs.values() for cell in mine})
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.set_xticks(steps, [str(n) for n in steps])
        axes.xaxis.set_minor_locator(NullLocator())
    _add_legend(figure, panels)
    return figure


def _figure(findings: Findings, cells: Iterable[Cell], xlabel: str) -> tuple[Figure, Sequence[Axes]]:
    """Axes for the metric, with the dense model as a line, and axes for what each seed has lost against its own."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    metric, lost = figure.subplots(1, 2)
    metric.set(xlabel=xlabel, ylabel=f"test {findings.metric}")
    metric.axhline(findings.mean(findings.chosen[0], "dense_test"), color="gray", linestyle="--", label="dense")
    gaps = [statistics.mean(findings.lost(cell)) for cell in cells]
    lost.set(xlabel=xlabel, ylabel=f"{findings.metric} lost against dense")
    # Losses of a perplexity span powers of ten; those of an accuracy may be none, but for rounding.
    if min(gaps) > max(gaps) / 10_000:
        lost.set(yscale="log", ylim=(min(gaps) / 2, None))
    for axes in (metric, lost):
        axes.grid(alpha=0.3)
    metric.set_title(findings.task, loc="left")
    return figure, (metric, lost)


def _line(
    panels: Sequence[Axes], findings: Findings, x: Sequence[float], cells: Sequence[Cell], marker: str, label: str
) -> None:
    """The mean over the seeds, and their standard deviation as a band."""
    for axes, of_seeds in zip(panels, (findings.over_seeds, findings.lost), strict=True):
        seeds = [of_seeds(cell) for cell in cells]
        means = [statistics.mean(values) for values in seeds]
        spreads = [deviation(values) for values in seeds]
        (line,) = axes.plot(x, means, marker=marker, markersize=5, label=label)
        low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
        if axes.get_yscale() == "log":
            low = [max(value, axes.get_ylim()[0]) for value in low]
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def _add_legend(figure: Figure, panels: Sequence[Axes]) -> None:
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
