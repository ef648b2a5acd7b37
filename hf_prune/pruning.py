"""Pruning: one round's cut, from scores to masks, and `prune` for a cut without a Trainer."""

import contextlib
import functools
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import nn

from . import granularities
from .calibration import STATISTICS, Statistics, calibrate
from .config import PruningConfig
from .criteria import CRITERIA, Criterion, ScoreInputs, fisher, magnitude, needs_of, pooling_of, scope_of, wanda
from .granularities import Pattern, Structural
from .masks import MaskSet, masked_in
from .reconstruction import RECONSTRUCTIONS, Quota, reconstruct_
from .reports import SparsityReport, sparsity_report
from .samples import Batch
from .scopes import Pool, outlier_ratio, pools
from .selection import drop_lowest, drop_lowest_of_each
from .structures import choosing
from .structures.choosing import choose
from .structures.finding import find_places, held_zeros, require_prunable
from .structures.members import Place, Places, count_gone, kept_in, masks_of, parameters_of
from .targets import Target, find_targets

logger = logging.getLogger(__name__)


def resolve_targets(model: nn.Module, config: PruningConfig) -> dict[str, Target]:
    """Finds the targets of a config in a model and checks that the config can prune them.

    Args:
        model: The model, unwrapped.
        config: The pruning config.

    Returns:
        Parameter name → target.

    Raises:
        ValueError: as `find_targets` does, if the granularity does not fit a shape, or if a pattern of
            `layer_sparsity` matches no target.
    """
    targets = find_targets(model, config.target_modules, config.exclude_modules)
    granularity = granularities.parse(config.granularity)
    granularity.check(targets.values())
    for pattern in () if isinstance(granularity, Structural) else config.own_sparsities:
        if not any(re.fullmatch(pattern, target.module) for target in targets.values()):
            raise ValueError(
                f"layer_sparsity: {pattern!r} matches none of the targets, such as "
                f"{next(iter(targets.values())).module!r}. It has to match the whole name of the module."
            )
    return targets


def effective_scope(config: PruningConfig, criterion: Criterion | None = None) -> str:
    """The scope of a config, or what "auto" means for its criterion, or for another one in place of it."""
    if config.scope != "auto":
        return config.scope
    if isinstance(granularities.parse(config.granularity), Structural):
        return "layer" if config.uniform else "global"
    if _reconstructs(config, criterion):
        is_pattern = isinstance(granularities.parse(config.granularity), Pattern)
        return "layer" if is_pattern else "global"  # A pattern says itself how sparse each layer is.
    return scope_of(criterion or CRITERIA[config.criterion])


def required_statistics(config: PruningConfig, criterion: Criterion | None = None) -> tuple[str, ...]:
    """What has to be gathered for a cut by a config, or by another criterion in place of its own."""
    scope, reconstructs = effective_scope(config, criterion), _reconstructs(config, criterion)
    names = [] if reconstructs else list(needs_of(criterion or CRITERIA[config.criterion]))
    if scope == "owl":
        names += needs_of(wanda)
    if scope == "global" and reconstructs:
        names += needs_of(fisher)
    return tuple(dict.fromkeys(names))


def _reconstructs(config: PruningConfig, criterion: Criterion | None) -> bool:
    return criterion is None and config.criterion in RECONSTRUCTIONS


def require_room(
    targets: Mapping[str, Target],
    masks: MaskSet,
    config: PruningConfig,
    criterion: Criterion | None = None,
    places: Places | None = None,
) -> None:
    """Tries the first cut of a config on masks that are there: if they leave it no room, now is the time to say so.

    Args:
        targets: What `resolve_targets` found.
        masks: The masks so far.
        config: The pruning config.
        places: What `find_places` found.
        criterion: A criterion in place of the config's.

    Raises:
        ValueError: if the masks prune more than the first round asks for.
    """
    if not config.round_sparsities:
        return
    # Any scores will do, compared as those to come will be. Under owl there is too little room only where there is
    # under global, and the statistics that it needs are not there yet.
    scope = effective_scope(config, criterion)
    first = config.round_sparsities[0]
    scope = "global" if scope == "owl" else scope
    next_masks(targets, masks, first, config, criterion=magnitude, scope=scope, places=places)


