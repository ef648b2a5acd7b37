"""Pages: what is known of a saved model, as one file of HTML that a browser shows without anything else."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import asked_in
from ..reporting.history import HISTORY_NAME, PruningHistory
from ..reporting.plots import as_svg, figure_of_modules
from ..reporting.reports import structure_rows
from .inspection import FolderReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --quiet: #777; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.facts { display: flex; flex-wrap: wrap; gap: .8rem 2.4rem; padding: 0; margin: 1.2rem 0; }
.facts div { display: flex; flex-direction: column-reverse; }
.facts dt { color: var(--quiet); font-size: .85rem; }
.facts dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.total tbody tr:last-child { font-weight: 600; }
img { max-width: 100%; background: white; border-radius: 6px; }
pre { overflow-x: auto; padding: .8rem 1rem; border: 1px solid var(--line); border-radius: 6px; }
""".strip()


def page_of(name: str, report: FolderReport) -> str:
    """A page about a saved model: its zeros, and its rounds and its config where they were saved with it.

    It is HTML with its style and its pictures inside, and without scripts.
    """
    folder = Path(report.folder)
    facts = {
        "sparsity of all weights": f"{report.sparsity:.2%}",
        "zeros": f"{report.zeros:,}",
        "weights": f"{report.total:,}",
        "MB of files": f"{report.bytes / 1e6:,.1f}",
    }
    matrices = {
        row.name.removesuffix(".weight"): row.sparsity for row in report.tensors if len(row.shape) > 1 and row.total
    }
    if not matrices:
        raise ValueError(f"{folder} holds no matrices: there is nothing to show.")
    sections = []
    if (folder / HISTORY_NAME).is_file():
        history = PruningHistory.load(folder / HISTORY_NAME)
        facts |= {"rounds": f"{len(history)}"} if history else {}
        said = "".join(f"<p>{html.escape(text)}</p>" for text in (history.savings(), history.shortfall()) if text)
        if history:
            sections.append(("The run", _picture(history.figure(), "metric and sparsity over the steps of the run")))
            sections.append(("Rounds", _table(history.rows(), total=False) + said))
        elif said:
            sections.append(("Size", said))
    sections.append(("Layers", _picture(figure_of_modules(matrices), "sparsity of each matrix, by layer")))
    if report.structures:
        sections.append(("Structures", _table(structure_rows(report.structures), total=False)))
    if remarks := report.remarks():
        sections.append(("Remarks", "".join(f"<p>{html.escape(remark)}</p>" for remark in remarks)))
    if asked := asked_in(folder):
        sections.append(("Config", f"<p>Without defaults:</p><pre>{html.escape(asked)}</pre>"))
    sections.append(("Tensors", _table(report.rows())))
    shown = "".join(f"<div><dt>{key}</dt><dd>{value}</dd></div>" for key, value in facts.items())
    body = "\n".join(f"<section><h2>{title}</h2>\n{content}</section>" for title, content in sections)
    title = html.escape(name)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        f'<style>\n{_STYLE}\n</style>\n</head>\n<body>\n<h1>{title}</h1>\n<dl class="facts">{shown}</dl>\n{body}\n'
        "</body>\n</html>\n"
    )


def _picture(figure: "Figure", text: str) -> str:
    # As an image, so that the names inside of two of them cannot meet.
    data = base64.b64encode(as_svg(figure).encode()).decode()
    return f'<img alt="{text}" src="data:image/svg+xml;base64,{data}">'


def _table(rows: Sequence[Sequence[str]], total: bool = True) -> str:
    head, *body = [[html.escape(cell) for cell in row] for row in rows]
    lines = "\n".join(f"<tr><td>{'</td><td>'.join(cells)}</td></tr>" for cells in body)
    kind = " class=total" if total else ""
    return (
        f'<div class="table"><table{kind}><thead><tr><th>{"</th><th>".join(head)}</th></tr></thead>\n'
        f"<tbody>\n{lines}\n</tbody></table></div>"
    )
