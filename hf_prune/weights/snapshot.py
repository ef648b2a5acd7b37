"""Snapshots: real copies of a model's weights, which later steps do not change."""

import functools

import torch
from torch import nn

from ..distributed.gathering import accessible
from ..distributed.shards import is_sharded, own
from ..distributed.tensor_files import Tensors
from ..distributed.zero import master_of, set_master_


class Snapshot(Tensors):
    """A copy of a model's parameters and persistent buffers, on the CPU; of sharded ones, of this process's rows.

    Attributes:
        tensors: Name in memory → copy; a tensor that has several names has one of them.
        like: As in `Tensors`.
    """

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module) -> "Snapshot":
        """Copies the weights of a model, unwrapped; with DeepSpeed in the precision in which they are trained."""
        with accessible(model):
            copies = {n: own(master_of(tensor)).to("cpu", copy=True) for n, tensor in _tensors_of(model).items()}
        copy = cls(copies, sharded_tensors(model))
        if copy.like:
            copy.digest()  # Now that all processes are here: Trainer asks the first alone for what it saves.
        return copy

    def digest(self) -> str:
        """As that of `Tensors`. Nothing changes a copy, so that it is computed once."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        return super().digest()

    @torch.no_grad()
    def restore_(self, model: nn.Module) -> None:
        """Gives the weights back to their model, in place: its parameters stay the objects that they are."""
        with accessible(model):
            for name, tensor in _tensors_of(model).items():
                set_master_(own(tensor), self.tensors[name])


def sharded_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and persistent buffers of which other processes hold rows."""
    return {name: tensor for name, tensor in _tensors_of(model).items() if is_sharded(tensor)}


def _tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and persistent buffers, each once."""
    buffers = dict(model.named_buffers())
    saved = model.state_dict(keep_vars=True)
    return dict(model.named_parameters()) | {name: buffers[name] for name in buffers if name in saved}
