"""Statistics: what criteria need to know beyond the weights, gathered from ordinary passes over a few samples."""

import contextlib
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from ..criteria import Statistics
from ..distributed.processes import failing_together, sum_over_processes_
from ..distributed.shards import from_own, own, reshard_
from ..weights.gradient_hooks import paused
from ..weights.targets import Target, are_sharded
from .activations import Product, ProductWatch
from .batches import IGNORED_LABEL, Batch, singles_of, size_of, take_samples
from .contexts import eager_experts, undisturbed
from .passes import base_of, call, gradients_of, ignores_first_label, in_step, summed_gradients, targets_in_passes
from .per_sample_gradients import PerSampleSquares
from .samples import read_samples, require_samples

logger = logging.getLogger(__name__)


class Sampled(Protocol):
    """Gathers one statistic, batch by batch."""

    def see(self, batch: Batch, *, is_own: bool) -> None:
        """Adds a batch, unless it is one of another process, with which this one only takes part in passes."""

    def statistic(self) -> Mapping[str, torch.Tensor]:
        """What was gathered, of all processes, by the name of what it is of."""


def calibrate(
    model: nn.Module,
    targets: Mapping[str, Target],
    batches: Iterable[Batch],
    needs: Collection[str],
    samples: int,
    *,
    others: Mapping[str, Callable[[], Sampled]] | None = None,
    show_progress: bool = False,
) -> Statistics:
    """Gathers statistics over calibration samples.

    The model is in evaluation mode meanwhile. Its gradients and buffers, and the random states of Python, NumPy and
    torch, are afterwards as they were. Where there are several processes, each passes batches of its own, and all of
    them get the statistics of all samples; of sharded weights, those of the rows that they hold.

    Args:
        model: The model, unwrapped; called as `call` does.
        targets: The weights that are to be scored.
        batches: What the model is called with, as `read_samples` takes them.
        needs: Keys of `STATISTICS`.
        samples: Number of samples to read, of all processes together. If there are fewer, a warning is logged.
        others: Name of a statistic of something else than targets → what gathers it.
        show_progress: Whether a bar shows how far it is, if it takes more than a few seconds.

    Returns:
        What is needed, for each target; sharded as its weight is, where it has the weight's shape.

    Raises:
        ValueError: if there are no samples, if batches have no labels where a loss is needed, or if what was gathered
            is not finite (the message names the module).
    """
    in_passes, seen = targets_in_passes(model, targets), 0
    gatherers: dict[str, Sampled] = {name: STATISTICS[name](model, targets, in_passes) for name in needs}
    gatherers |= {name: make() for name, make in (others or {}).items()}
    weights = [target.weight for target in (*targets.values(), *in_passes.values())]
    with undisturbed(model, weights), contextlib.ExitStack() as after, paused():
        after.callback(reshard_, model)
        for batch, is_own in in_step(model, read_samples(model, batches, samples, show_progress=show_progress)):
            for gatherer in gatherers.values():
                gatherer.see(batch, is_own=is_own)
            seen += size_of(batch) if is_own else 0
    require_samples(model, seen, samples)
    statistics = {name: gatherer.statistic() for name, gatherer in gatherers.items()}
    with failing_together(are_sharded(targets.values())):
        for name, values in statistics.items():
            for parameter, value in values.items():
                module = targets[parameter].module if parameter in targets else parameter
                require_finite(own(value), f"the {name.replace('_', ' ')} of {module!r}")
    return statistics


class Gatherer:
    """Gathers one statistic, batch by batch.

    Args:
        model: The model, unwrapped; in evaluation mode while batches are seen.
        targets: The weights that are to be scored.
        in_passes: The same, with the weights that passes compute with.
    """

    def __init__(self, model: nn.Module, targets: Mapping[str, Target], in_passes: Mapping[str, Target]) -> None:
        self.model, self.targets, self.in_passes = model, targets, in_passes
        self.is_sharded = are_sharded(targets.values())
        self.count = torch.zeros((), device=next(model.parameters()).device)
        self.sums = {
            name: torch.zeros(self.shape_of(target), device=target.weight.device) for name, target in targets.items()
        }

    def shape_of(self, target: Target) -> torch.Size:
        """The shape of what is summed up on this process for a target."""
        return own(target.weight).shape

    def see(self, batch: Batch, *, is_own: bool) -> None:
        """Adds a batch, unless it is one of another process, with which this one only takes part in passes."""
        raise NotImplementedError

    def statistic(self) -> Mapping[str, torch.Tensor]:
        """The mean over the samples of all processes."""
        count = max(sum_over_processes_(self.count).item(), 1)
        if self.is_sharded:  # Passes have added up what processes have seen.
            return {name: from_own(total / count, self.targets[name].weight) for name, total in self.sums.items()}
        return {name: sum_over_processes_(total) / count for name, total in self.sums.items()}

    def add(self, values: Mapping[str, torch.Tensor]) -> None:
        """Adds something to the sums."""
        for name, value in values.items():
            self.sums[name] += value