@torch.no_grad()
def next_masks(
    targets: Mapping[str, Target],
    masks: MaskSet,
    sparsity: float,
    config: PruningConfig,
    *,
    criterion: Criterion | None = None,
    scope: str | None = None,
    seed: int = 0,
    statistics: Statistics | None = None,
    places: Places | None = None,
) -> MaskSet:
    """Scores, selects and masks once; the model is not touched.

    Args:
        targets: What `resolve_targets` found.
        masks: The masks so far; what they prune stays pruned and counts towards the sparsity. Empty before the
            first round.
        sparsity: Absolute sparsity to reach, in `[0, 1)`.
        config: Its criterion, granularity, scope and `layer_sparsity` count.
        criterion: A criterion in place of the config's.
        scope: A scope in place of the effective one.
        seed: For criteria that draw random numbers.
        statistics: What the criterion has declared to need.
        places: What `find_places` found.

    Returns:
        A mask for each target; where whole structures go, for all that belongs to one.

    Raises:
        ValueError: if a weight is not finite, a score is NaN or has a wrong shape, or the criterion changed a weight
            (the message names the tensor); or if the masks so far prune more than the sparsity.
        TypeError: if the criterion gives something that is not a tensor.
    """
    granularity = granularities.parse(config.granularity)
    score = criterion or CRITERIA[config.criterion]
    _require_finite_weights(targets.values())

    def weight_scores(target: Target) -> torch.Tensor:
        version = target.weight._version
        scores = score(_score_inputs(target, statistics, seed))
        if target.weight._version != version:
            raise ValueError(f"the criterion changed {target.name!r} in place. It has to leave the weight as it is.")
        if not torch.is_tensor(scores):
            raise TypeError(
                f"the criterion gave {type(scores).__name__} for {target.name!r}; it has to give a tensor."
            )
        if scores.shape != target.weight.shape:
            raise ValueError(
                f"the criterion gave scores of shape {tuple(scores.shape)} for {target.name!r}, "
                f"which has shape {tuple(target.weight.shape)}."
            )
        return scores

    if isinstance(granularity, Pattern):
        pattern = granularity.at(sparsity)
        return MaskSet({n: pattern.keep(weight_scores(t), masks.get(n), t) for n, t in targets.items()})

    scope = scope or effective_scope(config, criterion)
    if isinstance(granularity, Structural):
        if not places:
            raise ValueError(f"granularity {config.granularity!r} needs the structures that find_places gives.")
        found, pooling = places, pooling_of(score)
        values = {name: _place_scores(place, targets, weight_scores, pooling) for name, place in found.items()}
        own = config.sparsities_of({name: name for name in found}, sparsity)
        return masks_of(found, choose(found, values, kept_in(found, masks), sparsity, scope, own))

    def group_scores(target: Target) -> torch.Tensor:
        return granularity.pool(weight_scores(target), target)

    kept = {name: granularity.pool_mask(mask, targets[name]) for name, mask in masks.items()}
    group_masks: dict[str, torch.Tensor] = {}
    if scope == "row":
        own = _layer_sparsity(targets, sparsity, config)
        for name, target in targets.items():
            rows = granularity.to_rows(group_scores(target), target)
            before = granularity.to_rows(kept[name], target) if name in kept else None
            drop = round(own.get(name, sparsity) * rows.shape[1])
            group_masks[name] = granularity.from_rows(drop_lowest_of_each(name, rows, drop, before), target)
    else:
        sizes = {name: target.weight.numel() // granularity.group_size for name, target in targets.items()}
        for pool in _pools(targets, kept, sizes, sparsity, scope, config, statistics):
            scores = {name: functools.partial(group_scores, targets[name]) for name in pool.names}
            group_masks |= drop_lowest(scores, pool.drop, kept)
    return MaskSet({name: granularity.spread(group_masks[name], target) for name, target in targets.items()})


def cut_(
    model: nn.Module,
    targets: Mapping[str, Target],
    masks: MaskSet,
    sparsity: float,
    config: PruningConfig,
    *,
    batches: Callable[[], Iterable[Batch]] | None = None,
    statistics: Statistics | None = None,
    criterion: Criterion | None = None,
    seed: int = 0,
    show_progress: bool = False,
    places: Places | None = None,
) -> MaskSet:
    """One round's cut: masks that reach a sparsity, in `config.score_steps` steps, and zeroes what they prune.

    A method that reconstructs also changes the weights that the masks keep.

    Args:
        model: The model, unwrapped; changed in place.
        targets: What `resolve_targets` found.
        masks: The masks so far.
        sparsity: Absolute sparsity to reach, in `[0, 1)`.
        config: The pruning config.
        batches: Gives calibration batches of this process, anew at each call; None if there are none.
        statistics: Those that are there already.
        criterion: A criterion in place of the config's.
        seed: For criteria that draw random numbers.
        show_progress: Whether a long calibration shows how far it is.
        places: What `find_places` found.

    Returns:
        A mask for each target; where whole structures go, for all that belongs to one.

    Raises:
        ValueError, TypeError: as `next_masks` and `calibrate` do, or if the criterion looks at data and there are
            none. The weights are then as they were.
    """
    reconstructs, known = _reconstructs(config, criterion), statistics or {}
    missing = [name for name in required_statistics(config, criterion) if name not in known]
    who = f"the criterion {config.criterion if criterion is None else criterion!r}"
    if unknown := [name for name in missing if name not in STATISTICS]:
        raise ValueError(
            f"{who} needs {', '.join(unknown)}, which nobody gathers here. A calibration gathers "
            f"{', '.join(STATISTICS)}; PruningTrainerCallback also movement."
        )
    if batches is None and (missing or reconstructs):
        raise ValueError(
            f"{who} with scope {config.scope!r} looks at data ({', '.join(missing) or 'what goes into each layer'}). "
            "Give a dataloader of calibration samples."
        )

    def gather() -> Statistics:
        if batches is None or not missing:
            return known
        samples = config.calibration_samples
        return {**known, **calibrate(model, targets, batches(), missing, samples, show_progress=show_progress)}

    changed = [target.weight for target in targets.values()] + list(parameters_of(places or {}).values())
    with _put_back_on_error(changed) if reconstructs or config.score_steps > 1 else contextlib.nullcontext():
        if reconstructs and batches is not None:
            return _reconstruct_(model, targets, masks, sparsity, config, gather(), batches(), show_progress)
        for level in _score_levels(targets, masks, sparsity, config, criterion, places or {}):
            masks = next_masks(
                targets,
                masks,
                level,
                config,
                criterion=criterion,
                seed=seed,
                statistics=gather(),
                places=places,
            )
            masks.apply_(model)
    return masks


def _place_scores(
    place: Place,
    targets: Mapping[str, Target],
    weight_scores: Callable[[Target], torch.Tensor],
    pooling: str,
) -> torch.Tensor:
    """`[count]` scores of structures, float64: the sum of those of their weights, or the root of their mean square."""
    total, sizes = torch.zeros(2, place.count, dtype=torch.float64)
    for member in place.members:
        if member.name in targets:
            scores = weight_scores(targets[member.name])
            total += member.pool(scores.double().square() if pooling == "norm" else scores, place.count)
            sizes += member.sizes(place.count)
    return (total / sizes).sqrt() if pooling == "norm" else total


@contextlib.contextmanager
def _put_back_on_error(weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """If what is done in it fails, the weights are as they were."""
    before = {weight: weight.detach().to("cpu", copy=True) for weight in weights}
    done = False
    try:
        yield
        done = True
    finally:
        if not done:
            with torch.no_grad():
                for weight, values in before.items():
                    weight.copy_(values)


def _reconstruct_(
    model: nn.Module,
    targets: Mapping[str, Target],
    masks: MaskSet,
    sparsity: float,
    config: PruningConfig,
    statistics: Statistics,
    batches: Iterable[Batch],
    show_progress: bool,
) -> MaskSet:
    """Reconstructs to a sparsity, or to a pattern on its way there.

    SparseGPT compares weights within a layer only. How many each layer loses is what `fisher` would take from it
    (scope "global"), or what the scope says.
    """
    granularity, samples = granularities.parse(config.granularity), config.calibration_samples
    _require_finite_weights(targets.values())
    quotas: Mapping[str, Quota]
    if isinstance(granularity, Pattern):
        pattern = granularity.at(sparsity)
        for name, mask in masks.items():
            pattern.require_room(mask, targets[name])
        quotas = dict.fromkeys(targets, pattern)
    elif (scope := effective_scope(config)) == "global":
        by_fisher = next_masks(targets, masks, sparsity, config, criterion=fisher, statistics=statistics)
        quotas = {name: masked_in(mask) for name, mask in by_fisher.items()}
    else:
        sizes = {name: target.weight.numel() for name, target in targets.items()}
        divided = _pools(targets, masks, sizes, sparsity, scope, config, statistics)
        quotas = {pool.names[0]: pool.drop for pool in divided}
    return reconstruct_(model, targets, masks, quotas, batches, samples, show_progress=show_progress)


def prune(
    model: nn.Module,
    config: PruningConfig,
    dataloader: Iterable[Batch] | None = None,
    *,
    criterion: Criterion | None = None,
    seed: int = 0,
) -> SparsityReport:
    """Prunes a model in place, in one cut to the final sparsity of the config.

    The zeros are plain zeros: nothing holds them if training goes on. `PruningTrainerCallback` with `hold_zeros`
    does.

    Args:
        model: The model, unwrapped; of a `PeftModel` the base weights are pruned.
        config: The pruning config; of its rounds only the last counts.
        dataloader: Batches with the samples along the first dimension of their tensors, for criteria and scopes that
            look at data; of these the first `config.calibration_samples` samples are read, maybe several times.
        criterion: A criterion in place of the config's.
        seed: For criteria that draw random numbers.

    Returns:
        The sparsity by module, over the targets and over the whole model.

    Raises:
        ValueError: if the config does not fit the model; if criterion or scope looks at data and the dataloader is
            missing, empty, or can be read only once; if nobody gathers here what the criterion reads; if a weight or
            a statistic is not finite; or if scores are NaN, of another shape, or differ from call to call. The model
            is then as it was.
        TypeError: if the criterion gives something that is not a tensor.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        >>> prune(model, PruningConfig(sparsity=0.75)).sparsity
        0.75
    """
    targets = resolve_targets(model, config)
    places = find_places(model, config, targets)
    require_prunable(model, config, places)
    if hasattr(model, "peft_config"):
        logger.warning("The base weights are pruned. Merging trained adapters into them fills the zeros again.")
    if isinstance(dataloader, Iterator):
        raise ValueError(
            f"dataloader is a {type(dataloader).__name__}, which can be read once, and a cut may read the samples "
            "several times. Give a DataLoader or a list of batches."
        )
    masks = held_zeros(model, targets, places) if config.hold_zeros else MaskSet()
    if config.round_sparsities:
        masks = cut_(
            model,
            targets,
            masks,
            config.round_sparsities[-1],
            config,
            batches=None if dataloader is None else lambda: dataloader,
            criterion=criterion,
            seed=seed,
            show_progress=True,
            places=places,
        )
    return sparsity_report(model, config, masks=masks)


def _score_inputs(target: Target, statistics: Statistics | None, seed: int = 0) -> ScoreInputs:
    """What a criterion is told of a target."""
    own = {name: values[target.name] for name, values in (statistics or {}).items()}
    return ScoreInputs(target.name, target.weight.detach(), seed, own)


def _score_levels(
    targets: Mapping[str, Target],
    masks: MaskSet,
    sparsity: float,
    config: PruningConfig,
    criterion: Criterion | None,
    places: Places,
) -> list[float]:
    """The sparsities on a cut's way, each leaving the same share of what the one before has left."""
    if config.score_steps == 1:
        return [sparsity]
    before = _lowest_sparsity(targets, masks, config, effective_scope(config, criterion), places)
    share, steps = (1 - sparsity) / (1 - before), config.score_steps
    levels = [1 - (1 - before) * share ** (step / steps) for step in range(1, steps)]
    if isinstance(pattern := granularities.parse(config.granularity), Pattern):
        levels = sorted({round(level * pattern.m) / pattern.m for level in levels} - {before, sparsity})
    return [*(level for level in levels if before < level < sparsity), sparsity]


def _lowest_sparsity(
    targets: Mapping[str, Target], masks: MaskSet, config: PruningConfig, scope: str, places: Places
) -> float:
    """The lowest sparsity that masks leave possible: what competes by itself may have lost more than the rest."""
    final = config.round_sparsities[-1]
    if places:
        kept, floors = kept_in(places, masks), [0.0]
        own = config.sparsities_of({name: name for name in places}, final)
        for names, share in choosing.pools(places, final, scope, own):
            gone, total = count_gone({name: places[name] for name in names}, kept)
            floors += [gone / total * final / share] if share else []
        return min(max(floors), final)
    own = _layer_sparsity(targets, final, config)
    lost = {name: masked_in(mask) / mask.numel() for name, mask in masks.items()}
    rest = [name for name in masks if name not in own]
    floors = [0.0, *(lost[name] * final / own[name] for name in lost if own.get(name))]
    if scope == "row":
        rows = [targets[name].to_rows(masks[name]).flatten(0, 1) for name in rest]
        floors += [float(1 - each.float().mean(1).min()) for each in rows]
    elif scope == "layer":
        floors += [lost[name] for name in rest]
    elif rest:
        floors.append(sum(masked_in(masks[name]) for name in rest) / sum(masks[name].numel() for name in rest))
    return min(max(floors), final)


@torch.no_grad()
def _require_finite_weights(targets: Iterable[Target]) -> None:
    for target in targets:
        # One pass that makes no temporary: a NaN is both extremes, an infinity one of them.
        low, high = target.weight.aminmax() if target.weight.numel() else (0.0, 0.0)
        if not (math.isfinite(low) and math.isfinite(high)):
            count = target.weight.numel() - int(target.weight.isfinite().sum())
            raise ValueError(
                f"{count} of the {target.weight.numel()} weights of {target.name!r} are NaN or infinite. "
                "Has training diverged?"
            )


def _pools(
    targets: Mapping[str, Target],
    kept: Mapping[str, torch.Tensor],
    sizes: Mapping[str, int],
    sparsity: float,
    scope: str,
    config: PruningConfig,
    statistics: Statistics | None,
) -> list[Pool]:
    ratios = None
    if scope == "owl":
        ratios = {name: outlier_ratio(wanda(_score_inputs(t, statistics))) for name, t in targets.items()}
    return pools(
        sizes,
        sparsity,
        scope,
        shapes={name: target.layer_shape for name, target in targets.items()},
        dropped={name: masked_in(kept[name]) if name in kept else 0 for name in targets},
        layer_sparsity=_layer_sparsity(targets, sparsity, config),
        outlier_ratios=ratios,
    )


def _layer_sparsity(targets: Mapping[str, Target], sparsity: float, config: PruningConfig) -> dict[str, float]:
    return config.sparsities_of({name: target.module for name, target in targets.items()}, sparsity)
