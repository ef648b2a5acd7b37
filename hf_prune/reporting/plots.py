"""Plots: figures of runs and of models, by matplotlib where that is installed."""

import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOT_NAME = "pruning.png"

Point = tuple[int, float]
"""A step, and a value at it."""

_LONGEST = 80  # characters of a name
_MOST_ROWS = 100  # that a picture shows
_MOST_WITH_NUMBERS = 16  # columns in which a number can be read


def can_plot() -> bool:
    """Whether there is something to draw with."""
    return find_spec("matplotlib") is not None


def require_matplotlib() -> None:
    """Requires something to draw with."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install matplotlib.") from error


def figure_of_run(
    metric: str,
    evaluations: Sequence[Point],
    *,
    dense: float | None,
    after_cuts: Sequence[Point],
    bests: Sequence[Point],
    sparsity: Sequence[Point],
    end: int,
) -> "Figure":
    """Metric and sparsity against the steps of a run.

    Args:
        metric: Its name.
        evaluations: Its values while training.
        dense: Its value before the first cut; None if nothing measured it.
        after_cuts: Its values right after cuts.
        bests: Its best value in each round.
        sparsity: What each cut reached.
        end: The last step.
    """
    figure = _figure(8, 5)
    axes = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    if dense is not None:
        axes[0].axhline(dense, color="gray", linestyle="--", label="dense")
    for points, label, style in (
        (evaluations, "while training", dict(color="C0", marker=".")),
        (after_cuts, "right after a cut", dict(color="C3", marker="v", linestyle="")),
        (bests, "best of a round", dict(color="C2", marker="*", markersize=10, linestyle="", zorder=3)),
    ):
        if points:
            axes[0].plot(*zip(*points, strict=True), label=label, **style)
    axes[0].set_ylabel(_printable(metric), parse_math=False)
    values = [value for _, value in (*evaluations, *after_cuts)] + ([] if dense is None else [dense])
    finite = [value for value in values if math.isfinite(value)]
    if finite and 0 < 20 * min(finite) < max(finite):  # On a logarithmic axis what is not positive would be lost.
        axes[0].set_yscale("log")
    if axes[0].get_legend_handles_labels()[0]:
        figure.legend(loc="outside upper center", ncols=4)
    end = max([end, 1, *(step for step, _ in evaluations)])
    axes[1].stairs(
        [0.0, *(s for _, s in sparsity)], [0, *(step for step, _ in sparsity), end], color="C1", baseline=None
    )
    axes[1].set(xlabel="step", ylabel="sparsity", ylim=(0, 1))
    for axis in axes:
        for step, _ in sparsity:
            axis.axvline(step, color="lightgray", linewidth=0.8, zorder=0)
    return figure


def figure_of_modules(
    values: Mapping[str, float], *, highest: float = 1.0, title: str = "sparsity by module"
) -> "Figure":
    """A value by module: a column for each layer, a row for each module that layers have.

    The first number in a name is that of the layer; modules without one have a row of one cell.

    Args:
        values: Module → its value; from 0 to `highest` they get darker.
        highest: Where colours end; what is above is as dark.
        title: What they are.
    """
    cells = {_row_and_column(_printable(name)): value for name, value in values.items()}
    rows, columns = list(dict.fromkeys(row for row, _ in cells)), sorted({column for _, column in cells})
    if len(rows) > _MOST_ROWS:
        title += f" (the first {_MOST_ROWS} of {len(rows)} rows)"
        rows = rows[:_MOST_ROWS]
        cells = {(row, column): value for (row, column), value in cells.items() if row in set(rows)}
    names = 0.09 * max([0, *map(len, rows)])  # inches
    figure = _figure(max(6.0, 1.5 + names + 0.45 * len(columns)), 1.6 + 0.3 * len(rows))
    axes = figure.subplots()
    nothing = float("nan")
    image = axes.imshow(
        [[cells.get((row, column), nothing) for column in columns] for row in rows] or [[nothing]],
        vmin=0, vmax=highest, cmap="Blues", aspect="auto",
    )  # fmt: skip
    axes.set_facecolor("whitesmoke")
    axes.set_yticks(range(len(rows)), rows, parse_math=False)  # Names are names, whatever is in them.
    every = max(1, len(columns) // 20)
    axes.set_xticks(range(0, len(columns), every), [str(column) for column in columns[::every]])
    axes.set(xlabel="layer", title=title)
    axes.set_xticks([i - 0.5 for i in range(1, len(columns))], minor=True)
    axes.set_yticks([i - 0.5 for i in range(1, len(rows))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if len(columns) <= _MOST_WITH_NUMBERS:
        for (row, column), value in cells.items():
            color = "white" if value > 0.6 * highest else "black"
            place = columns.index(column), rows.index(row)
            axes.text(
                *place,
                f"{value:.2f}" if highest == 1 else f"{value:.2g}",
                ha="center",
                va="center",
                fontsize=7,
                color=color,
            )
    figure.colorbar(image, ax=axes, pad=0.02, extend="max" if any(v > highest for v in cells.values()) else "neither")
    return figure


def _printable(name: str) -> str:
    """A name as an image can hold it: without control characters, and not too long."""
    name = name if len(name) <= _LONGEST else f"{name[: _LONGEST // 2]}…{name[-_LONGEST // 2 :]}"
    return "".join(character if character.isprintable() else "?" for character in name)


def _row_and_column(name: str) -> tuple[str, int]:
    """The module of a layer and the number of the layer."""
    found = re.search(r"(?<=\.)\d{1,9}(?=\.)", name)
    return (name, 0) if found is None else (f"{name[: found.start()]}*{name[found.end() :]}", int(found.group()))


class Drawn:
    """What can be drawn: its `figure` says how."""

    def figure(self) -> "Figure":
        """What `plot` draws."""
        raise NotImplementedError

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws into an image file.

        Args:
            path: Where to; the suffix says the format, such as `.png`.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
        """
        self.figure().savefig(path, dpi=150)


def as_svg(figure: "Figure") -> str:
    """A figure as SVG."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _figure(width: float, height: float) -> "Figure":
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