class InputNorm(Gatherer):
    """`‖x_j‖₂` of each input `j` of a weight, over all positions of all samples."""

    def shape_of(self, target: Target) -> torch.Size:
        """One number for each input of each part."""
        return torch.Size([target.parts, target.fan_in])

    def see(self, batch: Batch, *, is_own: bool) -> None:
        """Adds a batch."""

        def add(product: Product) -> None:
            squares = unpadded_inputs(product, batch, self.model).float().square().sum(1)
            self.sums[product.target.name][product.part_slice] += squares

        with torch.no_grad(), eager_experts(self.model), ProductWatch(self.in_passes if is_own else {}, add):
            call(self.model, batch)

    def statistic(self) -> Mapping[str, torch.Tensor]:
        """The norms over the samples of all processes; ones for a part of which no product was seen."""
        norms = {}
        for name, total in self.sums.items():
            norm = sum_over_processes_(total).sqrt()
            reached = norm.any(1)
            warn_of_unreached(self.targets[name], reached, "their weights count alike")
            norm[~reached] = 1
            norms[name] = self.targets[name].per_input(norm)
        return norms


class OfLoss(Gatherer):
    """Gathers what gradients of the loss say."""

    def __init__(self, model: nn.Module, targets: Mapping[str, Target], in_passes: Mapping[str, Target]) -> None:
        super().__init__(model, targets, in_passes)
        self._label_counts = LabelCounts(model)

    def statistic(self) -> Mapping[str, torch.Tensor]:
        """The mean over the samples of all processes, which may not be zero everywhere."""
        statistic = super().statistic()
        changes = torch.tensor(any(own(values).any() for values in statistic.values()), device=self.count.device)
        if not sum_over_processes_(changes.float()):
            raise ValueError(
                "every gradient is zero: on the calibration samples the loss does not depend on the targets. Have the "
                "samples labels? Criteria that take the loss of each sample by itself, as fisher does, cannot be used "
                "with a contrastive loss, which is constant then."
            )
        return statistic


class Gradient(OfLoss):
    """`∂L/∂w` of the mean loss `L`: over labels where samples have several, else over samples."""

    def see(self, batch: Batch, *, is_own: bool) -> None:
        """Adds a batch."""
        count = self._label_counts(batch).sum() * is_own
        self.count += count
        for each, counts in in_step(self.model, [batch] if count else []):  # A mean over nothing is NaN.
            share = float(count) if counts else 0.0
            if self.is_sharded:
                self.add(summed_gradients(self.model, self.targets, each, share))
            else:
                self.add({n: share * g for n, g in gradients_of(self.model, self.targets, each).items()})


class SquaredGradient(OfLoss):
    """`E[(∂L_s/∂w)²]` over samples `s`, with the mean loss `L_s` of each by itself."""

    def __init__(self, model: nn.Module, targets: Mapping[str, Target], in_passes: Mapping[str, Target]) -> None:
        super().__init__(model, targets, in_passes)
        if self.is_sharded and any(target.weight.dtype == torch.float16 for target in in_passes.values()):
            raise ValueError(
                "squares of gradients are too small for float16, in which FSDP computes here. Train in bfloat16, or "
                "take a criterion that reads no squared_gradient."
            )
        self._squares = PerSampleSquares(model, targets)

    def see(self, batch: Batch, *, is_own: bool) -> None:
        """Adds a batch."""
        counts = self._label_counts(batch) * is_own
        kept = counts.nonzero().flatten()  # Of samples without a label the gradient is zero.
        self.count += size_of(batch) * is_own

        def labelled() -> Iterator[Batch]:  # What cannot be cut is an error that all processes share.
            yield from singles_of(take_samples(batch, kept)) if len(kept) else ()

        if self.is_sharded:
            for each, own_one in in_step(self.model, labelled()):
                self.add(summed_gradients(self.model, self.targets, each, float(own_one), self.in_passes))
        elif len(kept):
            self.add(self._squares(take_samples(batch, kept), counts[kept]))


