"""Levels: the sparsities at which a cut scores anew, one for each of `config.score_steps`."""

from collections.abc import Mapping

from .. import granularities
from ..config import PruningConfig
from ..criteria import Criterion
from ..distributed.shards import whole
from ..granularities import Pattern
from ..resolving import effective_scope, sparsities_of_targets
from ..structures.groups import Structures, count_gone, kept_in
from ..structures.ranking import pools_of
from ..weights.masks import MaskSet, masked_in
from ..weights.targets import Target


def levels_of(
    targets: Mapping[str, Target],
    masks: MaskSet,
    sparsity: float,
    config: PruningConfig,
    criterion: Criterion | None,
    structures: Structures,
) -> list[float]:
    """The sparsities on a cut's way, each leaving the same share of what the one before has left.

    For N:M they are those of the nearest patterns, each once.

    Args:
        targets: What `resolve_targets` found.
        masks: The masks so far.
        sparsity: Absolute sparsity to reach, in `[0, 1)`.
        config: Its `score_steps` says how many at most.
        criterion: A criterion in place of the config's.
        structures: What `find_structures` found.

    Returns:
        Rising, the last is `sparsity`.
    """
    if config.score_steps == 1:
        return [sparsity]
    final, scope = config.round_sparsities[-1], effective_scope(config, criterion)
    if structures:
        floors = _floors_of_structures(structures, masks, final, config, scope)
    else:
        floors = _floors_of_weights(targets, masks, final, config, scope)
    # No pool can get back what it has lost.
    before = min(max(floors, default=0.0), final)
    share, steps = (1 - sparsity) / (1 - before), config.score_steps
    levels = [1 - (1 - before) * share ** (step / steps) for step in range(1, steps)]
    if isinstance(pattern := granularities.parse(config.granularity), Pattern):
        levels = sorted({round(level * pattern.m) / pattern.m for level in levels} - {before, sparsity})
    return [*(level for level in levels if before < level < sparsity), sparsity]


def _floors_of_structures(
    structures: Structures, masks: MaskSet, final: float, config: PruningConfig, scope: str
) -> list[float]:
    """The lowest sparsity that a cut can still ask for, by each pool of structures."""
    kept, floors = kept_in(structures, masks), []
    for names, share in pools_of(structures, final, scope, config.sparsities_of(structures, final)):
        gone, total = count_gone({name: structures[name] for name in names}, kept)
        if share:
            floors.append(gone / total * final / share)  # A pool is at `share` when the cut is at `final`.
    return floors


def _floors_of_weights(
    targets: Mapping[str, Target], masks: MaskSet, final: float, config: PruningConfig, scope: str
) -> list[float]:
    """The lowest sparsity that a cut can still ask for, by each pool of weights."""
    own = sparsities_of_targets(targets, final, config)
    lost = {name: masked_in(mask) / mask.numel() for name, mask in masks.items()}
    rest = [name for name in masks if name not in own]
    floors = [lost[name] * final / own[name] for name in lost if own.get(name)]
    if scope == "row":
        rows = [targets[name].to_rows(whole(masks[name])).flatten(0, 1) for name in rest]
        floors += [float(1 - each.float().mean(1).min()) for each in rows]
    elif scope == "layer":
        floors += [lost[name] for name in rest]
    elif rest:
        floors.append(sum(masked_in(masks[name]) for name in rest) / sum(masks[name].numel() for name in rest))
    return floors
