"""Comparison: how two saved models differ."""

import os
from dataclasses import asdict, dataclass

import torch
from transformers.utils.logging import tqdm

from ..reporting.tables import table
from .folders import SavedModel
from .inspection import CHUNK


@dataclass(frozen=True)
class TensorChange:
    """How a tensor differs between two saved models.

    Attributes:
        name: Its name in the files.
        zeros: Number of zeros in the first and in the second.
        lost: Number of zeros of the first that are not zero in the second.
        gained: Number of zeros of the second that are not zero in the first.
        moved: Number of elements that are zero in neither and differ.
    """

    name: str
    zeros: tuple[int, int]
    lost: int
    gained: int
    moved: int


@dataclass(frozen=True)
class FolderChange:
    """How two saved models differ. Prints as a table.

    Attributes:
        tensors: A row for each tensor that both have.
        only: The names that only the first has, and those that only the second has.
    """

    tensors: tuple[TensorChange, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]

    @property
    def are_equal(self) -> bool:
        """Whether nothing differs."""
        return not any(self.only) and not any(row.lost or row.gained or row.moved for row in self.tensors)

    def to_dict(self) -> dict[str, object]:
        """The changes as JSON primitives."""
        return {
            "equal": self.are_equal,
            "only_in_first": list(self.only[0]),
            "only_in_second": list(self.only[1]),
            "tensors": [asdict(row) for row in self.tensors],
        }

    def __str__(self) -> str:
        rows = [["tensor", "zeros before", "after", "lost", "gained", "moved"]]
        counts = [(*row.zeros, row.lost, row.gained, row.moved) for row in self.tensors]
        for row, values in zip(self.tensors, counts, strict=True):
            rows.append([row.name, *(f"{value:,}" for value in values)])
        totals = [sum(values) for values in zip(*counts, strict=True)]
        rows.append(["all", *(f"{total:,}" for total in totals or [0] * 5)])
        text = table(rows, rules=(1, len(rows) - 1))
        for which, names in zip(("first", "second"), self.only, strict=True):
            if names:
                text += f"\nOnly in the {which}: {', '.join(names)}"
        return text


def compare_folders(
    first: str | os.PathLike[str], second: str | os.PathLike[str], *, show_progress: bool = False
) -> FolderChange:
    """Compares the tensors of two saved models, one at a time; a bar may show how far it is.

    Raises:
        ValueError: as `SavedModel` does, or if a tensor has another shape.
    """
    was, now = SavedModel(first), SavedModel(second)
    rows = []
    # With None, a bar is shown only on a terminal.
    for name in tqdm([name for name in was if name in now], unit="tensor", disable=not show_progress or None):
        a, b = was[name].tensor, now[name].tensor
        if a.shape != b.shape:
            raise ValueError(
                f"{name!r} has shape {list(a.shape)} in {first} and {list(b.shape)} in {second}; only models of the "
                "same shapes can be compared."
            )
        rows.append(_change(name, a, b))
    only = [tuple(name for name in one if name not in other) for one, other in ((was, now), (now, was))]
    return FolderChange(tuple(rows), (only[0], only[1]))


def _change(name: str, first: torch.Tensor, second: torch.Tensor) -> TensorChange:
    zeros, totals = [0, 0], [0, 0, 0]
    for a, b in zip(first.flatten().split(CHUNK), second.flatten().split(CHUNK), strict=True):
        was, now = a != 0, b != 0
        zeros[0] += len(a) - int(was.count_nonzero())
        zeros[1] += len(b) - int(now.count_nonzero())
        moved = was & now & (a != b) & ~(a.isnan() & b.isnan())
        for i, differs in enumerate((~was & now, was & ~now, moved)):
            totals[i] += int(differs.count_nonzero())
    return TensorChange(name, (zeros[0], zeros[1]), *totals)
