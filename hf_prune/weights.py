"""The best weights of a round: a real copy, which later steps do not change."""

import torch
from torch import nn

from .files import Tensors


class WeightsCopy(Tensors):
    """A copy of a model's parameters and persistent buffers, on the CPU.

    Attributes:
        tensors: Name in memory → copy; a tensor that has several names has one of them.
    """

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module) -> "WeightsCopy":
        """Copies the weights of a model, unwrapped."""
        return cls({name: tensor.detach().to("cpu", copy=True) for name, tensor in _tensors_of(model).items()})

    @torch.no_grad()
    def restore_(self, model: nn.Module) -> None:
        """Gives the weights back to their model, in place: its parameters stay the objects that they are."""
        for name, tensor in _tensors_of(model).items():
            tensor.copy_(self.tensors[name])


def _tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and persistent buffers, each once."""
    buffers = dict(model.named_buffers())
    saved = model.state_dict(keep_vars=True)
    return dict(model.named_parameters()) | {name: buffers[name] for name in buffers if name in saved}
