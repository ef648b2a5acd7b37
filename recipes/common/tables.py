"""Tables in Markdown, of numbers that differ from seed to seed."""

import math
import statistics
from collections.abc import Mapping, Sequence


def markdown(corner: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> list[str]:
    """The lines of a table.

    Args:
        corner: What the rows are.
        columns: The heads of the other columns.
        rows: Head of a row → its entries.
    """
    lines = [f"| {' | '.join(row)} |" for row in ([corner, *columns], *([head, *rows[head]] for head in rows))]
    return [lines[0], "|---" * (1 + len(columns)) + "|", *lines[1:]]


def deviation(values: Sequence[float]) -> float:
    """The standard deviation over runs; 0 for a single one, or where one has diverged."""
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else 0.0


def spread(values: Sequence[float], seeds: int | None = None) -> str:
    """Mean and standard deviation over runs, and how many they are if there is not one for each seed."""
    if diverged := sum(not math.isfinite(value) for value in values):
        return f"diverged with {diverged} of {len(values)} runs"
    around = f" ± {deviation(values):.3f}" if len(values) > 1 else ""
    missing = f" ({len(values)} of {seeds} seeds)" if seeds and len(values) < seeds else ""
    return f"{statistics.mean(values):.3f}{around}{missing}"
