"""Gatherers: what sees batches of samples, and adds up something of each structure."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from ..calibration.batches import Batch
from ..calibration.contexts import eager_experts
from ..calibration.passes import call
from ..distributed.processes import sum_over_processes_
from ..weights.targets import Target
from .groups import Structures
from .routed import Routed


def token_mask(model: nn.Module, name: str, batch: Batch) -> torch.Tensor | None:
    """The mask of a batch that says which tokens in a module are padding; None if there is none."""
    of_decoder = getattr(model.config, "is_encoder_decoder", False) and "decoder" in name
    mask = batch.get("decoder_attention_mask" if of_decoder else "attention_mask")
    return mask if isinstance(mask, torch.Tensor) else None


class StructureGatherer:
    """Gathers one statistic of structures, batch by batch.

    Attributes:
        kinds: The kinds of structures that it says something of; none if of all.

    Args:
        model: The model, unwrapped; in evaluation mode while batches are seen.
        structures: What is scored.
        targets: The weights that may be pruned.
    """

    kinds: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: nn.Module, structures: Structures, targets: Mapping[str, Target]) -> None:
        mine = {name: group for name, group in structures.items() if not self.kinds or group.kind in self.kinds}
        self.model, self.structures, self.targets = model, mine, targets
        device = next(model.parameters()).device
        self.sums = {name: torch.zeros(group.count, device=device) for name, group in mine.items()}
        self.counts = {name: torch.zeros(group.count, device=device) for name, group in mine.items()}

    def see(self, batch: Batch, *, is_own: bool) -> None:
        """Adds a batch, unless it is one of another process."""
        raise NotImplementedError

    def statistic(self) -> Mapping[str, torch.Tensor]:
        """Group → `[count]`, the mean over what all processes have counted, float64, on the CPU; 0 over nothing."""
        return {
            name: (sum_over_processes_(total) / sum_over_processes_(self.counts[name]).clamp_min(1)).double().cpu()
            for name, total in self.sums.items()
        }


class OfRouting(StructureGatherer):
    """Gathers what experts are given by their router, over all tokens but padding, where that can be told."""

    kinds = ("expert",)

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
