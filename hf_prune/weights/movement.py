"""Movement: what training does to each weight, summed up while it goes on."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ..distributed.processes import sum_over_processes_
from ..distributed.shards import from_own, is_sharded, own
from ..distributed.tensor_files import Tensors
from ..distributed.zero import has_partitions
from .targets import Target


def require_gatherable(model: nn.Module, is_due_at_start: bool) -> None:
    """Requires a training that shows how its weights move: without DeepSpeed, and with a step before the first cut."""
    if has_partitions(model):
        raise ValueError(
            "movement is the sum of gradients of each step, which DeepSpeed shows to nobody. Take another criterion, "
            "or train with FSDP or DistributedDataParallel."
        )
    if is_due_at_start:
        raise ValueError(
            "movement is gathered while training, and the first cut comes before the first step. Set begin to a "
            "number of steps, or to a fraction of the run."
        )


class Movement(Tensors):
    """`−Σ w · ∂L/∂w` of each target over the optimizer steps so far: positive where weights move away from zero.

    Attributes:
        tensors: Parameter → the sum, float32, on the weight's device; of a sharded one, of this process's rows.
        like: As in `Tensors`.
        metadata: The run and the number of its steps, by which it is known.

    Source: Sanh et al. 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", arXiv 2005.07683; without the
    learning rate.
    """

    @classmethod
    def zeros(cls, targets: Iterable[Target], run: str) -> "Movement":
        """Before the first step of a run."""
        return cls(
            {t.name: torch.zeros_like(own(t.weight.detach()), dtype=torch.float32) for t in targets},
            {t.name: t.weight for t in targets if is_sharded(t.weight)},
            {"run": run, "steps": "0"},
        )

    def beside(self, targets: Mapping[str, Target]) -> "Movement":
        """A loaded one, each sum on the device of its weight."""
        tensors = {name: self.tensors[name].to(target.weight.device) for name, target in targets.items()}
        return Movement(tensors, self.like, self.metadata)

    def digest(self) -> str:
        """The run and the number of its steps: which no other movement has, and which costs nothing to find out."""
        return f"{self.metadata.get('run')}, {self.metadata.get('steps')} steps"

    def statistic(self) -> dict[str, torch.Tensor]:
        """The sums as criteria read them, sharded as the weights are."""
        return {name: from_own(total, self.like.get(name, total)) for name, total in self.tensors.items()}

    @torch.no_grad()
    def add_step_(self, targets: Iterable[Target]) -> None:
        """Adds what the step does that is about to be taken; a weight without a gradient does not move.

        A step whose gradients are not finite is not counted: in float16 the optimizer will skip it. If the targets are
        sharded, all processes call this.
        """
        self.metadata["steps"] = str(int(self.metadata["steps"]) + 1)
        moving = [
            (own(t.weight), own(t.weight.grad), self.tensors[t.name]) for t in targets if t.weight.grad is not None
        ]
        bad = sum((~gradient.sum(dtype=torch.float32).isfinite()).float() for _, gradient, _ in moving)
        if self.like and torch.is_tensor(bad):
            sum_over_processes_(bad)
        if bad:
            return
        for weight, gradient, total in moving:
            total.addcmul_(weight.to(total.dtype), gradient.to(total.dtype), value=-1)
