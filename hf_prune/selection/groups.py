"""Choosing: which weights go, single, in patterns or in blocks, by their scores; of shards what goes of whole weights.

A process decides alone about the rows that it holds where their scores and their groups need no others; else all
processes gather a weight, decide about all of it, and each keeps what is said of its rows.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from ..distributed.processes import failing_together
from ..distributed.shards import from_own, own, shard, whole
from ..granularities import Block, Pattern, Unstructured
from ..scopes import Pool
from ..weights.masks import MaskSet
from ..weights.targets import Target, are_sharded
from .lowest import check_scores, drop_lowest, drop_lowest_of_each


@dataclass(frozen=True)
class Choice:
    """What a cut of weights is decided by.

    Attributes:
        targets: What may be cut.
        masks: The masks so far; what they prune stays pruned.
        scores_of: A target, as a process sees it → scores of its weights.
        elementwise: Whether the score of a weight does not depend on others.
    """

    targets: Mapping[str, Target]
    masks: MaskSet
    scores_of: Callable[[Target], torch.Tensor]
    elementwise: bool

    def by_pattern(self, pattern: Pattern) -> MaskSet:
        """The masks that keep the best weights of each group of a pattern."""
        return self._row_by_row(
            lambda seen, kept: pattern.keep(self.scores_of(seen), kept, seen), alone=self.elementwise
        )

    def by_row(self, groups: Unstructured | Block, sparsities: Mapping[str, float]) -> MaskSet:
        """The masks that drop the lowest groups of each output row, so many of each as a target's sparsity says."""

        def mask_of(seen: Target, kept: torch.Tensor | None) -> torch.Tensor:
            rows = groups.to_rows(groups.pool(self.scores_of(seen), seen), seen)
            if kept is not None:
                kept = groups.to_rows(groups.pool_mask(kept, seen), seen)
            drop = round(sparsities[seen.name] * rows.shape[1])
            dropped = drop_lowest_of_each(seen.name, rows, drop, kept)
            return groups.spread(groups.from_rows(dropped, seen), seen)

        return self._row_by_row(mask_of, alone=self.elementwise and groups.group_size == 1)

    def by_pool(
        self,
        groups: Unstructured | Block,
        divide: Callable[[Mapping[str, torch.Tensor]], Iterable[Pool]],
    ) -> MaskSet:
        """The masks that drop the lowest groups of each pool.

        Args:
            groups: What is dropped together.
            divide: Masks of the groups so far, sharded as the targets are → the pools.
        """
        alone = self.elementwise and groups.group_size == 1
        sharded = are_sharded(self.targets.values())

        def scores_of(target: Target) -> torch.Tensor:
            """Of the groups whose turn it is on this process."""
            if alone or not sharded:
                seen = target.own()
                return groups.pool(self.scores_of(seen), seen)
            seen = target.whole()
            with failing_together():  # While all processes have all of them.
                scores = groups.pool(self.scores_of(seen), seen)
                check_scores(target.name, scores)
            return own(shard(scores, target.weight))

        def regrouped(
            change: Callable[[torch.Tensor, Target], torch.Tensor], mask: torch.Tensor, target: Target
        ) -> torch.Tensor:
            if groups.group_size == 1:
                return change(mask, target)
            return shard(change(whole(mask), target), target.weight)

        kept = {name: regrouped(groups.pool_mask, mask, self.targets[name]) for name, mask in self.masks.items()}
        kept_here = {name: own(mask) for name, mask in kept.items()}
        chosen: dict[str, torch.Tensor] = {}
        for pool in divide(kept):
            scores = {name: functools.partial(scores_of, self.targets[name]) for name in pool.names}
            chosen |= drop_lowest(scores, pool.drop, kept_here, sharded=sharded)
        return MaskSet(
            {
                name: regrouped(
                    groups.spread, from_own(chosen[name], target.weight, groups.shape_of_groups(target)), target
                )
                for name, target in self.targets.items()
            }
        )

    def _row_by_row(self, mask_of: Callable[[Target, torch.Tensor | None], torch.Tensor], *, alone: bool) -> MaskSet:
        """Masks of which each row is decided by itself.

        Args:
            mask_of: A target, as a process sees it, and its mask so far → its mask.
            alone: Whether a process can do that for the rows that it holds, unless it is inputs that are divided.
        """
        found, sharded = {}, are_sharded(self.targets.values())
        for name, target in self.targets.items():
            seen = target.own() if alone and target.axes[-1] != 0 else target.whole()
            kept = seen.fit(self.masks[name]) if name in self.masks else None
            with failing_together(sharded):
                mask = mask_of(seen, kept)
            found[name] = shard(mask, target.weight) if seen.rows is None else from_own(mask, target.weight)
        return MaskSet(found)
