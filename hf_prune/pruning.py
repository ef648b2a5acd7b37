"""Pruning: one round's cut, from scores to masks, and `prune` for a cut without a Trainer."""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import nn

from . import granularities
from .calibration.samples import Batch
from .calibration.statistics import STATISTICS, Statistics, calibrate
from .config import PruningConfig
from .criteria import CRITERIA, Criterion, fisher, is_elementwise, magnitude, wanda
from .distributed.gathering import accessible
from .distributed.shards import own, reshard_
from .distributed.zero import master_of, set_master_
from .granularities import Pattern, Structural
from .reconstruction.sparsegpt import Quota, reconstruct_
from .recovery.lora import has_adapters, keeps_sparsity, mask_adapters_, require_maskable_adapters, with_adapters
from .reporting.reports import SparsityReport, sparsity_report
from .resolving import (
    effective_scope,
    is_reconstruction,
    require_whole_where_needed,
    required_statistics,
    resolve_targets,
    sparsities_of_targets,
)
from .scopes import Pool, outlier_ratio, pools
from .selection.groups import Choice
from .selection.levels import levels_of
from .selection.scoring import require_finite_weights, score_inputs, structure_scores, weight_scores
from .structures.finding import find_structures, held_zeros, require_prunable
from .structures.groups import NO_STRUCTURES, Structures, kept_in, masks_of, parameters_of
from .structures.ranking import choose
from .weights.masks import MaskSet, masked_in
from .weights.targets import Target

logger = logging.getLogger(__name__)


def require_room(
    targets: Mapping[str, Target],
    masks: MaskSet,
    config: PruningConfig,
    criterion: Criterion | None = None,
    structures: Structures = NO_STRUCTURES,
) -> None:
    """Tries the first cut of a config on masks that are there: if they leave it no room, now is the time to say so.

    Args:
        targets: What `resolve_targets` found.
        masks: The masks so far.
        config: The pruning config.
        criterion: A criterion in place of the config's.
        structures: What `find_structures` found.

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
    next_masks(targets, masks, first, config, criterion=magnitude, scope=scope, structures=structures)


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
    structures: Structures = NO_STRUCTURES,
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
        structures: What `find_structures` found.

    Returns:
        A mask for each target; where whole structures go, for all that belongs to one.

    Raises:
        ValueError: if a weight is not finite, a score is NaN or has a wrong shape, or the criterion changed a weight
            (the message names the tensor); or if the masks so far prune more than the sparsity.
        TypeError: if the criterion gives something that is not a tensor.
    """
    granularity = granularities.parse(config.granularity)
    chosen = criterion or CRITERIA[config.criterion]
    scope = scope or effective_scope(config, criterion)
    require_finite_weights(targets.values())
    if isinstance(granularity, Structural):
        if not structures:
            raise ValueError(f"granularity {config.granularity!r} needs the structures that find_places gives.")
        values = {name: structure_scores(p, targets, chosen, statistics, seed) for name, p in structures.items()}
        sparsities = config.sparsities_of(structures, sparsity)
        return masks_of(
            structures, choose(structures, values, kept_in(structures, masks), sparsity, scope, sparsities)
        )

    def scores_of(target: Target) -> torch.Tensor:
        return weight_scores(target, chosen, statistics, seed)

    choice = Choice(targets, masks, scores_of, is_elementwise(chosen))
    if isinstance(granularity, Pattern):
        return choice.by_pattern(granularity.at(sparsity))
    if scope == "row":
        return choice.by_row(
            granularity, {**dict.fromkeys(targets, sparsity), **sparsities_of_targets(targets, sparsity, config)}
        )
    sizes = {name: target.weight.numel() // granularity.group_size for name, target in targets.items()}
    return choice.by_pool(granularity, lambda kept: _pools(targets, kept, sizes, sparsity, scope, config, statistics))


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
    structures: Structures = NO_STRUCTURES,
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
        structures: What `find_structures` found.

    Returns:
        A mask for each target; where whole structures go, for all that belongs to one.

    Raises:
        ValueError, TypeError: as `next_masks` and `calibrate` do, or if the criterion looks at data and there are
            none. The weights are then as they were.
    """
    reshard_(model)
    if has_adapters(model):
        targets = with_adapters(model, targets)
    require_whole_where_needed(targets.values(), config, criterion)
    reconstructs, known = is_reconstruction(config, criterion), statistics or {}
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

    changed = [target.weight for target in targets.values()] + list(parameters_of(structures).values())
    with _put_back_on_error(changed) if reconstructs or config.score_steps > 1 else contextlib.nullcontext():
        if reconstructs and batches is not None:
            masks = _reconstruct_(model, targets, masks, sparsity, config, gather(), batches(), show_progress)
            for target in targets.values():
                set_master_(target.weight, target.weight)
            return masks
        for level in levels_of(targets, masks, sparsity, config, criterion, structures):
            masks = next_masks(
                targets,
                masks,
                level,
                config,
                criterion=criterion,
                seed=seed,
                statistics=gather(),
                structures=structures,
            )
            masks.apply_(model)
    return masks


@contextlib.contextmanager
def _put_back_on_error(weights: Iterable[torch.Tensor]) -> Iterator[None]:
    """If what is done in it fails, the weights are as they were."""
    before = {weight: own(master_of(weight)).to("cpu", copy=True) for weight in weights}
    done = False
    try:
        yield
        done = True
    finally:
        if not done:
            with torch.no_grad():
                for weight, values in before.items():
                    set_master_(own(weight), values)


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
    require_finite_weights(targets.values())
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
        model: The model, unwrapped; of a `PeftModel` the base weights are pruned. Where there are several processes,
            all call this, with the same weights.
        config: The pruning config; of its rounds only the last counts.
        dataloader: Batches with the samples along the first dimension of their tensors, for criteria and scopes that
            look at data; of these the first `config.calibration_samples` samples are read, maybe several times. Each
            process gives samples of its own.
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
    with accessible(model):
        targets = resolve_targets(model, config)
        structures = find_structures(model, config, targets)
        require_prunable(model, config, structures)
        keeps = keeps_sparsity(model)
        if keeps:
            require_maskable_adapters(model, targets)
        elif has_adapters(model):
            logger.warning(
                "The base weights are pruned. Adapters fill the zeros again, unless keep_sparsity masks them."
            )
        if isinstance(dataloader, Iterator):
            raise ValueError(
                f"dataloader is a {type(dataloader).__name__}, which can be read once, and a cut may read the samples "
                "several times. Give a DataLoader or a list of batches."
            )
        masks = held_zeros(model, targets, structures) if config.hold_zeros else MaskSet()
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
                structures=structures,
            )
        if keeps:
            mask_adapters_(model, MaskSet.from_zeros(model, targets))
        return sparsity_report(model, config, masks=masks)


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
        ratios = {name: outlier_ratio(wanda(score_inputs(t.whole(), statistics))) for name, t in targets.items()}
    return pools(
        sizes,
        sparsity,
        scope,
        shapes={name: target.layer_shape for name, target in targets.items()},
        dropped={name: masked_in(kept[name]) if name in kept else 0 for name in targets},
        layer_sparsity=sparsities_of_targets(targets, sparsity, config),
        outlier_ratios=ratios,
    )