def unpadded_inputs(product: Product, batch: Batch, model: nn.Module) -> torch.Tensor:
    """What a weight was multiplied with, `[parts, positions, fan_in]`, without padding where that can be told.

    It is told by `attention_mask [samples, tokens]` of the batch where it is known which position is which; in experts
    it is not, nor in an encoder-decoder, whose decoder has tokens of its own.
    """
    return inputs_under(_mask_of(batch, model), product)


def unpadded_outputs(values: torch.Tensor, product: Product, batch: Batch, model: nn.Module) -> torch.Tensor:
    """Values of the shape of a product's output, `[parts, positions, rows of a part]`, for the same positions."""
    return _under(_mask_of(batch, model), product.rows(values, 1).flatten(1, 2), product)


def inputs_under(mask: object, product: Product) -> torch.Tensor:
    """What a weight was multiplied with, `[parts, positions, fan_in]`, where `mask [samples, tokens]` is not zero.

    All of it, if the mask is none, or it is not known which position is which. Where samples and tokens are as many,
    samples are taken to come first.
    """
    return _under(mask, product.inputs(1).flatten(1, 2), product)


def _mask_of(batch: Batch, model: nn.Module) -> object:
    has_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return None if has_decoder else batch.get("attention_mask")


def _under(mask: object, values: torch.Tensor, product: Product) -> torch.Tensor:
    """`[parts, positions, …]`, without the positions of a product that a mask leaves out."""
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or values.shape[1] != mask.numel():
        return values
    sizes = tuple(size for size in mask.shape if size > 1)
    if product.grid[: len(sizes)] == sizes or product.grid == (mask.numel(),):
        return values[:, mask.flatten().bool()]
    return values[:, mask.T.flatten().bool()] if product.grid[: len(sizes)] == sizes[::-1] else values


def warn_of_unreached(target: Target, reached: torch.Tensor, consequence: str) -> None:
    """Says which parts of a target had no input but zeros, or none at all."""
    if not reached.all():
        logger.warning(
            "No calibration sample was seen to reach %d of the %d parts of %r; %s.",
            len(reached) - int(reached.sum()), len(reached), target.module, consequence,
        )  # fmt: skip


def require_finite(values: torch.Tensor, what: str) -> None:
    """Requires that what was gathered is finite."""
    if not values.isfinite().all():
        raise ValueError(
            f"{what} is NaN or infinite over the calibration samples. Has training diverged, or does the model "
            "overflow in its dtype?"
        )


STATISTICS: dict[str, type[Gatherer]] = {
    "input_norm": InputNorm,
    "gradient": Gradient,
    "squared_gradient": SquaredGradient,
}


class LabelCounts:
    """Counts the labels of samples.

    Args:
        model: The model. Of one that generates without an encoder it is tried whether its loss reads the first label:
            where each position predicts the next one, nothing predicts the first.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, base = model, base_of(model)
        self._may_shift = (
            isinstance(base, PreTrainedModel) and base.can_generate() and not base.config.is_encoder_decoder
        )
        self._ignored_in_maps = getattr(getattr(base, "config", None), "semantic_loss_ignore_index", IGNORED_LABEL)
        self._shifts: bool | None = None

    def __call__(self, batch: Batch) -> torch.Tensor:
        """The number of labels of each sample, `[samples]`; 1 where labels are not classes."""
        counted = self._counted(batch)
        can_tell = self._shifts is None and self._may_shift and counted.ndim > 1 and bool(counted[:, 0].any())
        for each, _ in in_step(self._model, [batch] if can_tell else []):
            self._shifts = ignores_first_label(self._model, each)
        if counted.ndim > 1 and self._shifts:
            counted[:, 0] = False
        return counted.reshape(len(counted), -1).sum(1).float()

    def _counted(self, batch: Batch) -> torch.Tensor:
        """Which labels a loss may read, `[samples, …]`."""
        labels = batch.get("labels")
        if not torch.is_tensor(labels) or not labels.ndim or labels.is_floating_point():
            return torch.ones(size_of(batch), dtype=torch.bool, device=next(self._model.parameters()).device)
        counted = labels != IGNORED_LABEL
        return counted & (labels != self._ignored_in_maps) if labels.ndim > 2 else counted
