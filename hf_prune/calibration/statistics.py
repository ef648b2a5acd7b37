"""Calibration: what criteria need to know beyond the weights, gathered from ordinary passes over a few samples."""

import collections
import logging
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from transformers import PreTrainedModel

from ..criteria import Statistics
from ..distributed.processes import failing_together, sum_over_processes_
from ..distributed.shards import from_own, own, resharded
from ..weights.gradient_hooks import paused
from ..weights.targets import Target, are_sharded
from .activations import Product, ProductWatch
from .contexts import eager_experts, undisturbed
from .passes import base_of, gradients_of, ignores_first_label, in_step, loss_of, summed_gradients, targets_in_passes
from .samples import IGNORED_LABEL, Batch, read_samples, require_samples, singles_of, size_of, take_samples

logger = logging.getLogger(__name__)


def calibrate(
    model: nn.Module,
    targets: Mapping[str, Target],
    batches: Iterable[Batch],
    needs: Collection[str],
    samples: int,
    *,
    show_progress: bool = False,
) -> Statistics:
    """Gathers statistics over calibration samples.

    The model is in evaluation mode meanwhile. Its gradients and buffers, and the random states of Python, NumPy and
    torch, are afterwards as they were. Where there are several processes, each passes batches of its own, and all of
    them get the statistics of all samples; of sharded weights, those of the rows that they hold.

    Args:
        model: The model, unwrapped; called as `model(**batch)`.
        targets: The weights that are to be scored.
        batches: What the model is called with: tensors with the samples along their first dimension.
        needs: Keys of `STATISTICS`.
        samples: Number of samples to read, of all processes together. If there are fewer, a warning is logged.
        show_progress: Whether a bar shows how far it is, if it takes more than a few seconds.

    Returns:
        What is needed, for each target; sharded as its weight is, where it has the weight's shape.

    Raises:
        ValueError: if there are no samples, if batches have no labels where a loss is needed, or if what was gathered
            is not finite (the message names the module).
    """
    in_passes, seen = targets_in_passes(model, targets), 0
    gatherers = {name: STATISTICS[name](model, targets, in_passes) for name in needs}
    weights = [target.weight for target in (*targets.values(), *in_passes.values())]
    with undisturbed(model, weights), resharded(model), paused():
        for batch, is_own in in_step(model, read_samples(model, batches, samples, show_progress=show_progress)):
            for gatherer in gatherers.values():
                gatherer.see(batch, is_own=is_own)
            seen += size_of(batch) if is_own else 0
    require_samples(model, seen, samples)
    statistics = {name: gatherer.statistic() for name, gatherer in gatherers.items()}
    with failing_together(are_sharded(targets.values())):
        for name, values in statistics.items():
            for parameter, value in values.items():
                require_finite(own(value), f"the {name.replace('_', ' ')} of {targets[parameter].module!r}")
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
            self.model(**batch)

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
        """The mean over the samples of all processes.

        Raises:
            ValueError: if it is zero everywhere.
        """
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
    """`E[(∂L_s/∂w)²]` over samples `s`, with the mean loss `L_s` of each by itself.

    The gradients of single samples come out of one backward pass of a batch where that can be: from the inputs and
    the gradient of the output of each product. That needs samples that lie along the first dimension everywhere, which
    is tried on two of them, and a loss that is a mean over labels, which is checked on every batch. Otherwise, and
    where weights are sharded, each sample has a pass of its own.
    """

    def __init__(self, model: nn.Module, targets: Mapping[str, Target], in_passes: Mapping[str, Target]) -> None:
        super().__init__(model, targets, in_passes)
        if self.is_sharded and any(target.weight.dtype == torch.float16 for target in in_passes.values()):
            raise ValueError(
                "squares of gradients are too small for float16, in which FSDP computes here. Train in bfloat16, or "
                "take a criterion that reads no squared_gradient."
            )
        self._in_batches: bool | None = None
        rounding = max(torch.finfo(target.weight.dtype).eps for target in targets.values())
        self._tolerance = max(1e-3, 25 * rounding)

    def see(self, batch: Batch, *, is_own: bool) -> None:
        """Adds a batch."""
        # Of samples without a label the gradient is zero.
        labelled = take_samples(batch, (self._label_counts(batch) * is_own).nonzero().flatten())
        self.count += size_of(batch) * is_own
        if self.is_sharded:
            for each, counts in in_step(self.model, singles_of(labelled)):
                self.add(summed_gradients(self.model, self.targets, each, float(counts), self.in_passes))
            return
        if not size_of(labelled):
            return
        if self._in_batches is None and size_of(labelled) > 1:
            self._in_batches = self._can_batch(labelled)
            self._say_if_not()
        squares = None
        if self._in_batches:
            squares = self._of_batch(labelled)
            self._in_batches = squares is not None
            self._say_if_not()
        self.add(squares or self._one_by_one(labelled))

    def _can_batch(self, batch: Batch) -> bool:
        """Whether two samples, those with the fewest and the most labels, have the same squares together as alone."""
        order = self._label_counts(batch).argsort(stable=True)
        pair = take_samples(batch, order[[0, -1]])
        together, alone = self._of_batch(pair), self._one_by_one(pair)
        return together is not None and all(
            (together[name] - values).norm() <= self._tolerance * values.norm() for name, values in alone.items()
        )

    def _forward(self, batch: Batch) -> tuple[torch.Tensor, list[tuple[Product, GradientEdge | None]]]:
        """The loss of a batch; its products, and where in the graph their outputs are."""
        uses: list[tuple[Product, GradientEdge | None]] = []

        def note(product: Product) -> None:
            # An edge: the output may be changed in place.
            uses.append((product, get_gradient_edge(product.output) if product.output.requires_grad else None))

        with torch.enable_grad(), ProductWatch(self.targets, note):
            loss = loss_of(self.model, batch)
        return loss, uses

    def _agrees_with_samples_alone(
        self, batch: Batch, use: int, product: Product, gradient: torch.Tensor, scale: torch.Tensor
    ) -> bool:
        """Whether the gradient of a product's output is, for each sample of a batch, that of the sample alone.

        It is not with weights for classes, or with labels that are left out for a reason that is not known here. Of a
        late product it costs little beside the forward pass.
        """
        try:
            together = product.rows(gradient, size_of(batch)).float() * scale
            for sample, single in enumerate(singles_of(batch)):
                loss, uses = self._forward(single)
                of_one, edge = uses[use]
                if edge is None:
                    return False
                alone = of_one.rows(torch.autograd.grad(loss, edge)[0], 1)[:, 0].float()
                if (together[:, sample] - alone).norm() > self._tolerance * alone.norm():
                    return False
        except (RuntimeError, IndexError):  # Samples that do not divide the positions, or take another way alone.
            return False
        return True

    def _say_if_not(self) -> None:
        if not self._in_batches:
            logger.info("Gradients of single samples are computed in passes of their own.")

    def _one_by_one(self, batch: Batch) -> dict[str, torch.Tensor]:
        totals = {name: torch.zeros_like(total) for name, total in self.sums.items()}
        for alone in singles_of(batch):
            for name, gradient in gradients_of(self.model, self.targets, alone).items():
                totals[name] += gradient.square()
        return totals

    def _of_batch(self, batch: Batch) -> dict[str, torch.Tensor] | None:
        """The sum of the squares; None if samples cannot be told apart, or are not the same as alone."""
        samples, counts = size_of(batch), self._label_counts(batch)
        loss, uses = self._forward(batch)
        edges = [edge for _, edge in uses if edge is not None]
        if len(edges) < len(uses) or any(product.part is not None for product, _ in uses):
            # Models with a backward pass of their own; experts, which see positions of several samples.
            return None
        gradients = torch.autograd.grad(loss, edges, allow_unused=True)
        # The loss is the mean over the labels of the batch, and that of a sample the mean over its own.
        scale = (counts.sum() / counts).reshape(1, -1, 1, 1)
        last = max((i for i, gradient in enumerate(gradients) if gradient is not None), default=None)
        if last is None or not self._agrees_with_samples_alone(batch, last, uses[last][0], gradients[last], scale):
            return None
        per_sample: dict[str, torch.Tensor] = {}
        left = collections.Counter(product.target.name for product, _ in uses)
        totals: dict[str, torch.Tensor] = {}
        for (product, _), gradient in zip(uses, gradients, strict=True):
            name = product.target.name
            left[name] -= 1
            if gradient is not None:
                try:
                    x, g = product.inputs(samples).float(), product.rows(gradient, samples).float() * scale
                except RuntimeError:
                    return None  # The samples do not divide the positions.
                if len(x) != product.target.parts:
                    return None
                if name not in per_sample and not left[name] and x.shape[2] == 1:
                    totals[name] = torch.einsum("psti,pstj->pij", g.square(), x.square())
                    continue
                per_sample[name] = per_sample.get(name, 0) + torch.einsum("psti,pstj->psij", g, x)
            if not left[name] and name in per_sample:
                totals[name] = per_sample.pop(name).square().sum(1)
        return {
            name: self.targets[name].from_rows(totals[name]) if name in totals else torch.zeros_like(total)
            for name, total in self.sums.items()
        }


