"""Gates: how much the loss rises without a structure, estimated by the gradient of a gate on its output."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..calibration.activations import Product, ProductWatch
from ..calibration.batches import Batch
from ..calibration.contexts import eager_experts
from ..calibration.passes import explaining_backward_errors, loss_of, targets_in_passes
from ..calibration.statistics import LabelCounts
from ..distributed.processes import sum_over_processes_
from ..weights.targets import Target
from .contributions import readers_of
from .gatherers import StructureGatherer
from .groups import KINDS, NOBODY, Member, StructureGroup, Structures


class GateFisher(StructureGatherer):
    """`Σ_t (∂L/∂m_t)²` of a gate `m_t = 1` on what a structure hands on at position `t`, for each label.

    `L` is the sum of the losses of labels. Behind a position stands `x_s · ∂L/∂x_s`, added up over what the structure
    hands on there; it follows from the inputs of the projections that read it, and the gradients of their outputs.
    """

    kinds = ("head", "query", "neuron")

    def __init__(self, model: nn.Module, structures: Structures, targets: Mapping[str, Target]) -> None:
        super().__init__(model, structures, targets)
        self._readers: dict[str, list[tuple[StructureGroup, Member]]] = {}
        for group in self.structures.values():
            for member, _ in readers_of(group, targets):
                self._readers.setdefault(member.name, []).append((group, member))
        self._in_passes = targets_in_passes(model, {name: targets[name] for name in self._readers})
        self._count = LabelCounts(model)
        self._labels = torch.zeros((), device=next(model.parameters()).device)

    def see(self, batch: Batch, *, is_own: bool) -> None:
        """Adds a batch; raises if a projection has a backward pass of its own."""
        labels = self._count(batch).sum()
        uses: list[tuple[Product, GradientEdge]] = []

        hidden: list[Product] = []

        def note(product: Product) -> None:
            if product.output.requires_grad:  # An edge: the output may be changed in place.
                uses.append((product, get_gradient_edge(product.output)))
            else:
                hidden.append(product)

        with torch.enable_grad(), eager_experts(self.model), ProductWatch(self._in_passes, note):
            loss = loss_of(self.model, batch) * labels
            with explaining_backward_errors(self.model):
                gradients = torch.autograd.grad(loss, [edge for _, edge in uses], allow_unused=True) if uses else ()
        if hidden:
            raise ValueError(
                f"the gradient of what {hidden[0].target.module!r} gives cannot be seen: its backward pass is one of "
                "its own, as with DeepSpeed's stage 3. Choose criterion activation, or ZeRO stage 2."
            )
        self._labels += labels
        with torch.no_grad():
            for (product, _), gradient in zip(uses, gradients, strict=True):
                if gradient is not None:
                    self._add_(product, gradient)

    def _add_(self, product: Product, gradient: torch.Tensor) -> None:
        target = product.target
        weight = target.to_rows(target.weight.detach())[product.part_slice].float()
        outputs = product.rows(gradient, 1).flatten(1, 2).float()
        inner = product.inputs(1).flatten(1, 2).float() * (outputs @ weight)  # [parts, positions, fan_in]
        for group, member in self._readers[target.name]:
            owners = member.owners.to(inner.device)
            if owners.ndim == 1:
                owners = owners.expand(target.parts, -1)
            for part, values in zip(owners[product.part_slice], inner, strict=True):
                owned = part != NOBODY
                behind = values.new_zeros(len(values), group.count).index_add_(1, part[owned], values[:, owned])
                self.sums[group.name] += behind.square().sum(0)

    def statistic(self) -> Mapping[str, torch.Tensor]:
        """The means over labels, of all processes; raises if no gradient has reached what a group hands on."""
        labels = sum_over_processes_(self._labels).clamp_min(1)
        found = {name: (sum_over_processes_(total) / labels).double().cpu() for name, total in self.sums.items()}
        # What reads a group may have been pruned with all that is in it.
        there = {g.name for n, read in self._readers.items() if self.targets[n].weight.any() for g, _ in read}
        if unseen := [name for name, values in found.items() if name in there and not values.any()]:
            raise ValueError(
                f"no gradient was seen to reach the {KINDS[self.structures[unseen[0]].kind]} of {unseen[0]!r}. Give "
                "samples with labels that reach them, exclude them (exclude_modules), or choose another criterion."
            )
        return found
