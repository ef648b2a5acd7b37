"""Gradients of single samples, squared and summed up, out of one backward pass of a batch where that can be."""

import collections
import logging
from collections.abc import Mapping

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..weights.targets import Target
from .activations import Product, ProductWatch
from .batches import Batch, singles_of, size_of, take_samples
from .passes import explaining_backward_errors, gradients_of, loss_of

logger = logging.getLogger(__name__)


class PerSampleSquares:
    """`Σ_s (∂L_s/∂w)²` over the samples `s` of a batch, with the mean loss `L_s` of each by itself.

    The gradients of single samples come from the inputs and the gradient of the output of each product. That needs
    samples that lie along the first dimension everywhere, which is tried on two of them, and a loss that is a mean
    over labels, which is checked on every batch. Otherwise each sample has a pass of its own.
    """

    def __init__(self, model: nn.Module, targets: Mapping[str, Target]) -> None:
        self._model, self._targets = model, targets
        self._in_batches: bool | None = None
        rounding = max(torch.finfo(target.weight.dtype).eps for target in targets.values())
        self._tolerance = max(1e-3, 25 * rounding)

    def __call__(self, batch: Batch, counts: torch.Tensor) -> dict[str, torch.Tensor]:
        """The sum for each target, in float32. Of labels each sample has at least one: `counts`, `[samples]`."""
        squares = None
        if self._in_batches or (self._in_batches is None and len(counts) > 1):
            if self._in_batches or self._can_batch(batch, counts):
                squares = self._of_batch(batch, counts)
            self._in_batches = squares is not None
            if squares is None:
                logger.info("Gradients of single samples are computed in passes of their own.")
        return squares or self._one_by_one(batch)

    def _can_batch(self, batch: Batch, counts: torch.Tensor) -> bool:
        """Whether two samples, those with the fewest and the most labels, have the same squares together as alone."""
        ends = counts.argsort(stable=True)[[0, -1]]
        pair = take_samples(batch, ends)
        together, alone = self._of_batch(pair, counts[ends]), self._one_by_one(pair)
        return together is not None and all(
            (together[name] - values).norm() <= self._tolerance * values.norm() for name, values in alone.items()
        )

    def _forward(self, batch: Batch) -> tuple[torch.Tensor, list[tuple[Product, GradientEdge | None]]]:
        """The loss of a batch; its products, and where in the graph their outputs are."""
        uses: list[tuple[Product, GradientEdge | None]] = []

        def note(product: Product) -> None:
            # An edge: the output may be changed in place.
            uses.append((product, get_gradient_edge(product.output) if product.output.requires_grad else None))

        with torch.enable_grad(), ProductWatch(self._targets, note):
            loss = loss_of(self._model, batch)
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

    def _one_by_one(self, batch: Batch) -> dict[str, torch.Tensor]:
        totals = {n: torch.zeros_like(t.weight, dtype=torch.float32) for n, t in self._targets.items()}
        for alone in singles_of(batch):
            for name, gradient in gradients_of(self._model, self._targets, alone).items():
                totals[name] += gradient.square()
        return totals

    def _of_batch(self, batch: Batch, counts: torch.Tensor) -> dict[str, torch.Tensor] | None:
        """The sum of the squares; None if samples cannot be told apart, or are not the same as alone."""
        samples, (loss, uses) = len(counts), self._forward(batch)
        edges = [edge for _, edge in uses if edge is not None]
        if len(edges) < len(uses) or any(product.part is not None for product, _ in uses):
            # Models with a backward pass of their own; experts, which see positions of several samples.
            return None
        with explaining_backward_errors(self._model):
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
            n: t.from_rows(totals[n]) if n in totals else torch.zeros_like(t.weight, dtype=torch.float32)
            for n, t in self._targets.items()
        }
