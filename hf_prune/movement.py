"""Movement: what training does to each weight, summed up while it goes on."""

from collections.abc import Iterable, Mapping

import torch

from .targets import Target
from .weights import WeightsCopy

NEED = "movement"  # what a criterion declares that reads it


class Movement:
    """`−Σ w · ∂L/∂w` of each target over the optimizer steps so far: positive where weights move away from zero.

    Args:
        totals: Parameter → the sum, float32, on the weight's device.

    Source: Sanh et al. 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", arXiv 2005.07683, eq. 4, without
    the learning rate.
    """

    def __init__(self, totals: Mapping[str, torch.Tensor]) -> None:
        self.totals = totals

    @classmethod
    def none_yet(cls, targets: Iterable[Target]) -> "Movement":
        """Before the first step."""
        return cls({t.name: torch.zeros_like(t.weight, dtype=torch.float32) for t in targets})

    @torch.no_grad()
    def count_step_(self, targets: Iterable[Target]) -> None:
        """Adds what the step does that is about to be taken; a weight without a gradient does not move.

        A step whose gradients are not finite is not counted: in float16 the optimizer will skip it.
        """
        moving = [(target.weight, target.weight.grad, self.totals[target.name]) for target in targets]
        sums = [gradient.sum(dtype=torch.float32) for _, gradient, _ in moving if gradient is not None]
        if not all(bool(total.isfinite()) for total in sums):
            return
        for weight, gradient, total in moving:
            if gradient is not None:
                total.addcmul_(weight.to(total.dtype), gradient.to(total.dtype), value=-1)

    def copy(self) -> WeightsCopy:
        """A copy on the CPU, for a checkpoint."""
        return WeightsCopy({name: total.to("cpu", copy=True) for name, total in self.totals.items()})

    @classmethod
    def from_copy(cls, copy: WeightsCopy, targets: Mapping[str, Target]) -> "Movement":
        """The inverse of `copy`."""
        return cls({name: copy.tensors[name].to(target.weight.device) for name, target in targets.items()})
