"""The best weights of a round: a real copy, which later steps do not change."""

import functools

import torch
from torch import nn

from .files import Tensors
from .shards import is_sharded, own, rows_held
from .zero import gathered, master_of, set_master_


class WeightsCopy(Tensors):
    """A copy of a model's parameters and persistent buffers, on the CPU; of sharded ones, of this process's rows.

    Attributes:
        tensors: Name in memory → copy; a tensor that has several names has one of them.
        like: As in `Tensors`.
    """

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module) -> "WeightsCopy":
        """Copies the weights of a model, unwrapped; with DeepSpeed in the precision in which they are trained."""
        tensors = _tensors_of(model)
        with gathered(model):
            copies = {name: own(master_of(tensor)).to("cpu", copy=True) for name, tensor in tensors.items()}
        return cls(copies, {name: tensor for name, tensor in tensors.items() if is_sharded(tensor)})

    def divided_as(self, model: nn.Module) -> "WeightsCopy":
        """A whole copy → the rows that this process holds of a model's sharded tensors; as it is, without such."""
        like = {name: tensor for name, tensor in _tensors_of(model).items() if is_sharded(tensor)}
        if not like or self.like:
            return self
        rows = {name: self.tensors[name][rows_held(tensor)].clone() for name, tensor in like.items()}
        return WeightsCopy({**self.tensors, **rows}, like)

    def digest(self) -> str:
        """As that of `Tensors`. Nothing changes a copy, so that it is computed once."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        return super().digest()

    @torch.no_grad()
    def restore_(self, model: nn.Module) -> None:
        """Gives the weights back to their model, in place: its parameters stay the objects that they are."""
        with gathered(model):
            for name, tensor in _tensors_of(model).items():
                set_master_(own(tensor), self.tensors[name])


def _tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and persistent buffers, each once."""
    buffers = dict(model.named_buffers())
    saved = model.state_dict(keep_vars=True)
    return dict(model.named_parameters()) | {name: buffers[name] for name in buffers if name in saved}
