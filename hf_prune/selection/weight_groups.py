"""Groups of weights that go together: single weights, and blocks; of shards goes what goes of whole weights."""

import functools
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from ..distributed.processes import failing_together
from ..distributed.shards import from_own, own, shard, whole
from ..scopes import GLOBAL
from ..weights.masks import MaskSet, masked_in
from ..weights.targets import Target, are_sharded
from .cuts import Cut, Quota, mask_one_by_one
from .granularity import Granularity
from .lowest import check_scores, drop_lowest, drop_lowest_of_each


class WeightGroups(Granularity):
    """Groups of as many weights each, of which the lowest go.

    What there is one of for each group is `[rows, groups of a row]`, unless `to_rows` says otherwise.
    """

    are_single: bool = False
    """Whether each group is one weight, so that a process can choose among the rows that it holds."""

    @abstractmethod
    def shape_of_groups(self, target: Target) -> torch.Size:
        """The shape of what there is one of for each group."""

    @abstractmethod
    def pool(self, scores: torch.Tensor, target: Target) -> torch.Tensor:
        """Scores of the weights → scores of the groups."""

    def pool_mask(self, mask: torch.Tensor, target: Target) -> torch.Tensor:
        """Mask of the weights → mask of the groups. Raises ValueError if a group is masked in part."""
        kept = self.pool(mask.float(), target)
        if not ((kept == 0) | (kept == mask.numel() // kept.numel())).all():
            raise ValueError(
                f"the zeros of {target.module!r} are not whole groups of {self}. Start without hold_zeros, or choose "
                "another granularity."
            )
        return kept > 0

    @abstractmethod
    def spread(self, mask: torch.Tensor, target: Target) -> torch.Tensor:
        """Mask of the groups → mask of the weights."""

    def to_rows(self, values: torch.Tensor, target: Target) -> torch.Tensor:
        """Values of the groups → `[rows, groups of a row]`."""
        return values

    def from_rows(self, rows: torch.Tensor, target: Target) -> torch.Tensor:
        """The inverse of `to_rows`."""
        return rows

    def count(self, target: Target) -> int:
        """How many there are."""
        return self.shape_of_groups(target).numel()

    def mask(self, cut: Cut) -> MaskSet:
        """Drops the lowest groups of each row or pool."""
        return self._mask_rows(cut) if cut.scope.within_rows else self._mask_pools(cut)

    def _mask_rows(self, cut: Cut) -> MaskSet:
        """The masks that drop the lowest groups of each output row, so many of each as a target's sparsity says."""

        def mask_of(seen: Target, kept: torch.Tensor | None) -> torch.Tensor:
            rows = self.to_rows(self.pool(cut.scorer.of_weights(seen), seen), seen)
            if kept is not None:
                kept = self.to_rows(self.pool_mask(kept, seen), seen)
            drop = round(cut.own_sparsities.get(seen.name, cut.sparsity) * rows.shape[1])
            dropped = drop_lowest_of_each(seen.name, rows, drop, kept)
            return self.spread(self.from_rows(dropped, seen), seen)

        return mask_one_by_one(cut, mask_of, alone=cut.scorer.is_elementwise and self.are_single)

    def _mask_pools(self, cut: Cut) -> MaskSet:
        """The masks that drop the lowest groups of each pool."""
        alone = cut.scorer.is_elementwise and self.are_single
        sharded = are_sharded(cut.targets.values())

        def scores_of(target: Target) -> torch.Tensor:
            """Of the groups whose turn it is on this process."""
            if alone or not sharded:
                seen = target.own()
                return self.pool(cut.scorer.of_weights(seen), seen)
            seen = target.whole()
            with failing_together():  # While all processes have all of them.
                scores = self.pool(cut.scorer.of_weights(seen), seen)
                check_scores(target.name, scores)
            return own(shard(scores, target.weight))

        def regrouped(
            change: Callable[[torch.Tensor, Target], torch.Tensor], mask: torch.Tensor, target: Target
        ) -> torch.Tensor:
            if self.are_single:
                return change(mask, target)
            return shard(change(whole(mask), target), target.weight)

        kept = {name: regrouped(self.pool_mask, mask, cut.targets[name]) for name, mask in cut.masks.items()}
        kept_here = {name: own(mask) for name, mask in kept.items()}
        chosen: dict[str, torch.Tensor] = {}
        for pool in cut.pools(kept, self.count):
            scores = {name: functools.partial(scores_of, cut.targets[name]) for name in pool.names}
            chosen |= drop_lowest(scores, pool.drop, kept_here, sharded=sharded)
        return MaskSet(
            {
                name: regrouped(
                    self.spread, from_own(chosen[name], target.weight, self.shape_of_groups(target)), target
                )
                for name, target in cut.targets.items()
            }
        )


@dataclass(frozen=True)
class Unstructured(WeightGroups):
    """Each weight by itself."""

    spelling = "unstructured"
    can_reconstruct = True
    are_single = True

    @classmethod
    def read(cls, text: str) -> "Unstructured | None":
        """Reads `unstructured`."""
        return cls() if text == "unstructured" else None

    def __str__(self) -> str:
        return "unstructured"

    def quotas(self, cut: Cut) -> Mapping[str, Quota]:
        """How many weights of each target: what the criterion would take, or what the scope says."""
        if cut.scope == GLOBAL:
            return {name: masked_in(mask) for name, mask in self.mask(cut).items()}
        return {pool.names[0]: pool.drop for pool in cut.pools(cut.masks, self.count)}

    def shape_of_groups(self, target: Target) -> torch.Size:
        """The weight's own."""
        return target.weight.shape

    def pool(self, scores: torch.Tensor, target: Target) -> torch.Tensor:
        """The same."""
        return scores

    def pool_mask(self, mask: torch.Tensor, target: Target) -> torch.Tensor:
        """The same."""
        return mask

    def spread(self, mask: torch.Tensor, target: Target) -> torch.Tensor:
        """The same."""
        return mask

    def to_rows(self, values: torch.Tensor, target: Target) -> torch.Tensor:
        """A row is an output, and all that it is computed from."""
        return target.to_rows(values).flatten(0, 1)

    def from_rows(self, rows: torch.Tensor, target: Target) -> torch.Tensor:
        """The inverse of `to_rows`."""
        return target.from_rows(rows).contiguous()


@dataclass(frozen=True)
class Block(WeightGroups):
    """Blocks of `rows` outputs × `columns` inputs; a row of blocks holds `rows` outputs.

    The inputs of a convolution are its channels, so that a block lies at one position of the kernel.
    """

    rows: int
    columns: int
    spelling = "block:RxC (such as block:4x4)"

    @classmethod
    def read(cls, text: str) -> "Block | None":
        """Reads `block:RxC`."""
        if not (found := re.fullmatch(r"block:(\d+)x(\d+)", text)):
            return None
        rows, columns = map(int, found.groups())
        if not (rows and columns):
            raise ValueError(f"granularity block:RxC needs R and C of at least 1, got {text!r}.")
        return cls(rows, columns)

    def __str__(self) -> str:
        return f"block:{self.rows}x{self.columns}"

    def check(self, targets: Iterable[Target]) -> None:
        """Requires that blocks tile every target."""
        bad = [t for t in targets if t.out_features % self.rows or t.in_features % self.columns]
        if bad:
            shapes = ", ".join(f"{t.module!r} is {t.out_features} x {t.in_features}" for t in bad)
            raise ValueError(
                f"{self} needs out_features divisible by {self.rows} and in_features divisible by {self.columns}; "
                f"{shapes}. Add to exclude_modules, or choose another block."
            )

    def shape_of_groups(self, target: Target) -> torch.Size:
        """The shape of what there is one of for each group."""
        rows = target.weight.numel() // target.in_features
        return torch.Size([rows // self.rows, target.in_features // self.columns])

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

    def _blocks(self, values: torch.Tensor, target: Target) -> torch.Tensor:
        matrix = target.to_matrix(values)
        return matrix.reshape(len(matrix) // self.rows, self.rows, -1, self.columns)
