"""Statistics of structures: what criteria of whole structures need to know, gathered from passes over samples."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..calibration.batches import Batch
from ..calibration.passes import call
from ..distributed.processes import sum_over_processes_
from .groups import Structures


class StructureGatherer:
    """Gathers one statistic of structures, batch by batch.

    Args:
        model: The model, unwrapped; in evaluation mode while batches are seen.
        structures: What is scored.
    """

    def __init__(self, model: nn.Module, structures: Structures) -> None:
        self.model, self.structures = model, structures
        device = next(model.parameters()).device
        self.sums = {name: torch.zeros(group.count, device=device) for name, group in structures.items()}
        self.counts = {name: torch.zeros(group.count, device=device) for name, group in structures.items()}

    def see(self, batch: Batch, *, is_own: bool) -> None:
        """Adds a batch, unless it is one of another process."""
        raise NotImplementedError

    def statistic(self) -> Mapping[str, torch.Tensor]:
        """Group → `[count]`, the mean over what all processes have counted, float64, on the CPU; 0 over nothing."""
        return {
            name: (sum_over_processes_(total) / sum_over_processes_(self.counts[name]).clamp_min(1)).double().cpu()
            for name, total in self.sums.items()
        }


class BlockInfluence(StructureGatherer):
    """`1 − cos(x_in, x_out)` of each layer, over all tokens of all samples, without padding where that can be told."""

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
        of_decoder = getattr(self.model.config, "is_encoder_decoder", False) and "decoder" in name
        mask = batch.get("decoder_attention_mask" if of_decoder else "attention_mask")

        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            influence = 1 - F.cosine_similarity(before.float(), after.float(), dim=-1)
            if isinstance(mask, torch.Tensor) and mask.shape == influence.shape:
                influence = influence[mask.bool()]
            self.sums[name][number] += influence.sum()
            self.counts[name][number] += influence.numel()

        return add


STRUCTURE_STATISTICS: dict[str, type[StructureGatherer]] = {
    "block_influence": BlockInfluence,
}
