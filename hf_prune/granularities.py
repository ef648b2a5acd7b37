"""Granularities: what is removed together.

The set is closed, a union of four records, because everything that reads a mask (hardware, reports, conversions) has
to understand each case.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .selection.lowest import drop_lowest_of_each
from .weights.targets import Target


@dataclass(frozen=True)
class Unstructured:
    """Each weight by itself."""

    group_size = 1

    def shape_of_groups(self, target: Target) -> torch.Size:
        """The shape of what there is one of for each group."""
        return target.weight.shape

    def check(self, targets: Iterable[Target]) -> None:
        """Any shape will do."""

    def pool(self, scores: torch.Tensor, target: Target) -> torch.Tensor:
        """Scores of the weights → scores of the groups: the same."""
        return scores

    def pool_mask(self, mask: torch.Tensor, target: Target) -> torch.Tensor:
        """Mask of the weights → mask of the groups: the same."""
        return mask

    def spread(self, mask: torch.Tensor, target: Target) -> torch.Tensor:
        """Mask of the groups → mask of the weights: the same."""
        return mask

    def to_rows(self, values: torch.Tensor, target: Target) -> torch.Tensor:
        """Values of the groups → `[rows, groups of a row]`: a row is an output, and all that it is computed from."""
        return target.to_rows(values).flatten(0, 1)

    def from_rows(self, rows: torch.Tensor, target: Target) -> torch.Tensor:
        """The inverse of `to_rows`."""
        return target.from_rows(rows).contiguous()


@dataclass(frozen=True)
class Block:
    """Blocks of `rows` outputs × `columns` inputs.

    The inputs of a convolution are its channels, so that a block lies at one position of the kernel.
    """

    rows: int
    columns: int

    @property
    def group_size(self) -> int:
        """Weights in a block."""
        return self.rows * self.columns

    def shape_of_groups(self, target: Target) -> torch.Size:
        """The shape of what there is one of for each group."""
        rows = target.weight.numel() // target.in_features
        return torch.Size([rows // self.rows, target.in_features // self.columns])

    def check(self, targets: Iterable[Target]) -> None:
        """Requires that blocks tile every target.

        Raises:
            ValueError: naming each module that they do not tile.
        """
        bad = [t for t in targets if t.out_features % self.rows or t.in_features % self.columns]
        if bad:
            shapes = ", ".join(f"{t.module!r} is {t.out_features} x {t.in_features}" for t in bad)
            raise ValueError(
                f"block:{self.rows}x{self.columns} needs out_features divisible by {self.rows} and in_features "
                f"divisible by {self.columns}; {shapes}. Add to exclude_modules, or choose another block."
            )

    def pool(self, scores: torch.Tensor, target: Target) -> torch.Tensor:
        """Scores of the weights → `[rows / R, columns / C]` sums over blocks, in float32 or better."""
        return self._blocks(scores, target).sum((1, 3), dtype=torch.promote_types(scores.dtype, torch.float32))

    def pool_mask(self, mask: torch.Tensor, target: Target) -> torch.Tensor:
        """Mask of the weights → `[rows / R, columns / C]` mask of the blocks.

        Raises:
            ValueError: if a block is masked in part.
        """
        blocks = self._blocks(mask, target)
        kept = blocks.any(3).any(1)
        if not torch.equal(kept, blocks.all(3).all(1)):
            raise ValueError(
                f"the zeros of {target.module!r} are not whole blocks of {self.rows}x{self.columns}. "
                "Start without hold_zeros, or choose another granularity."
            )
        return kept

    def spread(self, mask: torch.Tensor, target: Target) -> torch.Tensor:
        """Mask of the blocks → mask of the weights."""
        matrix = mask.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)
        return target.from_matrix(matrix).contiguous()

    def to_rows(self, values: torch.Tensor, target: Target) -> torch.Tensor:
        """Values of the blocks → the same: a row of blocks holds `R` outputs (at one position of a kernel)."""
        return values

    def from_rows(self, rows: torch.Tensor, target: Target) -> torch.Tensor:
        """The inverse of `to_rows`."""
        return rows

    def _blocks(self, values: torch.Tensor, target: Target) -> torch.Tensor:
        matrix = target.to_matrix(values)
        return matrix.reshape(len(matrix) // self.rows, self.rows, -1, self.columns)


@dataclass(frozen=True)
class Pattern:
    """`n` weights kept of every `m` along the input dimension; 2:4 is what sparse tensor cores compute with."""

    n: int
    m: int

    def check(self, targets: Iterable[Target]) -> None:
        """Requires that groups of `m` tile the input dimension of every target.

        Raises:
            ValueError: naming each module where they do not.
        """
        bad = [target for target in targets if target.in_features % self.m]
        if bad:
            widths = ", ".join(f"{target.module!r} has {target.in_features}" for target in bad)
            raise ValueError(
                f"{self.n}:{self.m} needs in_features divisible by {self.m}; {widths}. Add to exclude_modules."
            )

    def keep(self, scores: torch.Tensor, kept: torch.Tensor | None, target: Target) -> torch.Tensor:
        """The mask that keeps the `n` best of each group; ties keep the last by position.

        Args:
            scores: Of the weight's shape.
            kept: Mask of the weight's shape that must not grow, or None.
            target: The weight's target.

        Returns:
            Bool mask of the weight's shape.

        Raises:
            ValueError: if a score is NaN, or `kept` holds more than `m − n` zeros of a group already.
        """
        if kept is not None:
            self.require_room(kept, target)
        alive = None if kept is None else target.to_matrix(kept).reshape(-1, self.m)
        groups = target.to_matrix(scores).reshape(-1, self.m)
        mask = drop_lowest_of_each(target.name, groups, self.m - self.n, alive)
        return target.from_matrix(mask).contiguous()

    def at(self, sparsity: float) -> "Pattern":
        """The pattern of as large groups that is nearest to a sparsity."""
        return Pattern(self.m - round(sparsity * self.m), self.m)

    def require_room(self, kept: torch.Tensor, target: Target) -> None:
        """Requires that each group of a mask keeps at least `n`.

        Raises:
            ValueError: if one does not.
        """
        if (target.to_matrix(kept).reshape(-1, self.m).sum(1) < self.n).any():
            raise ValueError(
                f"{target.module!r} has groups of {self.m} with more than {self.m - self.n} zeros already; "
                f"they cannot become {self.n}:{self.m}. Start without hold_zeros."
            )


@dataclass(frozen=True)
class Structural:
    """Whole structures: all that belongs to an attention head, a neuron, a channel or a layer.

    Which weights these are, `hf_prune.structures` knows.
    """

    kinds: tuple[str, ...]

    def check(self, targets: Iterable[Target]) -> None:
        """Any shape will do."""


Granularity = Unstructured | Block | Pattern | Structural
STRUCTURES = ("head", "neuron", "head+neuron", "channel", "layer")


def parse(text: str) -> Granularity:
    """Reads a granularity as a config spells it.

    Args:
        text: `unstructured`, `N:M` such as `2:4`, `block:RxC` such as `block:4x4`, or one of `STRUCTURES`.

    Returns:
        The record.

    Raises:
        ValueError: if it is none of these, or `N:M` without `0 < N < M`, or a block without positive sides.

    Example:
        >>> parse("2:4"), parse("block:4x8")
        (Pattern(n=2, m=4), Block(rows=4, columns=8))
    """
    if text == "unstructured":
        return Unstructured()
    if text in STRUCTURES:
        return Structural(tuple(text.split("+")))
    if found := re.fullmatch(r"(\d+):(\d+)", text):
        n, m = map(int, found.groups())
        if not 0 < n < m:
            raise ValueError(f"granularity N:M keeps N of every M and needs 0 < N < M, got {text!r}.")
        return Pattern(n, m)
    if found := re.fullmatch(r"block:(\d+)x(\d+)", text):
        rows, columns = map(int, found.groups())
        if not (rows and columns):
            raise ValueError(f"granularity block:RxC needs R and C of at least 1, got {text!r}.")
        return Block(rows, columns)
    raise ValueError(
        f"granularity must be unstructured, N:M (such as 2:4), block:RxC (such as block:4x4) or one of "
        f"{', '.join(STRUCTURES)}; got {text!r}."
    )
