"""Movement: what training does to each weight, summed up while it goes on."""

from collections.abc import Iterable, Mapping

import torch

from .files import Tensors
from .targets import Target


class Movement(Tensors):
    """`−Σ w · ∂L/∂w` of each target over the optimizer steps so far: positive where weights move away from zero.

    Attributes:
        tensors: Parameter → the sum, float32, on the weight's device.

    Source: Sanh et al. 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", arXiv 2005.07683; without the
    learning rate.
    """

    @classmethod
    def zeros(cls, targets: Iterable[Target]) -> "Movement":
        """Before the first step."""
        return cls({t.name: torch.zeros_like(t.weight, dtype=torch.float32) for t in targets})

    def to_devices_of(self, targets: Mapping[str, Target]) -> "Movement":
        """The same, each sum beside its weight."""
        return Movement({name: self.tensors[name].to(target.weight.device) for name, target in targets.items()})

    @torch.no_grad()
    def add_step_(self, targets: Iterable[Target]) -> None:
        """Adds what the step does that is about to be taken; a weight without a gradient does not move.

        A step whose gradients are not finite is not counted: in float16 the optimizer will skip it.
        """
        moving = [(t.weight, t.weight.grad, self.tensors[t.name]) for t in targets if t.weight.grad is not None]
        if not all(bool(gradient.sum(dtype=torch.float32).isfinite()) for _, gradient, _ in moving):
            return
        for weight, gradient, total in moving:
            total.addcmul_(weight.to(total.dtype), gradient.to(total.dtype), value=-1)
