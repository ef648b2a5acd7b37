"""Inspection: the zeros of saved models."""

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from transformers.utils.logging import tqdm

from ..reporting.reports import Counted, StructureSparsity, structure_rows
from ..reporting.tables import table
from ..structures.shrinking import find_removable
from .folders import SavedModel, Stored, names_in
from .opening import DAMAGED, open_empty

# What may come of building a model from a config that somebody else wrote.
_NOT_BUILT = (*DAMAGED, ImportError, OSError)
CHUNK = 2**20  # elements that are looked at together, few enough to stay in the cache
_PATTERNS = ((1, 4), (2, 8), (2, 4), (4, 8))  # each is implied by some of those before it, and by none behind it
_ALIGNED = 8  # rows that are looked at together at least, so that groups of them are whole
_ONES = 0x0101010101010101
_WITH_A_SIGN = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip
"""Those with a zero of either sign and no other number that has no other bits; others are converted."""
_INTEGERS: dict[int, type[np.unsignedinteger]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
"""Unsigned ones, by their number of bytes."""


class FoundPattern(NamedTuple):
    """N:M along a dimension of a tensor.

    Attributes:
        n: Most elements that are not zero in a group.
        m: Number of elements in a group.
        dim: The dimension.
        stride: Number of elements of the tensor between two of a group.
    """

    n: int
    m: int
    dim: int
    stride: int

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.dim == -1 else f"{self.n}:{self.m} (dim {self.dim})"

    def follows_from(self, other: "FoundPattern") -> bool:
        """Whether what has another pattern has this one."""
        return self.dim == other.dim and self.n >= other.n * max(1, self.m // other.m)

    def most(self, kept: np.ndarray) -> int:
        """The most elements that are not zero in a group of some rows."""
        if self.stride > 1:
            return int(kept.reshape(-1, self.m, self.stride).sum(1, dtype=np.uint8).max(initial=0))
        # A byte for each: their sum comes to stand in the highest. Elements of a group may be rows of one column.
        groups = kept.reshape(-1, self.m).view(_INTEGERS[self.m])
        return int((groups * _INTEGERS[self.m](_ONES >> 64 - 8 * self.m)).max(initial=0)) >> 8 * self.m - 8


@dataclass(frozen=True)
class TensorZeros(Counted):
    """The zeros of a tensor in a file.

    Attributes:
        name: Its name in the file.
        shape: Its shape.
        dtype: Its dtype, as torch writes it without "torch.".
        zeros: Number of zeros, negative ones included.
        total: Number of elements.
        bytes: What it takes in the file, compressed or not.
        patterns: The N:M patterns that all of it has along its last dimension, the sparsest first, and those along the
            inputs of what is no Linear: the first dimension of a matrix (of Conv1D), the second of a larger tensor.
        zero_rows: Number of indices of the first dimension at which all is zero.
        compressed: Whether the file leaves zeros out.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    zeros: int
    total: int
    bytes: int
    patterns: tuple[str, ...] = ()
    zero_rows: int = 0
    compressed: bool = False


@dataclass(frozen=True)
class FolderReport(Counted):
    """The zeros of a saved model. Prints as a table.

    Attributes:
        folder: Where it is.
        tensors: A row for each tensor.
        record: What `config.json` says that hf_prune has recorded: shapes of a model that was shrunk, and the like.
        structures: A row for the heads, neurons, channels or layers of each group, of the kinds of which all of some
            is zero; empty if there are none.
        structures_unknown: Why they were not looked for, though there are rows of zeros; None if they were.
    """

    folder: str
    tensors: tuple[TensorZeros, ...]
    record: Mapping[str, object] = field(default_factory=dict)
    structures: tuple[StructureSparsity, ...] = ()
    structures_unknown: str | None = None

    @property
    def zeros(self) -> int:
        """Number of zeros."""
        return sum(row.zeros for row in self.tensors)

    @property
    def total(self) -> int:
        """Number of elements."""
        return sum(row.total for row in self.tensors)

    @property
    def bytes(self) -> int:
        """What the tensors take in the files."""
        return sum(row.bytes for row in self.tensors)

    def to_dict(self) -> dict[str, object]:
        """The report as JSON primitives."""
        rows = [{**asdict(row), "shape": list(row.shape), "sparsity": row.sparsity} for row in self.tensors]
        return {
            "folder": self.folder,
            "zeros": self.zeros,
            "total": self.total,
            "sparsity": self.sparsity,
            "bytes": self.bytes,
            "shrunk": sorted(self.record.get("shapes", {})),  # type: ignore[call-overload]
            "tensors": rows,
            "structures": [{**asdict(row), "sparsity": row.sparsity} for row in self.structures],
            "structures_unknown": self.structures_unknown,
        }

    def rows(self) -> list[list[str]]:
        """The report as cells: a head, a row for each tensor, and one for all."""
        rows = [["tensor", "shape", "dtype", "zeros", "sparsity", "N:M", "zero rows", "MB"]]
        for row in self.tensors:
            shape, size = " x ".join(map(str, row.shape)), f"{row.bytes / 1e6:.3f}"
            found = [", ".join(row.patterns), f"{row.zero_rows:,}" if row.zero_rows else ""]
            rows.append([row.name, shape, row.dtype, f"{row.zeros:,}", f"{row.sparsity:.4f}", *found, size])
        sparsity, size = f"{self.sparsity:.4f}", f"{self.bytes / 1e6:.3f}"
        return [*rows, ["all", f"{self.total:,}", "", f"{self.zeros:,}", sparsity, "", "", size]]

    def __str__(self) -> str:
        rows = self.rows()
        text = table(rows, rules=(1, len(rows) - 1))
        if self.structures:
            text += "\n\n" + table(structure_rows(self.structures), rules=(1,))
        return "\n\n".join([text, *self.remarks()])

    def remarks(self) -> list[str]:
        """Sentences about what the tables do not show."""
        shapes, remarks = self.record.get("shapes"), []
        if shapes and isinstance(shapes, Mapping):
            remarks.append(
                f"The model was shrunk: {len(shapes)} tensors have shapes that no config of its family can say."
            )
        if self.structures_unknown is not None:
            remarks.append(
                f"There are rows of zeros. Whether whole structures are zero is not known: {self.structures_unknown}"
            )
        return remarks


def report_folder(folder: str | os.PathLike[str], *, show_progress: bool = False) -> FolderReport:
    """Counts the zeros of a saved model; a bar may show how far it is."""
    model = SavedModel(folder)
    shown = tqdm(model, unit="tensor", disable=not show_progress or None)  # None: only on a terminal
    rows = tuple(_count(name, model[name]) for name in shown)
    with_zero_rows = {row.name for row in rows if row.zero_rows}
    try:
        return FolderReport(str(folder), rows, model.record, *_structures(model, with_zero_rows))
    except _NOT_BUILT as error:  # Zeros are there whether or not they can be told from a model.
        return FolderReport(str(folder), rows, model.record, structures_unknown=f"{type(error).__name__}: {error}")


def _structures(model: SavedModel, with_zero_rows: set[str]) -> tuple[tuple[StructureSparsity, ...], str | None]:
    """The structures of a saved model, of the kinds of which some are zero, and why others are not known.

    Those that are zero have a row of zeros somewhere.
    """
    if not with_zero_rows:
        return (), None
    empty = open_empty(model.folder)
    structures, names = find_removable(empty), names_in(empty, model)
    rows, unknown = [], []
    for name, group in structures.items():
        in_files = [names.get(member.name) for member in group.members]
        zeros = 0
        if None in in_files:
            unknown.append(name)
        elif with_zero_rows.intersection(in_files):
            kept = torch.zeros(group.count, dtype=torch.bool)
            for member, file_name in zip(group.members, in_files, strict=True):  # One at a time in memory.
                masks = {member.name: model[str(file_name)].tensor != 0}
                kept |= replace(group, members=(member,)).kept_of(masks)
            zeros = group.count - int(kept.count_nonzero())
        rows.append(StructureSparsity(name, group.kind, zeros, group.count))
    kinds = {row.kind for row in rows if row.zeros}
    why = f"files put weights of {', '.join(unknown)} together that the model has apart." if unknown else None
    return tuple(row for row in rows if row.kind in kinds), why


def _count(name: str, stored: Stored) -> TensorZeros:
    tensor, size, compressed = stored
    width = math.prod(tensor.shape[1:])
    rows = _bits(tensor.reshape(-1, width) if tensor.numel() else tensor.reshape(0, 1))
    has_rows = tensor.ndim > 1 and bool(tensor.numel())
    # Elements that stand together in a group of N:M, and the number of elements between two of them.
    axis = 0 if tensor.ndim == 2 else 1
    strides = {-1: 1, axis: math.prod(tensor.shape[axis + 1 :])} if has_rows else {}
    possible = [
        FoundPattern(n, m, dim, strides[dim]) for dim in strides for n, m in _PATTERNS if tensor.shape[dim] % m == 0
    ]
    # The first rows tell almost as surely as all of them that there is no pattern.
    possible = _among(possible, _nonzero(rows[:_ALIGNED], *_room(rows[:_ALIGNED])))

    def look(some: np.ndarray) -> tuple[int, int, list[FoundPattern]]:
        zeros, zero_rows, left = 0, 0, possible
        step = max(_ALIGNED, CHUNK // max(width, 1) // _ALIGNED * _ALIGNED)
        room = _room(some[:step])  # Memory that is new each time would take longer than what is done in it.
        for start in range(0, len(some), step):
            kept = _nonzero(some[start : start + step], *room)
            count = int(np.count_nonzero(kept))
            zeros += kept.size - count
            if has_rows and count < kept.size:
                zero_rows += int((~kept.any(1)).sum())
            left = _among(left, kept)
        return zeros, zero_rows, left

    zeros = zero_rows = 0
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as threads:  # NumPy lets others compute meanwhile.
        each = max(1, -(-len(rows) // workers // _ALIGNED)) * _ALIGNED
        for some_zeros, some_rows, left in threads.map(look, (rows[i : i + each] for i in range(0, len(rows), each))):
            zeros, zero_rows = zeros + some_zeros, zero_rows + some_rows
            possible = [pattern for pattern in possible if pattern in left]
    patterns = tuple(map(str, possible)) if 0 < zeros < tensor.numel() else ()
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorZeros(name, tuple(tensor.shape), dtype, zeros, tensor.numel(), size, patterns, zero_rows, compressed)


def _bits(rows: torch.Tensor) -> np.ndarray:
    """Floating-point numbers as unsigned integers: NumPy knows no bfloat16, and counts integers fastest."""
    if not rows.is_floating_point():
        integers = rows.numpy()
        return integers.view(f"i{integers.itemsize}") if integers.dtype.kind == "u" else integers
    if rows.dtype not in _WITH_A_SIGN:
        rows = rows.float()
    return rows.contiguous().view(torch.uint8).numpy().view(_INTEGERS[rows.element_size()])


def _room(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Memory for what `_nonzero` does with so much."""
    return np.empty_like(bits), np.empty(bits.shape, bool)


def _nonzero(bits: np.ndarray, room: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Which numbers are not zero."""
    room, kept = room[: len(bits)], kept[: len(bits)]
    if bits.dtype.kind == "u":
        bits = np.left_shift(bits, 1, out=room)  # without the sign
    return np.not_equal(bits, 0, out=kept)


def _among(patterns: Sequence[FoundPattern], kept: np.ndarray) -> list[FoundPattern]:
    """Those that all of some rows have; what follows from another one is not looked for."""
    found: list[FoundPattern] = []
    for pattern in patterns:
        if any(pattern.follows_from(other) for other in found) or pattern.most(kept) <= pattern.n:
            found.append(pattern)
    return found
