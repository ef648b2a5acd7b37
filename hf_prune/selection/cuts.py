"""Cuts: what one is decided by, and masks of which each row is decided by itself.

A process decides alone about the rows that it holds where their scores and their groups need no others; else all
processes gather a weight, decide about all of it, and each keeps what is said of its rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ..distributed.processes import failing_together
from ..distributed.shards import from_own, shard, whole
from ..scopes import Pool, Scope, pools
from ..structures.budgets import Budget
from ..structures.groups import Structures
from ..weights.masks import MaskSet, masked_in
from ..weights.targets import Target, are_sharded
from .scoring import Scorer


@dataclass(frozen=True)
class Cut:
    """What a cut is decided by.

    Attributes:
        targets: The weights that may be cut.
        masks: The masks so far; what they prune stays pruned, and counts.
        sparsity: Absolute sparsity to reach, in `[0, 1)`.
        scope: Which groups compete.
        own_sparsities: Target or group of structures → its own sparsity. These leave the competition.
        scorer: What the groups are worth.
        structures: Those that may be cut, where it is not weights that are.
        budget: What the sparsity is a share of, where it is not of the number of structures.
    """

    targets: Mapping[str, Target]
    masks: MaskSet
    sparsity: float
    scope: Scope
    own_sparsities: Mapping[str, float]
    scorer: Scorer
    structures: Structures = field(default_factory=dict)
    budget: Budget | None = None

    def pools(self, kept: Mapping[str, torch.Tensor], count: Callable[[Target], int]) -> list[Pool]:
        """Divides the targets into pools.

        Args:
            kept: Masks of the groups so far, sharded as the targets are.
            count: Target → number of its groups.
        """
        measure, targets = self.scope.measure, self.targets
        return pools(
            {name: count(target) for name, target in targets.items()},
            self.sparsity,
            self.scope,
            shapes={name: target.layer_shape for name, target in targets.items()},
            dropped={name: masked_in(kept[name]) if name in kept else 0 for name in targets},
            layer_sparsity=self.own_sparsities,
            measured=measure and {n: measure(self.scorer.inputs(target.whole())) for n, target in targets.items()},
        )


class Proportion(Protocol):
    """`n` weights kept of every `m`."""

    @property
    def n(self) -> int:
        """How many are kept."""

    @property
    def m(self) -> int:
        """Of how many."""


Quota = int | Proportion
"""What is to be pruned of a target: how many weights in all, those pruned before included, or what of each group."""


def mask_one_by_one(
    cut: Cut, mask_of: Callable[[Target, torch.Tensor | None], torch.Tensor], *, alone: bool
) -> MaskSet:
    """Masks of which each row is decided by itself.

    Args:
        cut: What is cut.
        mask_of: A target, as a process sees it, and its mask so far → its mask.
        alone: Whether a process can do that for the rows that it holds, unless it is inputs that are divided.
    """
    found, sharded = {}, are_sharded(cut.targets.values())
    for name, target in cut.targets.items():
        seen = target.own() if alone and target.axes[-1] != 0 else target.whole()
        kept = seen.fit(cut.masks[name]) if name in cut.masks else None
        with failing_together(sharded):
            mask = mask_of(seen, kept)
        found[name] = shard(mask, target.weight) if seen.rows is None else from_own(mask, target.weight)
    return MaskSet(found)


def floors_of_weights(cut: Cut) -> list[float]:
    """The lowest sparsities that are still possible on the way to that of a cut, by each pool of weights."""
    final, own, masks = cut.sparsity, cut.own_sparsities, cut.masks
    lost = {name: masked_in(mask) / mask.numel() for name, mask in masks.items()}
    rest = [name for name in masks if name not in own]
    floors = [lost[name] * final / own[name] for name in lost if own.get(name)]
    if cut.scope.within_rows:
        rows = [cut.targets[name].to_rows(whole(masks[name])).flatten(0, 1) for name in rest]
        floors += [float(1 - each.float().mean(1).min()) for each in rows]
    elif not cut.scope.pools_tensors:
        floors += [lost[name] for name in rest]
    elif rest:
        floors.append(sum(masked_in(masks[name]) for name in rest) / sum(masks[name].numel() for name in rest))
    return floors
