"""Statistics of structures: what criteria of whole structures need to know, gathered from passes over samples."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..calibration.batches import Batch
from ..calibration.passes import call
from .contributions import Contribution
from .gates import GateFisher
from .gatherers import OfRouting, StructureGatherer, token_mask
from .routed import Routed


class BlockInfluence(StructureGatherer):
    """`1 − cos(x_in, x_out)` of each layer, over all tokens of all samples, without padding where that can be told."""

    kinds = ("layer",)

    @torch.no_grad()
    def see(self, batch: Batch, *, is_own: bool) -> None:
        """Adds a batch."""
        hooks = [
            layer.register_forward_hook(self._watch(name, i, batch), with_kwargs=True)
            for name in self.structures
            for i, layer in enumerate(self.model.get_submodule(name).children())
            if is_own
        ]
        try:
            call(self.model, batch)
        finally:
            for hook in hooks:
                hook.remove()

    def _watch(self, name: str, number: int, batch: Batch) -> Any:
        mask = token_mask(self.model, name, batch)

        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            influence = 1 - F.cosine_similarity(before.float(), after.float(), dim=-1)
            if mask is not None and mask.shape == influence.shape:
                influence = influence[mask.bool()]
            self.sums[name][number] += influence.sum()
            self.counts[name][number] += influence.numel()

        return add


class RoutedOutput(OfRouting):
    """`E[g · ‖f(x)‖₂]` of each expert, over the tokens routed to it."""

    def add(self, name: str, experts: nn.Module, routed: Routed, real: torch.Tensor) -> None:
        """Adds the outputs of a call."""
        numbers, owners, values = routed.outputs(experts)
        counted = real[owners]
        self.sums[name].index_add_(0, numbers[counted], values[counted])
        self.counts[name] += torch.bincount(numbers[counted], minlength=len(self.counts[name]))


class RoutedShare(OfRouting):
    """The share of tokens that are routed to each expert."""

    def add(self, name: str, experts: nn.Module, routed: Routed, real: torch.Tensor) -> None:
        """Adds the tokens of a call."""
        self.sums[name] += torch.bincount(routed.numbers[real[routed.owners]], minlength=len(self.sums[name]))
        self.counts[name] += real.sum()


STRUCTURE_STATISTICS: dict[str, type[StructureGatherer]] = {
    "block_influence": BlockInfluence,
    "routed_output": RoutedOutput,
    "routed_share": RoutedShare,
    "contribution": Contribution,
    "gate_fisher": GateFisher,
}
