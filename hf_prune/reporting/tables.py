"""Tables, as text."""

from collections.abc import Iterable, Sequence


def table(rows: Sequence[Sequence[str]], rules: Iterable[int]) -> str:
    """Aligns rows of cells, the first column left and the others right, with rules before the given rows."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    for i in sorted(rules, reverse=True):
        lines.insert(i, "-" * len(lines[0]))
    return "\n".join(lines)


def number(value: float | None) -> str:
    """A measured value in a cell; nothing for None."""
    return "" if value is None else f"{value:.4g}" if abs(value) >= 1000 else f"{value:.4f}"
