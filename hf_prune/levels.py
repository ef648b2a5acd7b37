"""Levels: the sparsities through which a cut goes on its way."""

from collections.abc import Mapping

from . import granularities
from .config import PruningConfig
from .criteria import Criterion
from .granularities import Pattern
from .masks import MaskSet, masked_in
from .resolving import effective_scope, own_sparsities
from .structures.choosing import shares
from .structures.members import Places, count_gone, kept_in
from .targets import Target


def score_levels(
    targets: Mapping[str, Target],
    places: Places,
    masks: MaskSet,
    sparsity: float,
    config: PruningConfig,
    criterion: Criterion | None = None,
) -> list[float]:
    """The sparsities on a cut's way, each leaving the same share of what the one before has left.

    Args:
        targets: What `resolve_targets` found.
        places: What `find_places` found.
        masks: The masks so far.
        sparsity: Absolute sparsity to reach, in `[0, 1)`.
        config: Its `score_steps` says how many at most.
        criterion: A criterion in place of the config's.

    Returns:
        Rising, the last is `sparsity`.
    """
    if config.score_steps == 1:
        return [sparsity]
    before = _lowest_sparsity(targets, places, masks, config, effective_scope(config, criterion))
    share, steps = (1 - sparsity) / (1 - before), config.score_steps
    levels = [1 - (1 - before) * share ** (step / steps) for step in range(1, steps)]
    if isinstance(pattern := granularities.parse(config.granularity), Pattern):
        levels = sorted({round(level * pattern.m) / pattern.m for level in levels} - {before, sparsity})
    return [*(level for level in levels if before < level < sparsity), sparsity]


def _lowest_sparsity(
    targets: Mapping[str, Target], places: Places, masks: MaskSet, config: PruningConfig, scope: str
) -> float:
    """The lowest sparsity that masks leave possible: what competes by itself may have lost more than the rest."""
    final = config.round_sparsities[-1]
    floors = _floors_of_places(places, masks, config, scope) if places else _floors(targets, masks, config, scope)
    return min(max(floors, default=0.0), final)


def _floors_of_places(places: Places, masks: MaskSet, config: PruningConfig, scope: str) -> list[float]:
    """The lowest sparsity of each pool of structures."""
    final, kept = config.round_sparsities[-1], kept_in(places, masks)
    floors = []
    for names, share in shares(places, final, scope, config.sparsities_of(places, final)):
        gone, total = count_gone({name: places[name] for name in names}, kept)
        floors += [gone / total * final / share] if share else []
    return floors


def _floors(targets: Mapping[str, Target], masks: MaskSet, config: PruningConfig, scope: str) -> list[float]:
    """The lowest sparsity of each pool of weights."""
    final = config.round_sparsities[-1]
    own = own_sparsities(targets, final, config)
    lost = {name: masked_in(mask) / mask.numel() for name, mask in masks.items()}
    rest = [name for name in masks if name not in own]
    floors = [lost[name] * final / own[name] for name in lost if own.get(name)]
    if scope == "row":
        rows = [targets[name].to_rows(masks[name]).flatten(0, 1) for name in rest]
        floors += [float(1 - each.float().mean(1).min()) for each in rows]
    elif scope == "layer":
        floors += [lost[name] for name in rest]
    elif rest:
        floors.append(sum(masked_in(masks[name]) for name in rest) / sum(masks[name].numel() for name in rest))
    return floors
