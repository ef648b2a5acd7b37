"""Statistics of structures: what criteria of whole structures need to know, gathered from passes over samples."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..calibration.batches import Batch
from ..calibration.contexts import eager_experts
from ..calibration.passes import call
from ..distributed.processes import sum_over_processes_
from .groups import Structures
from .routed import Routed


def token_mask(model: nn.Module, name: str, batch: Batch) -> torch.Tensor | None:
    """The mask of a batch that says which tokens in a module are padding; None if there is none."""
    of_decoder = getattr(model.config, "is_encoder_decoder", False) and "decoder" in name
    mask = batch.get("decoder_attention_mask" if of_decoder else "attention_mask")
    return mask if isinstance(mask, torch.Tensor) else None


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


class OfRouting(StructureGatherer):
    """Gathers what experts are given by their router, over all tokens but padding, where that can be told."""

    @torch.no_grad()
    def see(self, batch: Batch, *, is_own: bool) -> None:
        """Adds a batch."""
        hooks = [
            self.model.get_submodule(name).register_forward_hook(self._watch(name, batch), with_kwargs=True)
            for name in self.structures
            if is_own
        ]
        try:
            with eager_experts(self.model):
                call(self.model, batch)
        finally:
            for hook in hooks:
                hook.remove()

    def add(self, name: str, experts: nn.Module, routed: Routed, real: torch.Tensor) -> None:
        """Adds what one call of the experts of a group was given.

        Args:
            name: The group.
            experts: Their module.
            routed: Which tokens are routed to which.
            real: `[tokens]` bools, False for padding.
        """
        raise NotImplementedError

    def statistic(self) -> Mapping[str, torch.Tensor]:
        """As above; raises if experts were not called, or not in a way that tells which tokens they are given."""
        seen = {name: sum_over_processes_(counts.clone()) for name, counts in self.counts.items()}
        if unseen := [name for name, counts in seen.items() if not counts.any()]:
            raise ValueError(
                f"no token was seen on its way to the experts {unseen[0]!r}: they are called in a way that does not "
                "tell which tokens are routed to which. Choose a criterion of weights, such as magnitude or taylor."
            )
        return super().statistic()

    def _watch(self, name: str, batch: Batch) -> Any:
        mask = token_mask(self.model, name, batch)

        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            routed = Routed.of(module, (*args, *kwargs.values()), self.structures[name].count)
            if routed is not None:
                tokens = routed.tokens
                real = torch.ones(tokens, dtype=torch.bool)
                if mask is not None and mask.numel() == tokens:
                    real = mask.flatten().bool()
                self.add(name, module, routed, real.to(self.sums[name].device))

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
}
