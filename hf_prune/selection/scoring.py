"""Scoring: what a criterion says of weights and of whole structures, checked."""

import math
from collections import ChainMap
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch

from ..criteria import (
    CRITERIA,
    RECONSTRUCTIONS,
    Criterion,
    ScoreInputs,
    Statistics,
    is_elementwise,
    magnitude,
    pooling_of,
    scored_kinds,
)
from ..distributed.processes import failing_together
from ..structures.criteria import STRUCTURE_CRITERIA, StructureCriterion, StructureInputs, default_criterion
from ..structures.groups import KINDS, StructureGroup
from ..weights.targets import Target, are_sharded

AnyCriterion = Criterion | StructureCriterion

# A view: what is added to the tables is known at once.
CRITERION_NAMES: ChainMap[str, AnyCriterion] = ChainMap(
    cast(dict[str, AnyCriterion], RECONSTRUCTIONS),
    cast(dict[str, AnyCriterion], STRUCTURE_CRITERIA),
    cast(dict[str, AnyCriterion], CRITERIA),
)
"""The criteria by their names."""

WITH_AUTO: ChainMap[str, AnyCriterion | None] = ChainMap(
    *cast(list[dict[str, AnyCriterion | None]], CRITERION_NAMES.maps), {"auto": None}
)
"""What a config can name as its criterion."""


def criterion_of(name: str, kinds: Collection[str], *, has_labels: bool = True) -> tuple[str, AnyCriterion]:
    """A criterion by its name, and its own name where that is "auto".

    Args:
        name: A key of `CRITERION_NAMES`; or "auto", which is magnitude for weights and channels.
        kinds: The kinds of structures that a granularity has; none where it has weights.
        has_labels: Whether samples have labels, for "auto".
    """
    if name != "auto":
        return name, CRITERION_NAMES[name]
    chosen = default_criterion(kinds, has_labels=has_labels) if kinds and "channel" not in kinds else magnitude
    return chosen.__qualname__, chosen


def require_scorable(name: str, criterion: AnyCriterion, kinds: Collection[str]) -> None:
    """Requires that a criterion which scores structures as a whole knows all kinds that are pruned.

    Args:
        name: The criterion's name.
        criterion: The criterion.
        kinds: The kinds of structures that a granularity has; none where it has weights.

    Raises:
        ValueError: if not.
    """
    scored = scored_kinds(criterion)
    if scored and not (kinds and set(kinds) <= set(scored)):
        of = " and ".join(KINDS[kind] for kind in kinds) or "weights"
        raise ValueError(
            f"criterion {name!r} scores whole {' and '.join(KINDS[kind] for kind in scored)}, not {of}. Choose "
            f"granularity {' or '.join(scored)}, or another criterion."
        )


@dataclass(frozen=True)
class Scorer:
    """A criterion and what it is told.

    Attributes:
        criterion: The criterion.
        statistics: What it has declared to need.
        seed: For criteria that draw random numbers.
    """

    criterion: AnyCriterion
    statistics: Statistics = field(default_factory=dict)
    seed: int = 0

    @property
    def is_elementwise(self) -> bool:
        """Whether the score of a weight does not depend on others."""
        return is_elementwise(self.criterion)

    def inputs(self, target: Target) -> ScoreInputs:
        """What the criterion is told of a target, or of the rows that it holds."""
        own = {name: target.fit(values[target.name]) for name, values in self.statistics.items()}
        return ScoreInputs(target.name, target.merged, self.seed, own)

    def of_weights(self, target: Target) -> torch.Tensor:
        """Scores of a target's weights, of the weight's shape.

        Raises:
            ValueError: if they have another shape, or if the criterion changed the weight.
            TypeError: if the criterion gives something that is not a tensor.
        """
        version = target.weight._version
        scores = cast(Criterion, self.criterion)(self.inputs(target))
        if target.weight._version != version:
            raise ValueError(f"the criterion changed {target.name!r} in place. It has to leave the weight as it is.")
        _require_shape(scores, target.name, target.weight.shape)
        return scores

    def of_structures(self, group: StructureGroup, targets: Mapping[str, Target]) -> torch.Tensor:
        """Scores of the structures in a group: the criterion's own, or those of their weights, pooled as it declares.

        Args:
            group: The structures.
            targets: What is scored; of a group's other parameters nothing is.

        Returns:
            `[count]`, float64.

        Raises:
            ValueError, TypeError: as `of_weights` does.
        """
        if scored_kinds(self.criterion):
            own = {name: values[group.name] for name, values in self.statistics.items() if group.name in values}
            inputs = StructureInputs(group.name, group.kind, group.count, self.seed, own)
            given = cast(StructureCriterion, self.criterion)(inputs)
            _require_shape(given, group.name, torch.Size([group.count]))
            return given.double().cpu()
        pooling = pooling_of(self.criterion)
        total, sizes = torch.zeros(2, group.count, dtype=torch.float64)
        for member in group.members:
            if member.name in targets:
                scores = self.of_weights(targets[member.name])
                total += member.pool(scores.double().square() if pooling == "norm" else scores, group.count)
                sizes += member.sizes(group.count)
        return (total / sizes).sqrt() if pooling == "norm" else total


def _require_shape(scores: object, name: str, shape: torch.Size) -> None:
    if not isinstance(scores, torch.Tensor):
        raise TypeError(f"the criterion gave {type(scores).__name__} for {name!r}; it has to give a tensor.")
    if scores.shape != shape:
        raise ValueError(
            f"the criterion gave scores of shape {tuple(scores.shape)} for {name!r}, which has shape {tuple(shape)}."
        )


@torch.no_grad()
def require_finite_weights(targets: Collection[Target]) -> None:
    """Requires that every weight is finite.

    Raises:
        ValueError: if one is not; the message names the first tensor that has others.
    """
    held = {target.name: target.own().weight for target in targets}
    with failing_together(are_sharded(targets)):
        for name, weight in held.items():
            # One pass that makes no temporary: a NaN is both extremes, an infinity one of them.
            low, high = weight.aminmax() if weight.numel() else (0.0, 0.0)
            if not (math.isfinite(low) and math.isfinite(high)):
                count = weight.numel() - int(weight.isfinite().sum())
                raise ValueError(
                    f"{count} of the {weight.numel()} weights of {name!r} are NaN or infinite. Has training diverged?"
                )
