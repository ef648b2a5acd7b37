"""Pruning: one round's cut, from scores to zeros, and `prune` for a cut without a Trainer."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from .calibration.batches import Batch
from .calibration.contexts import keep_random_state, undisturbed
from .calibration.passes import loss_of
from .calibration.samples import CalibrationData, read_samples, repeatable
from .calibration.saved_statistics import CalibrationStatistics
from .calibration.statistics import STATISTICS, calibrate
from .config import PruningConfig
from .criteria import Statistics, needs_of
from .distributed.gathering import accessible
from .distributed.processes import rank_and_size, sum_over_processes_
from .distributed.shards import own, reshard_
from .distributed.zero import is_divided, master_of, set_master_
from .plan import Plan
from .reconstruction.compensation import compensate_, solved_by_compensation
from .reconstruction.sparsegpt import reconstruct_
from .recovery.lora import has_adapters, keeps_sparsity, mask_adapters_, require_maskable_adapters, with_adapters
from .reporting.reports import SparsityReport, count_zeros
from .selection.scoring import AnyCriterion
from .structures.budgets import Budget
from .structures.experts import bar_pruned_
from .structures.groups import kept_in
from .structures.routing import bars_any, unbar_
from .structures.statistics import STRUCTURE_STATISTICS
from .weights.masks import MaskSet
from .weights.targets import are_sharded

logger = logging.getLogger(__name__)


def cut_(
    model: nn.Module,
    plan: Plan,
    masks: MaskSet,
    sparsity: float,
    data: CalibrationData | None = None,
    budget: Budget | None = None,
) -> MaskSet:
    """One round's cut: masks that reach a sparsity, in `config.score_steps` steps, and zeroes what they prune.

    A method that reconstructs also changes the weights that the masks keep.

    Args:
        model: The model, unwrapped; changed in place.
        plan: What is pruned, and how.
        masks: The masks so far.
        sparsity: Absolute sparsity to reach, in `[0, 1)`.
        data: What may be looked at.
        budget: What `plan.budget` gives for the model.

    Returns:
        A mask for each of `plan.parameters`.

    Raises:
        ValueError, TypeError: as `Plan.next_masks` and `calibrate` do, or if the cut looks at data and there are none.
            The weights are then as they were.
    """
    reshard_(model)
    if has_adapters(model):
        plan = dataclasses.replace(plan, targets=with_adapters(model, plan.targets))
    data = data or CalibrationData()
    samples, batches = plan.config.calibration_samples, data.batches
    missing = _missing(plan, data)
    if batches is None and (missing or plan.reconstructs or plan.compensates):
        what = f"the criterion {plan.criterion_name!r} with scope {plan.config.scope!r} looks"
        raise ValueError(
            f"{'reconstruct=True looks' if plan.compensates and not missing else what} at data "
            f"({', '.join(missing) or 'what goes into each layer'}). Give a dataloader of calibration samples."
        )
    changed = [*(target.weight for target in plan.targets.values()), *plan.parameters.values()]
    changed += solved_by_compensation(model, plan.targets, plan.structures) if plan.compensates else []
    several_steps = plan.reconstructs or plan.compensates or plan.config.score_steps > 1
    with _put_back_on_error(changed) if several_steps else contextlib.nullcontext():
        if plan.reconstructs and batches is not None:
            quotas = plan.quotas(masks, sparsity, statistics_for(model, plan, data))
            masks = reconstruct_(
                model, plan.targets, masks, quotas, batches(), samples, show_progress=data.show_progress
            )
            for target in plan.targets.values():
                set_master_(target.weight, target.weight)
            return masks
        for step in plan.steps(masks, sparsity, budget):
            masks = plan.next_masks(masks, step, statistics_for(model, plan, data), budget)
            if plan.compensates and batches is not None:
                solved = compensate_(
                    model, plan.targets, plan.structures, masks, batches(), samples, show_progress=data.show_progress
                )
                for each in solved:
                    set_master_(each, each)
            masks.apply_(model)
    return masks


def for_samples(model: nn.Module, plan: Plan, data: CalibrationData) -> Plan:
    """A plan whose default criterion is one that the samples allow; the same on all processes."""
    if not plan.reads_labels or _is_all_known(plan, data):
        return plan
    other = plan.without_labels()
    # DeepSpeed's stage 3 hides the gradients of outputs.
    if data.batches is None or _is_all_known(other, data) or any(map(is_divided, model.parameters())):
        return other
    device = next(model.parameters()).device
    lacks = torch.tensor(not _gives_loss(model, data.batches), dtype=torch.int64, device=device)
    return other if sum_over_processes_(lacks) else plan


def _gives_loss(model: nn.Module, batches: Callable[[], Iterable[Batch]]) -> bool:
    """Whether the model gives a loss for the first sample of this process; if that cannot be drawn, nobody knows."""
    with keep_random_state(next(model.parameters()).device), undisturbed(model), torch.no_grad():
        try:
            sample = next(read_samples(model, batches(), rank_and_size()[1]), None)
        except (TypeError, ValueError):  # The calibration says what is wrong.
            return True
        try:
            return sample is None or loss_of(model, sample) is not None
        except ValueError:
            return False


def _is_all_known(plan: Plan, data: CalibrationData) -> bool:
    return all(_is_known(name, plan, data) for name in plan.needs)


def _missing(plan: Plan, data: CalibrationData) -> list[str]:
    """The statistics that a cut reads and that are not known; raises if one is gathered by nobody."""
    missing = [name for name in plan.needs if not _is_known(name, plan, data)]
    if unknown := [name for name in missing if name not in {*STATISTICS, *STRUCTURE_STATISTICS}]:
        raise ValueError(
            f"the criterion {plan.criterion_name!r} needs {', '.join(unknown)}, which nobody gathers here. "
            f"A calibration gathers {', '.join([*STATISTICS, *STRUCTURE_STATISTICS])}; PruningTrainerCallback also "
            "movement."
        )
    return missing


def _is_known(name: str, plan: Plan, data: CalibrationData) -> bool:
    """Whether a statistic is known of all that it is read of."""
    if name not in data.known:
        return False
    wanted = set(plan.targets)
    if name in STRUCTURE_STATISTICS:
        kinds = STRUCTURE_STATISTICS[name].kinds
        wanted = {n for n, group in plan.structures.items() if not kinds or group.kind in kinds}
    return wanted <= data.known[name].keys()


def statistics_for(model: nn.Module, plan: Plan, data: CalibrationData) -> Statistics:
    """What a cut reads: what is known, and what a calibration says of the rest."""
    missing = _missing(plan, data)
    if not missing or data.batches is None:
        return data.known
    of_structures = {
        name: functools.partial(STRUCTURE_STATISTICS[name], model, plan.structures, plan.targets)
        for name in missing
        if name in STRUCTURE_STATISTICS
    }
    found = calibrate(
        model, plan.targets, data.batches(), [name for name in missing if name not in of_structures],
        plan.config.calibration_samples, others=of_structures, show_progress=data.show_progress,
    )  # fmt: skip
    return {**data.known, **found}


@contextlib.contextmanager
def _unbarred_on_error(model: nn.Module) -> Iterator[None]:
    """If what is done in it fails, routers choose from all experts again, unless they did not before."""
    was_barred, done = bars_any(model), False
    try:
        yield
        done = True
    finally:
        if not done and not was_barred:
            unbar_(model)


@contextlib.contextmanager
def _put_back_on_error(weights: Iterable[torch.Tensor]) -> Iterator[None]:
    """If what is done in it fails, the weights are as they were."""
    before = {weight: own(master_of(weight)).to("cpu", copy=True) for weight in dict.fromkeys(weights)}
    done = False
    try:
        yield
        done = True
    finally:
        if not done:
            with torch.no_grad():
                for weight, values in before.items():
                    set_master_(own(weight), values)


def collect_statistics(
    model: nn.Module,
    config: PruningConfig,
    dataloader: Iterable[Batch],
    *,
    criterion: AnyCriterion | None = None,
) -> CalibrationStatistics:
    """Calibrates once for several cuts of a dense model: what the criterion and the scope of a config read.

    Args:
        model: As in `prune`; it is left as it is.
        config: The pruning config; how much it prunes does not matter.
        dataloader: As in `prune`.
        criterion: As in `prune`.

    Returns:
        The statistics, for `prune(..., statistics=…)` and for `CalibrationStatistics.save`.

    Raises:
        ValueError: as `prune` does, or if the criterion reads no statistics, or FSDP has sharded the weights.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> batches = [{"input": torch.randn(4, 8)}]
        >>> config = PruningConfig(sparsity=0.5, criterion="wanda")
        >>> statistics = collect_statistics(model, config, batches)
        >>> prune(model, config, statistics=statistics).sparsity
        0.5
    """
    with accessible(model):
        plan = Plan.of(model, config, criterion)
        if not plan.needs:
            raise ValueError(f"the criterion {plan.criterion_name!r} with scope {config.scope!r} reads no statistics.")
        if are_sharded(plan.targets.values()):
            raise ValueError("FSDP has sharded the weights, and statistics are kept of whole ones.")
        if dataloader is None:
            raise ValueError("statistics are collected from samples. Give a dataloader.")
        data = CalibrationData(repeatable(dataloader), show_progress=True)
        found = statistics_for(model, for_samples(model, plan, data), data)
        return CalibrationStatistics.of(model, found, config.calibration_samples)


def prune(
    model: nn.Module,
    config: PruningConfig,
    dataloader: Iterable[Batch] | None = None,
    *,
    criterion: AnyCriterion | None = None,
    statistics: CalibrationStatistics | None = None,
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
            look at data, and for `reconstruct`; also padding-free ones, and those of vision-language models. Of these
            the first `config.calibration_samples` samples are read, maybe several times. Each process gives samples of
            its own.
        criterion: A criterion in place of the config's.
        statistics: What `collect_statistics` has found out about this model; it is not calibrated again for these.
        seed: For criteria that draw random numbers.

    Returns:
        The sparsity by module, over the targets and over the whole model; with a `keep_` option, what remains.

    Raises:
        ValueError: if the config does not fit the model; if criterion, scope or `reconstruct` looks at data and the
            dataloader is missing, empty, or can be read only once; if the model cannot be called with its batches, or
            their samples cannot be told apart; if nobody gathers here what the criterion reads; if a weight or a
            statistic is not finite; or if scores are NaN, of another shape, or differ from call to call. The model is
            then as it was.
        TypeError: if the criterion gives something that is not a tensor.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        >>> prune(model, PruningConfig(sparsity=0.75)).sparsity
        0.75
    """
    with accessible(model), contextlib.ExitStack() as after:
        plan = Plan.of(model, config, criterion, seed=seed)
        if plan.uses_default_criterion and dataloader is None and statistics is None:
            logger.warning(
                "Without a dataloader %s go by magnitude, which can ruin a model. Give one for criterion %s, which "
                "looks at samples (%s); or set a criterion.",
                config.granularity, plan.criterion_name, ", ".join(needs_of(plan.criterion)),
            )  # fmt: skip
            plan = plan.with_magnitude()
        keeps = keeps_sparsity(model)
        if keeps:
            require_maskable_adapters(model, plan.targets)
        elif has_adapters(model):
            logger.warning(
                "The base weights are pruned. Adapters fill the zeros again, unless keep_sparsity masks them."
            )
        data = CalibrationData(repeatable(dataloader), show_progress=True)
        if statistics is not None:
            if config.score_steps > 1:
                raise ValueError(
                    f"score_steps={config.score_steps} calibrates anew in each step, and statistics are of the dense "
                    "model. Leave one of them out."
                )
            data = dataclasses.replace(data, known=statistics.of_model(model))
        plan = for_samples(model, plan, data)
        masks = plan.held_zeros(model) if config.hold_zeros else MaskSet()
        remaining = None
        after.enter_context(_unbarred_on_error(model))
        bar_pruned_(model, plan.structures)
        if config.round_sparsities:
            budget = plan.budget(model, data.batches)
            masks = cut_(model, plan, masks, config.round_sparsities[-1], data, budget)
            if shortfall := plan.shortfall(masks, config.round_sparsities[-1], budget):
                logger.warning("%s", shortfall)
            if budget is not None:
                remaining = budget.remaining(1 - config.round_sparsities[-1], kept_in(plan.structures, masks))
        if keeps:
            mask_adapters_(model, MaskSet.from_zeros(model, plan.targets))
        return dataclasses.replace(count_zeros(model, masks, plan.structures, masks), remaining=remaining)