def unpadded_inputs(product: Product, batch: Batch, model: nn.Module) -> torch.Tensor:
    """What a weight was multiplied with, `[parts, positions, fan_in]`, without padding where that can be told.

    Args:
        product: A product of a pass.
        batch: The batch of the pass.
        model: The model. Padding is told by `attention_mask [samples, tokens]` where it is known which position is
            which; in experts it is not, nor in an encoder-decoder, whose decoder has tokens of its own. Where samples
            and tokens are as many, samples are taken to come first.
    """
    inputs, mask = product.inputs(1).flatten(1, 2), batch.get("attention_mask")
    has_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if has_decoder or not isinstance(mask, torch.Tensor) or mask.ndim != 2 or inputs.shape[1] != mask.numel():
        return inputs
    sizes = tuple(size for size in mask.shape if size > 1)
    if product.grid[: len(sizes)] == sizes or product.grid == (mask.numel(),):
        return inputs[:, mask.flatten().bool()]
    return inputs[:, mask.T.flatten().bool()] if product.grid[: len(sizes)] == sizes[::-1] else inputs


def warn_of_unreached(target: Target, reached: torch.Tensor, consequence: str) -> None:
    """Says which parts of a target had no input but zeros, or none at all."""
    if not reached.all():
        logger.warning(
            "No calibration sample was seen to reach %d of the %d parts of %r; %s.",
            len(reached) - int(reached.sum()), len(reached), target.module, consequence,
        )  # fmt: skip


def require_finite(values: torch.Tensor, what: str) -> None:
    """Requires that what was gathered is finite.

    Raises:
        ValueError: if it is not.
    """
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
